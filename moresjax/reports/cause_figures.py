"""Figures about causes: effects of tokens and layers, knockouts, pruning curves and sinks.

Axis legend: Y, X pixels or patches.
"""

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moresjax.inference.causes import Causes, Knockouts
from moresjax.inference.pruning import PruningCurves
from moresjax.inference.sinks import Sinks
from moresjax.reports.plots import evenly, plt
from moresjax.reports.prompt_figures import LAYERS, TOKENS, on_image, value_grid


def _ranges(layers: list[tuple[int, int]]) -> list[str]:
    """Names of ranges of layers."""
    return [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in layers]


def effects_figure(found: Causes) -> Figure:
    """The effect of every range of layers and column; of many columns, those with the largest."""
    most = np.abs(found.effects).max(0)
    chosen = np.sort(np.argsort(-most, kind="stable")[:TOKENS])
    names = [found.columns[number] for number in chosen]
    figure, axis = value_grid(found.effects[:, chosen], names, "effect", True)
    axis.set_yticks(range(len(found.layers)), _ranges(found.layers))
    axis.set_ylabel("layers", fontsize=8)
    return figure


def effects_on_image(picture: UInt8[np.ndarray, "Y X 3"], found: Causes, image: int = 0) -> Figure:
    """The effects of the patches of an image, some ranges of layers side by side.

    Args:
      picture: The image as the model is given it.
      found: What `causes` found, with grids.
      image: The number of the image.
    """
    chosen = evenly(len(found.layers), LAYERS)
    names = _ranges(found.layers)
    titles = [f"layers {names[number]}" for number in chosen]
    return on_image(picture, [found.grids[image][chosen]], ["image"], titles, "RdBu")


def knockouts_figure(found: Knockouts) -> Figure:
    """The effect of every edge by the first layer of the window."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    starts = [first for first, _ in found.layers]
    for edge, effects in zip(found.edges, found.effects, strict=True):
        axis.plot(starts, effects, marker="o", markersize=3, label=edge)
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set_xlabel("first layer of the window", fontsize=8)
    axis.set_ylabel("effect", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.legend(fontsize=7, frameon=False)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def pruning_figure(found: PruningCurves) -> Figure:
    """The answer's probability per token against the share of tokens kept, and deleted."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
    curves = (found.inserted, found.insertion), (found.deleted, found.deletion)
    for axis, (values, areas), label in zip(axes, curves, ("kept", "hidden"), strict=True):
        for name, line, area in zip(found.maps, values, areas, strict=True):
            chances = np.exp(line / found.num_tokens)
            axis.plot(found.shares, chances, marker="o", markersize=3, label=f"{name} {area:.3f}")
        axis.set_xlabel(f"share of visual tokens {label}", fontsize=8)
        axis.legend(fontsize=7, frameon=False, title="area", title_fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability per token", fontsize=8)
    return figure


def sinks_figure(found: Sinks) -> Figure:
    """Share of the image and LMAR, with and without sinks, layer by layer."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    shares = found.shares
    layers = range(len(shares.lmar))
    pairs = (
        (shares.share[:, 1], shares.share_without[:, 1], "share of the image"),
        (shares.lmar, shares.lmar_without, "LMAR"),
    )
    for axis, (whole, without, label) in zip(axes, pairs, strict=True):
        axis.plot(layers, whole, marker="o", markersize=3, label="all tokens")
        axis.plot(layers, without, marker="s", markersize=3, label="without sinks")
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.legend(fontsize=7, frameon=False)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
