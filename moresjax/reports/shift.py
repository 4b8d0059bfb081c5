"""The shift of concepts from one run's states to those of others: numbers and figures."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moresjax._version import __version__
from moresjax.analysis.concepts import Concepts, learn
from moresjax.analysis.grounding import ReadingModel, ground_images
from moresjax.analysis.shift import CONTROLS, correlations
from moresjax.analysis.shift_study import ShiftOptions, measure_shift
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.core.folders import check_new, new_folder
from moresjax.core.json_files import write_json
from moresjax.reports import plots
from moresjax.reports.concept_figures import (
    Pictures,
    concepts_figure,
    contact_sheet,
    correlation_figure,
    file_pictures,
    recovery_figure,
    sweep_figure,
)
from moresjax.reports.concepts import check_model

MEASURES = {"cosine": "cosine with match", "t_overlap": "T-Overlap, %"}
SHEET_SAMPLES = 5
Measured = tuple[dict[str, Any], Concepts, Concepts]


def shift_report(
    base: States,
    tuned: Mapping[str, States],
    out: str | Path,
    *,
    method: str = "kmeans",
    concepts: Sequence[int] = (20,),
    dictionary: Concepts | None = None,
    seed: int = 0,
    site: str | None = None,
    layers: Sequence[int] = (),
    options: ShiftOptions | None = None,
    model: ReadingModel | None = None,
    pictures: Pictures | None = None,
) -> dict[str, Any]:
    """Measures shifts and writes `shift.json` and its figures into a new folder.

    Args:
      base: The original model's states.
      tuned: Those of tuned models by name. Where all names are numbers they are steps of one
        training, and a figure shows how concepts change with them.
      out: The folder.
      method: As in `learn`.
      concepts: K; with several, the first counts and the others are a sweep.
      dictionary: The original concepts, where they have been learned already.
      seed: The seed of dictionaries and controls.
      site: The site of the states, where there are several.
      layers: The layers, where there are several; the last counts and the others are a sweep.
      options: How shifts are measured.
      model: Its head reads the words of all concepts; without it there are none.
      pictures: Gives the pictures of images for the contact sheets; default: files.

    Returns:
      The content of `shift.json`.

    Raises:
      UserError: As `learn` and `measure_shift`, and for a folder that is not empty.
    """
    check_new(Path(out), "shift")
    check_model(base, model, *tuned.values())
    options = dataclasses.replace(options or ShiftOptions(), seed=seed)
    if dictionary is not None:
        method, concepts = dictionary.method, (len(dictionary), *concepts[1:])
        site, own_layer = site or dictionary.facts.get("site"), dictionary.facts.get("layer")
        layers = layers or ([] if own_layer is None else [own_layer])
        if layers and layers[-1] != own_layer:
            raise UserError(f"these concepts are of layer {own_layer}, not {layers[-1]}")

    main = concepts[0], (layers[-1] if layers else None)
    learned: dict[tuple[int, int | None], Concepts] = {}
    if dictionary is not None:
        learned[main] = dictionary

    def measure(name: str, count: int, layer: int | None) -> Measured:
        where: dict[str, Any] = {"seed": seed, "site": site, "layer": layer}
        if (count, layer) not in learned:
            learned[count, layer] = learn(base, method, count, **where)
        first = learned[count, layer]
        second = learn(tuned[name], method, count, **where)
        return measure_shift(base, tuned[name], first, second, options, model), first, second

    measured = {name: measure(name, *main) for name in tuned}
    entries = {name: entry for name, (entry, _, _) in measured.items()}
    result: dict[str, Any] = {
        "version": __version__,
        "seed": seed,
        "method": method,
        "concepts": main[0],
        "layer": main[1],
        "how": options.how,
        "by": options.by,
        "words": options.words,
        "candidates": options.candidates,
        "filter": options.word_filter.describe(),
        "samples": options.samples,
        "base": base.meta,
        "states": {name: own.meta for name, own in tuned.items()},
        "tuned": entries,
        "correlation": _correlations(entries),
        "sweeps": _sweeps(entries, measure, main, concepts, layers),
    }
    with new_folder(out, "shift") as folder:
        write_json(folder / "shift.json", result)
        for name, figure in _figures(result).items():
            plots.save(figure, folder / f"{name}.png")
        for name, (entry, first, second) in measured.items():
            states = base, tuned[name]
            sheets = _sheets(entry, states, (first, second), pictures or file_pictures())
            for kind, figure in sheets.items():
                plots.save(figure, folder / f"sheet_{name}_{kind}.png")
    return result


def _correlations(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of consistency and magnitude with recovery, and with each other."""
    pairs = {
        "consistency": ("cosine_with_mean", "relative_gain"),
        "pairwise_consistency": ("pairwise_cosine", "relative_gain"),
        "magnitude": ("magnitude", "relative_gain"),
        "consistency_magnitude": ("cosine_with_mean", "magnitude"),
    }
    return {
        name: correlations(
            {
                title: ([r[x] for r in entry["concepts"]], [r[y] for r in entry["concepts"]])
                for title, entry in entries.items()
            }
        )
        for name, (x, y) in pairs.items()
    }


def at_one(entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The recovery of a tuned model at alpha 1, of `original`, `own` and the controls."""
    rows = entry["recovery"]
    return {name: next(row for row in rows[name] if row["alpha"] == 1) for name in CONTROLS}


def _point(x: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    found = at_one(entry)
    return {"x": x} | {
        measure: {name: row.get(measure) for name, row in found.items()} for measure in MEASURES
    }


def _sweeps(
    entries: Mapping[str, Mapping[str, Any]],
    measure: Callable[[str, int, int | None], Measured],
    main: tuple[int, int | None],
    concepts: Sequence[int],
    layers: Sequence[int],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Recovery at alpha 1 against the number of concepts, the layer and the step."""
    sweeps: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def entry(name: str, count: int, layer: int | None) -> Mapping[str, Any]:
        return entries[name] if (count, layer) == main else measure(name, count, layer)[0]

    if len(concepts) > 1:
        sweeps["concepts"] = {
            name: [_point(k, entry(name, k, main[1])) for k in sorted(set(concepts))]
            for name in entries
        }
    if len(layers) > 1:
        sweeps["layer"] = {
            name: [_point(layer, entry(name, main[0], layer)) for layer in sorted(set(layers))]
            for name in entries
        }
    if len(entries) > 1 and all(name.isdecimal() for name in entries):
        steps = sorted(entries, key=int)
        sweeps["step"] = {"checkpoints": [_point(int(name), entries[name]) for name in steps]}
    return sweeps


def _figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a study by their names."""
    entries = result["tuned"]
    figures = {
        "recovery": recovery_figure(entries),
        "concepts": concepts_figure(entries),
        "correlation": correlation_figure(entries, result["correlation"]),
    }
    for name, sweep in result["sweeps"].items():
        for measure, label in MEASURES.items():
            points = [point for own in sweep.values() for point in own]
            if any(value is not None for point in points for value in point[measure].values()):
                figures[f"{name}_{measure}"] = sweep_figure(sweep, name, measure, label)
    return figures


def _sheets(
    entry: Mapping[str, Any],
    states: tuple[States, States],
    dictionaries: tuple[Concepts, Concepts],
    pictures: Pictures,
) -> dict[str, Figure]:
    """Contact sheets of the original concepts and their matches, where there are pictures."""
    sheets = {}
    for kind, own, d in zip(("original", "tuned"), states, dictionaries, strict=True):
        found = ground_images(d, own, SHEET_SAMPLES)
        shown = (pictures(names[0]) for row in found.images for names in row if names)
        if all(picture is None for picture in shown):
            continue
        order = [row["match"] if kind == "tuned" else k for k, row in enumerate(entry["concepts"])]
        words = [row["words"][kind] if row["words"] else [] for row in entry["concepts"]]
        captions = [f"{k}: {d.sizes[j]} samples" for k, j in enumerate(order)]
        sheets[kind] = contact_sheet(words, [found.images[j] for j in order], pictures, captions)
    return sheets


def shift_lines(result: Mapping[str, Any]) -> list[str]:
    """Recovery at alpha 1, the controls beside every number."""
    lines = []
    for name, entry in result["tuned"].items():
        lines.append(f"{name}: {entry['n']} common samples, {result['concepts']} concepts")
        found = at_one(entry)
        for measure, digits in (
            ("cosine", ".3f"),
            ("relative_gain", "+.3f"),
            ("relative_distance_gain", "+.3f"),
            ("t_overlap", ".1f"),
            ("image_overlap", ".1f"),
            ("keywords", ".1f"),
        ):
            values = {key: row.get(measure) for key, row in found.items()}
            if any(value is not None for value in values.values()):
                shown = [
                    f"{k} {'-' if v is None else format(v, digits)}" for k, v in values.items()
                ]
                lines.append(f"  {measure:<24}{'  '.join(shown)}")
        best = max(entry["recovery"]["own"], key=lambda row: row["cosine"] or -1)
        lines.append(
            f"  best alpha {best['alpha']:g} (cosine {best['cosine'] or float('nan'):.3f})"
        )
    for name, found in result["correlation"].items():
        own = found["overall"]
        if own["r"] is not None:
            lines.append(f"r of {name}: {own['r']:+.2f} (p {own['p']:.2g}, n {own['n']})")
    lines.append(
        "own is near its best at alpha 1 by construction; what it has beyond global and shuffled "
        "is the concepts' own"
    )
    return lines
