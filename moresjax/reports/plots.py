"""Figures. Every function returns a matplotlib figure and draws nothing on a screen."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from moresjax.models.attention import GROUPS

GROUP_COLOURS = {
    "system": "#c9c9c9",
    "image": "#3b8f5a",
    "question": "#8a8a8a",
    "answer": "#5c5c5c",
}


def attention_shares(shares: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
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
        axis.set_xticks(layers)
        axis.set_ylim(0, 1)
    axes[-1, 0].set_xlabel("layer")
    axes[0, 0].set_ylabel("share of attention")
    axes[0, 0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    return figure


def lmar_lines(lmar: Mapping[str, Sequence[float]], title: str) -> Figure:
    """LMAR per layer and method (figure 2)."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    strokes = itertools.cycle(["-", "--", ":", "-."])
    for method, values in lmar.items():
        style = {}
        if method.startswith("mores"):
            style = {"color": "#c0392b", "linewidth": 2.2, "linestyle": next(strokes)}
        axis.plot(range(len(values)), values, marker="o", markersize=3, label=method, **style)
    axis.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(max(len(v) for v in lmar.values())))
    axis.set_xlabel("layer")
    axis.set_ylabel("LMAR (image / text)")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    return figure


def share_against_size(points: Mapping[str, tuple[int, float]], ylabel: str) -> Figure:
    """A value against trainable parameters, one point per method (figure 1, right)."""
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    for method, (size, value) in points.items():
        axis.scatter(max(size, 1), value, s=28)
        axis.annotate(
            method, (max(size, 1), value), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    axis.set_xscale("symlog", linthresh=100)
    axis.set_xlim(0, 30 * max(size for size, _ in points.values()))  # room for the names
    axis.margins(y=0.12)
    axis.set_xlabel("trainable parameters in the LLM")
    axis.set_ylabel(ylabel)
    figure.tight_layout()
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
    width = 0.85 / len(accuracy)
    for number, (method, scores) in enumerate(accuracy.items()):
        x = np.arange(len(families)) + (number - (len(accuracy) - 1) / 2) * width
        axis.bar(x, [scores[f] for f in families], width=width, label=method)
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
    height, width = image.shape[:2]
    for layer, axis in enumerate(axes[1:]):
        axis.imshow(image)
        axis.imshow(
            attention[layer],
            cmap="inferno",
            alpha=0.65,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            vmin=0,
        )
        axis.set_title(f"layer {layer}", fontsize=8)
    for axis in axes:
        axis.axis("off")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG and closes it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
