"""Loss landscapes: figures, and numbers in lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from moresjax.evaluation.landscape.run import LandscapeOptions, measure_landscapes
from moresjax.reports import plots

SHOWN = {
    "share_twice": ("<= 2x centre", ".2f"),
    "share_above": ("<= centre + .1", ".2f"),
    "maximum_near": ("max within .25", ".3f"),
    "curvature": ("d'Hd", ".3g"),
}
DRAWN_PAIRS, LEVELS = 3, 12
COLOURS = "cividis"


def landscape_report(
    runs: Mapping[str, str | Path],
    out: str | Path,
    options: LandscapeOptions | None = None,
    *,
    mesh: Mesh | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Measures landscapes, or goes on with them, and draws them into the same folder.

    Args:
      runs: Directories of runs by name.
      out: The folder.
      options: How to measure.
      mesh: The devices; default: the first one alone.
      allow_pickle: Whether `*.bin` files of the base parts may be read.

    Returns:
      The content of `landscape.json`, as `measure_landscapes` describes it.

    Raises:
      UserError: As `measure_landscapes`.
    """
    more: dict[str, Any] = {"mesh": mesh, "allow_pickle": allow_pickle}
    result = measure_landscapes(runs, out, options, **more)
    plots.save(contours(result), Path(out) / "contours.png")
    plots.save(surfaces(result), Path(out) / "surfaces.png")
    return result


def contours(result: Mapping[str, Any]) -> Figure:
    """Loss over the grid: a row for each model, a column for each pair of directions.

    Colours are the same in all of them, by the logarithm of the loss; the white line is twice the
    loss of the centre.

    Args:
      result: The content of `landscape.json`.
    """
    models, axis = result["models"], np.asarray(result["axis"])
    columns = min(DRAWN_PAIRS, result["pairs"])
    size = (2.5 * columns + 1.2, 2.3 * len(models) + 0.4)
    figure, axes = plt.subplots(len(models), columns, figsize=size, squeeze=False)
    levels = _levels(result)
    drawn: Any = None
    for row, (name, entry) in zip(axes, models.items(), strict=True):
        for number, place in enumerate(row):
            losses = _grid(entry["pairs"][number]["losses"]).T  # a goes to the right
            clipped = np.clip(np.nan_to_num(losses, nan=np.inf), levels[0], levels[-1])
            drawn = place.contourf(
                axis, axis, np.log10(clipped), np.log10(levels), cmap=COLOURS, extend="max"
            )
            twice = 2 * entry["centre"]
            if losses.min() < twice < losses.max():
                place.contour(axis, axis, losses, [twice], colors="white", linewidths=0.9)
            place.plot(0, 0, "+", color="white", markersize=6)
            place.set_aspect("equal")
            place.tick_params(labelsize=6)
        row[0].set_ylabel(f"{name}\nb", fontsize=8)
    for number, (top, bottom) in enumerate(zip(axes[0], axes[-1], strict=True)):
        top.set_title(f"pair {number}", fontsize=8)
        bottom.set_xlabel("a", fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.9, 1))
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.915, 0.15, 0.018, 0.7)))
    shown = [float(bound) for bound in bar.get_ticks()]
    bar.set_ticks(shown, labels=[f"{10**bound:.2g}" for bound in shown])
    bar.ax.tick_params(labelsize=6)
    bar.set_label("loss", fontsize=8)
    return figure


def surfaces(result: Mapping[str, Any]) -> Figure:
    """The first pair of every model as a surface, all with the same heights.

    Args:
      result: The content of `landscape.json`.
    """
    models, axis = result["models"], np.asarray(result["axis"])
    figure = plt.figure(figsize=(2.9 * len(models) + 0.3, 3.0))
    levels, (a, b) = _levels(result), np.meshgrid(axis, axis, indexing="ij")
    for number, (name, entry) in enumerate(models.items(), 1):
        place: Any = figure.add_subplot(1, len(models), number, projection="3d")
        losses = _grid(entry["pairs"][0]["losses"])
        heights = np.clip(np.nan_to_num(losses, nan=np.inf), levels[0], levels[-1])
        place.plot_surface(
            a, b, heights, cmap=COLOURS, vmin=levels[0], vmax=levels[-1], linewidth=0
        )
        place.set_zlim(levels[0], levels[-1])
        place.set_title(name, fontsize=8)
        place.tick_params(labelsize=5, pad=-2)
    figure.tight_layout()
    return figure


def _grid(losses: list[list[float | None]]) -> Float[np.ndarray, "P P"]:
    return np.array([[np.nan if x is None else x for x in row] for row in losses])


def _levels(result: Mapping[str, Any]) -> Float[np.ndarray, " L"]:
    """Losses between the lowest of all and the median of what surfaces reach at the most."""
    grids = [_grid(pair["losses"]) for e in result["models"].values() for pair in e["pairs"]]
    lowest = min(np.nanmin(grid) for grid in grids)
    highest = float(np.median([np.nanmax(grid) for grid in grids]))
    lowest = max(float(lowest), 1e-6)
    return np.geomspace(lowest, max(highest, 1.01 * lowest), LEVELS)


def landscape_lines(result: Mapping[str, Any]) -> list[str]:
    """A line for every model, means over pairs of directions with 95% intervals, and the notes."""
    grid = f"{result['points']} x {result['points']} points, |a|, |b| <= {result['span']:g}"
    first = (
        f"{grid}; {result['pairs']} pairs of directions, normalize={result['normalize']}; "
        f"{result['n']} {result['split']} samples"
    )
    head = ["", "centre", *(title for title, _ in SHOWN.values())]
    rows = [head]
    for name, entry in result["models"].items():
        cells = [_with_interval(entry["mean"][key], form) for key, (_, form) in SHOWN.items()]
        rows.append([name, f"{entry['centre']:.4f}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    own = [f"{n}: {note}" for n, entry in result["models"].items() for note in entry["notes"]]
    return [first, *lines, *result["notes"], *own]


def _with_interval(found: Mapping[str, Any], form: str) -> str:
    if found["mean"] is None:
        return "-"
    text, bounds = format(found["mean"], form), found["interval95"]
    return text if bounds is None else f"{text} [{bounds[0]:{form}}, {bounds[1]:{form}}]"
