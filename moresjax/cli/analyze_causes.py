"""`moresjax analyze causes`: which tokens and layers an answer needs, by taking them away."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moresjax.cli.options import (
    Commands,
    add_question_analysis,
    load_tuned_model,
    marks_of,
    show,
)
from moresjax.core.errors import UserError

if TYPE_CHECKING:
    from moresjax.inference.causes import Causes, Knockouts
    from moresjax.inference.pruning import PruningCurves
    from moresjax.inference.sinks import Sinks


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "which visual tokens and layers an answer needs, by taking them away"
    command = add_question_analysis(kinds, "causes", run_causes, help)
    command.add_argument("--answer", metavar="TEXT", help="default: what the model answers")
    command.add_argument(
        "--removal",
        default="mean",
        help="what stands in the place of keys and values: mean, zero, noise, swap (those of "
        "--other-image) or hide (default: %(default)s)",
    )
    command.add_argument(
        "--other-image",
        action="append",
        default=[],
        metavar="PATH",
        help="the image of --removal swap; may be repeated",
    )
    command.add_argument(
        "--regions",
        default="tokens",
        help="what is taken away at a time: tokens, images, roi or ROWSxCOLUMNS of an image "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--layers",
        default="all",
        help="where: all layers, each, or the width of a sliding window (default: %(default)s)",
    )
    command.add_argument(
        "--reads",
        default="question",
        help="what is read again: the question, or the answer alone (default: %(default)s)",
    )
    command.add_argument(
        "--window",
        type=int,
        default=1,
        metavar="LAYERS",
        help="layers in which attention is knocked out at a time (default: %(default)s)",
    )
    command.add_argument(
        "--maps",
        default="attention,fastv,gradient,effect,random",
        metavar="NAME,..",
        help="orders of visual tokens for pruning curves (default: %(default)s)",
    )
    command.add_argument(
        "--tau",
        type=float,
        default=20.0,
        help="the least activation of an attention sink, in root mean squares "
        "(default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of noise and random map")
    command.add_argument(
        "--batch-size", type=int, default=32, metavar="ROWS", help="rows at a time (default: 32)"
    )


def run_causes(args: argparse.Namespace) -> None:
    """Takes tokens and attention away, writes `causes.json` and draws the effects."""
    from moresjax.core.folders import check_new, new_folder
    from moresjax.core.json_files import write_json
    from moresjax.inference.causes import causes, knockouts
    from moresjax.inference.pruning import pruning
    from moresjax.inference.sinks import find_sinks
    from moresjax.reports import cause_figures as figures
    from moresjax.reports.plots import save
    from moresjax.reports.prompt_figures import pictures

    check_new(Path(args.out), "analysis")
    if not args.image:
        raise UserError("causes in an image need an image; give --image")
    maps = [name.strip() for name in args.maps.split(",")]
    model = load_tuned_model(args)
    question, marks = (args.prompt, args.image), marks_of(args.mark)
    found = causes(
        model,
        *question,
        answer=args.answer,
        removal=args.removal,
        other=args.other_image,
        regions=args.regions,
        layers=args.layers,
        reads=args.reads,
        seed=args.seed,
        batch_size=args.batch_size,
        marks=marks,
    )
    same: dict[str, Any] = {"answer": found.answer, "marks": marks}
    rows = {"batch_size": args.batch_size}
    knocked = knockouts(model, *question, layers=args.window, **rows, **same)
    curves = pruning(model, *question, maps=maps, seed=args.seed, **rows, **same)
    sinks = find_sinks(model, *question, tau=args.tau, **same)
    options = ("removal", "regions", "layers", "reads", "window", "tau", "seed")
    content = {
        **model.provenance,
        "prompt": args.prompt,
        "images": args.image,
        "other_images": args.other_image,
        "options": {name: getattr(args, name) for name in options},
        **_numbers(found, knocked, curves, sinks),
    }
    with new_folder(args.out, "analysis") as folder:
        write_json(folder / "causes.json", content, indent=None)
        drawn = {
            "effects": figures.effects_figure(found),
            "knockouts": figures.knockouts_figure(knocked),
            "pruning": figures.pruning_figure(curves),
            "sinks": figures.sinks_figure(sinks),
        }
        if len(found.grids):
            for number, picture in enumerate(pictures(model, args.image)):
                name = f"image{number + 1}"
                drawn[name] = figures.effects_on_image(picture, found, number)
        for name, figure in drawn.items():
            save(figure, folder / f"{name}.png", dpi=150)
    show(args, content, "\n".join([*_lines(found, knocked, curves, sinks), f"figures: {args.out}"]))


def _numbers(
    found: "Causes", knocked: "Knockouts", curves: "PruningCurves", sinks: "Sinks"
) -> dict[str, Any]:
    """All that was found, as JSON takes it."""
    from moresjax.reports.prompt_figures import plain

    shares = sinks.shares
    return {
        "answer": found.answer,
        "value": found.value,
        "columns": found.columns,
        "ranges": found.layers,
        "effects": found.effects.tolist(),
        "kept": found.kept.tolist(),
        "grids": plain(found.grids),
        "knockouts": {
            "edges": knocked.edges,
            "ranges": knocked.layers,
            "effects": knocked.effects.tolist(),
            "kept": knocked.kept.tolist(),
        },
        "pruning": {
            "maps": curves.maps,
            "scores": curves.scores.tolist(),
            "shares": curves.shares.tolist(),
            "inserted": curves.inserted.tolist(),
            "deleted": curves.deleted.tolist(),
            "kept": curves.kept.tolist(),
            "insertion": curves.insertion.tolist(),
            "deletion": curves.deletion.tolist(),
            "faithfulness": curves.faithfulness.tolist(),
        },
        "sinks": {
            "dimensions": sinks.dimensions,
            "tokens": sinks.tokens,
            "values": sinks.values.tolist(),
            "sinks": sinks.sinks.tolist(),
            "counts": sinks.counts.tolist(),
            "share": shares.share.tolist(),
            "share_without": shares.share_without.tolist(),
            "lmar": plain(shares.lmar),
            "lmar_without": plain(shares.lmar_without),
            "sink_share": shares.sink_share.tolist(),
        },
    }


def _lines(
    found: "Causes", knocked: "Knockouts", curves: "PruningCurves", sinks: "Sinks"
) -> list[str]:
    """What the command says."""
    import numpy as np

    row, column = np.unravel_index(np.abs(found.effects).argmax(), found.effects.shape)
    first, end = found.layers[row]
    lines = [
        f"answer {found.answer!r}: log-probability {found.value:.3f}",
        f"most by {found.columns[column]} in layers {first} to {end - 1}: effect "
        f"{found.effects[row, column]:.3f}",
    ]
    for edge, effects in zip(knocked.edges, knocked.effects, strict=True):
        best = int(np.abs(effects).argmax())
        start, end = knocked.layers[best]
        lines.append(f"{edge}: most in layers {start} to {end - 1}, effect {effects[best]:.3f}")
    pairs = zip(curves.maps, curves.faithfulness, strict=True)
    lines.append("faithfulness: " + ", ".join(f"{name} {value:.3f}" for name, value in pairs))
    visual, other = (int(count) for count in sinks.counts.max(0))
    lines.append(f"sinks in a layer: at most {visual} visual and {other} other tokens")
    return lines
