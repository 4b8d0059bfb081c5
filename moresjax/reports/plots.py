"""Figures. Every function returns a matplotlib figure and draws nothing on a screen.

A method or run has one colour and one marker, the same in all figures of a set (`Style`). Legends
stand outside of the axes. A run far away from all others does not set the limits of an axis: it is
marked at the border (`limits`).
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moresjax.models.attention import GROUPS

GROUP_COLOURS = {
    "system": "#c9c9c9",
    "image": "#3b8f5a",
    "question": "#8a8a8a",
    "answer": "#5c5c5c",
}

# Told apart by colour-blind people too (Okabe & Ito 2008, without the yellow, and a grey).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#4D4D4D")
MARKERS = "osD^vP*"
DASHES = ("-", "--", ":", "-.")
FAR = 2.2  # a run is far away where the range of the others is this many times smaller


@dataclasses.dataclass(frozen=True)
class Style:
    """How a method or run is drawn."""

    colour: str
    marker: str
    dash: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for every name; each colour comes again with another marker and dashes.

    >>> [style.marker for style in styles(["a", "b"]).values()]
    ['o', 's']
    """
    found = {}
    for number, name in enumerate(names):
        turn, place = divmod(number, len(COLOURS))
        marker = MARKERS[(place + 3 * turn) % len(MARKERS)]
        found[name] = Style(COLOURS[place], marker, DASHES[turn % len(DASHES)])
    return found


def limits(
    values: Mapping[str, Sequence[int | float]], pad: float = 0.07
) -> tuple[float, float, list[str]]:
    """The limits of an axis, and the names of what lies far away outside of them.

    >>> low, high, outside = limits({"a": [0.8], "b": [0.9], "c": [0.85], "bad": [0.0]})
    >>> 0.7 < low < 0.8, outside
    (True, ['bad'])

    Args:
      values: The values of every run; those that are not finite do not count.
      pad: The room at both ends, as a share of the range.
    """
    kept = {name: [x for x in found if np.isfinite(x)] for name, found in values.items()}
    kept = {name: found for name, found in kept.items() if found}
    outside = [name for name in values if name not in kept]
    far = len(kept) // 4

    def spread(without: str = "") -> float:
        every = [x for name, found in kept.items() if name != without for x in found]
        return max(every) - min(every)

    while far:
        name = min(kept, key=spread)
        if spread(name) * FAR > spread():
            break
        outside.append(name)
        del kept[name]
        far -= 1
    every = [x for found in kept.values() for x in found] or [0.0]
    room = pad * (max(every) - min(every)) or 0.02 * max(abs(max(every)), 1e-3)
    return min(every) - room, max(every) + room, outside


def attention_shares(shares: Mapping[str, Sequence[Sequence[int | float]]]) -> Figure:
    """Share of attention on every key group per layer, one panel per method (figure 1, left).

    Args:
      shares: method -> `[L, groups]`, rows summing to 1.
    """
    columns = min(len(shares), 4)
    rows = -(-len(shares) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.1 * columns, 2.3 * rows), sharey=True, squeeze=False
    )
    names = [group.name.lower() for group in GROUPS]
    for axis in axes.flat[len(shares) :]:
        axis.axis("off")
    for axis, (method, share) in zip(axes.flat, shares.items(), strict=False):
        share = np.asarray(share)
        layers, bottom = np.arange(len(share)), np.zeros(len(share))
        for group in ("image", "question", "answer", "system"):
            part = share[:, names.index(group)]
            axis.bar(layers, part, bottom=bottom, color=GROUP_COLOURS[group], label=group)
            bottom += part
        axis.set_title(method, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_ylim(0, 1)
    axes[-1, 0].set_xlabel("layer")
    axes[0, 0].set_ylabel("share of attention")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.28 / figure.get_figheight(), 1, 1))
    figure.legend(handles, labels, ncol=4, fontsize=8, loc="lower center", frameon=False)
    return figure


def lines(
    series: Mapping[str, tuple[Sequence[int | float], Sequence[int | float]]],
    labels: tuple[str, str],
    *,
    drawn: Mapping[str, Style] | None = None,
    one: bool = False,
    title: str = "",
) -> Figure:
    """A line for every run.

    Args:
      series: The two coordinates of every run's points.
      labels: Those of the axes.
      drawn: The styles; without any the figure has a legend of its own.
      one: Whether to draw a thin line at 1.
      title: The title of the figure.
    """
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    own = drawn or styles(series)
    low, high, outside = limits({name: y for name, (_, y) in series.items()})
    for name, (x, y) in series.items():
        style = own[name]
        step = max(len(x) // 12, 1)
        options: dict[str, Any] = {
            "color": style.colour,
            "linestyle": style.dash,
            "marker": style.marker,
        }
        axis.plot(x, y, label=name, markersize=4, linewidth=1.5, markevery=step, **options)
        if name in outside and len(y) and np.isfinite(y[-1]):
            _at_border(axis, x[-1], y[-1], (low, high), style)
    if one and low < 1 < high:
        axis.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_ylim(low, high)
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title, fontsize=9)
    _finish(figure, axis, drawn is None)
    return figure


def _at_border(axis: Axes, x: float, y: float, bounds: tuple[float, float], style: Style) -> None:
    """An arrow at the border of the axis that a value lies beyond, with the value."""
    low, high = bounds
    if low <= y <= high:
        return
    place, marker, offset = (low, 11, 9) if y < low else (high, 10, -15)
    axis.plot([x], [place], marker=marker, color=style.colour, markersize=9, clip_on=False)
    axis.annotate(
        f"{y:.3g}",
        (x, place),
        fontsize=7,
        color=style.colour,
        xytext=(-4, offset),
        textcoords="offset points",
        ha="right",
    )


def _finish(figure: Figure, axis: Axes, legend: bool) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    handles, names = axis.get_legend_handles_labels()
    rows = -(-len(names) // 4) if legend else 0
    height = figure.get_figheight() + 0.22 * rows
    figure.set_figheight(height)
    figure.tight_layout(rect=(0, 0.22 * rows / height, 1, 1))
    if legend:
        options = {"fontsize": 7, "frameon": False, "loc": "lower center"}
        figure.legend(handles, names, ncol=min(len(names), 4), **options)


def lmar_lines(
    lmar: Mapping[str, Sequence[int | float]], title: str, drawn: Mapping[str, Style] | None = None
) -> Figure:
    """LMAR per layer and method (figure 2)."""
    series = {name: (range(len(values)), values) for name, values in lmar.items()}
    return lines(series, ("layer", "LMAR (image / text)"), drawn=drawn, one=True, title=title)


def share_against_size(
    points: Mapping[str, tuple[int, float]],
    ylabel: str,
    xlabel: str = "trainable parameters in the LLM",
    drawn: Mapping[str, Style] | None = None,
) -> Figure:
    """A value against trainable parameters, one point per method (figure 1, right)."""
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    own = drawn or styles(points)
    low, high, outside = limits({name: [value] for name, (_, value) in points.items()}, 0.15)
    for name, (size, value) in points.items():
        style = own[name]
        color, marker = style.colour, style.marker
        axis.scatter(
            size, value, s=44, zorder=3, alpha=0.85, color=color, marker=marker, label=name
        )
        if name in outside and np.isfinite(value):
            _at_border(axis, size, value, (low, high), style)
    axis.set_xscale("symlog", linthresh=100)
    axis.set_xlim(-20, 4 * max(100, *(size for size, _ in points.values())))
    axis.set_ylim(low, high)
    axis.grid(color="#eeeeee")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    _finish(figure, axis, drawn is None)
    return figure


Scores = Mapping[str, Mapping[str, tuple[float, tuple[float, float] | None]]]


def scores_by_run(scores: Scores) -> dict[str, list[float]]:
    """Every run's scores and the ends of their intervals, for the limits of an axis."""
    found: dict[str, list[float]] = {}
    for own in scores.values():
        for name, (score, bounds) in own.items():
            found.setdefault(name, []).extend([score, *(bounds or ())])
    return found


def scores_with_intervals(
    scores: Scores,
    drawn: Mapping[str, Style],
) -> Figure:
    """Scores of runs with their 95% intervals, a band of dots for every task.

    Args:
      scores: task -> run -> score and interval.
      drawn: The styles of the runs.
    """
    count = max(map(len, scores.values()))
    height = 0.9 + len(scores) * (0.125 * count + 0.15)
    figure, axis = plt.subplots(figsize=(8.2, height))
    low, high, outside = limits(scores_by_run(scores))
    for row, own in enumerate(scores.values()):
        for number, (name, (score, bounds)) in enumerate(own.items()):
            y, style = row + (number - (len(own) - 1) / 2) * 0.8 / count, drawn[name]
            if bounds is not None:
                axis.plot(bounds, [y, y], color=style.colour, linewidth=1.6, alpha=0.7)
            options = {"color": style.colour, "marker": style.marker, "markersize": 5}
            axis.plot([score], [y], label=name if row == 0 else None, **options)
            if not low <= score <= high:
                place, marker, side = (low, 8, 8) if score < low else (high, 9, -8)
                axis.plot([place], [y], marker=marker, color=style.colour, clip_on=False)
                where = {"xytext": (side, -2.5), "textcoords": "offset points", "fontsize": 7}
                align = "left" if score < low else "right"
                axis.annotate(f"{score:.3g}", (place, y), color=style.colour, ha=align, **where)
        if row:
            axis.axhline(row - 0.5, color="#e5e5e5", linewidth=0.8)
    axis.set_yticks(range(len(scores)), [name.replace(" (", "\n(") for name in scores])
    axis.set_ylim(len(scores) - 0.5, -0.5)
    axis.set_xlim(max(low, -0.02) if not outside else low, min(high, 1.02))
    axis.set_xlabel("score, with its 95% interval")
    axis.grid(axis="x", color="#eeeeee")
    _finish(figure, axis, legend=False)
    return figure


def shares_by_head(shares: Mapping[str, np.ndarray]) -> Figure:
    """Attention of every head on the image, a panel per run, one scale for all.

    Args:
      shares: run -> `[L, N]`.
    """
    columns = min(len(shares), 4)
    rows = -(-len(shares) // columns)
    size = (2.4 * columns + 0.8, 2.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    most = max(float(np.nanmax(share)) for share in shares.values())
    for axis in axes.flat[len(shares) :]:
        axis.axis("off")
    for axis, (name, share) in zip(axes.flat, shares.items(), strict=False):
        drawn = axis.imshow(share.T, cmap="viridis", vmin=0, vmax=most, aspect="auto")
        axis.set_title(name, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylabel("head", fontsize=8)
        figure.colorbar(drawn, ax=axis, fraction=0.06).ax.tick_params(labelsize=7)
    return figure


def answers_on_image(
    image: np.ndarray, grids: Mapping[str, np.ndarray], most_layers: int = 6
) -> Figure:
    """Attention of several runs' answers on one image, a row per run, some layers of each.

    Args:
      image: `[Y, X, 3]` uint8.
      grids: run -> `[L, rows, columns]`, attention on every patch; nan where a patch was dropped.
      most_layers: So many layers are shown, from the first to the last.
    """
    shown = {name: evenly(len(grid), most_layers) for name, grid in grids.items()}
    columns = 1 + max(map(len, shown.values()))
    size = (1.35 * columns, 1.7 * len(grids))
    figure, axes = plt.subplots(
        len(grids), columns, figsize=size, squeeze=False, layout="constrained"
    )
    for row, (name, grid) in zip(axes, grids.items(), strict=True):
        for axis in row:
            axis.axis("off")
        row[0].imshow(image)
        row[0].set_title(name, fontsize=8, loc="left")
        for axis, layer in zip(row[1:], shown[name], strict=False):
            # Below, so that the run's name has the whole line above.
            where = {"transform": axis.transAxes, "ha": "center", "va": "top"}
            axis.text(0.5, -0.03, f"layer {layer}", fontsize=7, color="#666666", **where)
            _overlay(axis, image, grid[layer])
    return figure


def accuracy_bars(
    accuracy: Mapping[str, Mapping[str, float]], baseline: Mapping[str, float]
) -> Figure:
    """Accuracy per task family and method, with the majority baseline of each family.

    Args:
      accuracy: method -> family -> accuracy.
      baseline: family -> accuracy of the most frequent answer.
    """
    families = list(baseline)
    figure, axis = plt.subplots(figsize=(1.35 * len(families) + 1, 3.4))
    width, own = 0.85 / len(accuracy), styles(accuracy)
    for number, (method, scores) in enumerate(accuracy.items()):
        x = np.arange(len(families)) + (number - (len(accuracy) - 1) / 2) * width
        heights, colour = [scores[f] for f in families], own[method].colour
        axis.bar(x, heights, width=width, label=method, color=colour)
    for number, family in enumerate(families):
        label = "majority" if number == 0 else None
        axis.plot(
            [number - 0.45, number + 0.45],
            [baseline[family]] * 2,
            color="black",
            lw=1.2,
            label=label,
        )
    axis.set_xticks(range(len(families)), families)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=7, ncol=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def heat_map(image: np.ndarray, attention: np.ndarray, title: str) -> Figure:
    """Attention of one answer over its image, per layer.

    Args:
      image: `[Y, X, 3]` uint8.
      attention: `[L, rows, columns]`, attention on every patch; nan where a patch was dropped.
      title: The title of the figure.
    """
    layers = len(attention)
    figure, axes = plt.subplots(1, layers + 1, figsize=(1.9 * (layers + 1), 2.4))
    axes[0].imshow(image)
    axes[0].set_title("image", fontsize=8)
    for layer, axis in enumerate(axes[1:]):
        _overlay(axis, image, attention[layer])
        axis.set_title(f"layer {layer}", fontsize=8)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def _overlay(axis: Axes, image: np.ndarray, attention: np.ndarray) -> None:
    """The image with the attention on its patches over it."""
    height, width = image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(image)
    axis.imshow(attention, cmap="inferno", alpha=0.65, extent=extent, vmin=0)


def evenly(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, from the first to the last.

    >>> evenly(32, 4)
    [0, 10, 20, 31]
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def save(figure: Figure, path: str | Path | io.BytesIO, dpi: int = 110) -> None:
    """Writes a figure as PNG and closes it."""
    figure.savefig(path, dpi=dpi, format="png")
    plt.close(figure)
