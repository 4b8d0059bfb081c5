"""Figures about one prompt: what layers would say, what states and tokens do to an answer.

Axis legend: L layers, S tokens, C columns, Y, X pixels or patches.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moresjax.analysis.attribution import LogitParts
from moresjax.core.layout import TokenKind
from moresjax.inference.attribution import TokenAttribution
from moresjax.inference.lens import LogitLens
from moresjax.inference.model import Model
from moresjax.inference.patching import Patching
from moresjax.inference.prompt_inputs import PromptImages, check_images
from moresjax.reports.plots import evenly, plt

TOKENS, LAYERS, WORDS = 40, 8, 4  # the most that a figure shows


def pictures(model: Model, images: PromptImages) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """The images of a prompt as the model is given them."""
    processor = model.prompts.processor.image
    if processor is None:
        return []
    return [processor.to_picture(processor(image)) for image in check_images(images)]


def plain(array: Float[np.ndarray, "..."]) -> list:
    """Numbers for a JSON file, which has null for nan."""
    whole = array.astype(object)
    whole[np.isnan(array)] = None
    return whole.tolist()


def value_grid(
    values: Float[np.ndarray, "L C"], columns: Sequence[str], label: str, signed: bool
) -> tuple[Figure, Axes]:
    """Values of layers and tokens, the first layer below."""
    layers, count = values.shape
    size = (2.0 + 0.45 * count, 1.5 + 0.28 * layers)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    most = float(np.nanmax(np.abs(values), initial=0)) or 1.0
    colours, low = ("RdBu", -most) if signed else ("Blues", 0)
    shown: dict[str, Any] = {"cmap": colours, "vmin": low, "vmax": most}
    drawn = axis.imshow(values, aspect="auto", origin="lower", **shown)
    axis.set_xticks(range(count), [text[:12] for text in columns], rotation=60, ha="right")
    axis.set_yticks(evenly(layers, 16))
    axis.tick_params(labelsize=7)
    axis.set_ylabel("layer", fontsize=8)
    figure.colorbar(drawn, ax=axis, label=label, fraction=0.03).ax.tick_params(labelsize=7)
    return figure, axis


def lens_figure(lens: LogitLens) -> Figure:
    """The likeliest next token by each layer at each token of text, with its probability.

    Args:
      lens: What `logit_lens` found; the last 40 tokens that are not visual are shown.
    """
    places = [n for n, text in enumerate(lens.tokens) if text != "<image>"][-TOKENS:]
    values = np.exp(lens.logprobs[:, places, 0])
    figure, axis = value_grid(values, [lens.tokens[n] for n in places], "probability", False)
    for layer, own in enumerate(lens.top):
        for column, place in enumerate(places):
            colour = "white" if values[layer, column] > 0.6 * values.max() else "black"
            text = own[place][0].strip()[:8]
            axis.text(column, layer, text, fontsize=5, ha="center", va="center", color=colour)
    return figure


def lens_on_image(picture: UInt8[np.ndarray, "Y X 3"], lens: LogitLens, image: int = 0) -> Figure:
    """Log-probabilities of words at the visual tokens of an image, a row per word, some layers.

    Args:
      picture: The image as the model is given it.
      lens: What `logit_lens` found, with grids.
      image: The number of the image.
    """
    assert lens.grids is not None
    grids = lens.grids[image, :WORDS]
    layers = evenly(grids.shape[1], LAYERS)
    titles = [f"layer {layer}" for layer in layers]
    return on_image(picture, list(grids[:, layers]), list(lens.words[:WORDS]), titles, "viridis")


def on_image(
    picture: UInt8[np.ndarray, "Y X 3"],
    rows: Sequence[Float[np.ndarray, "L Y X"]],
    names: Sequence[str],
    titles: Sequence[str],
    colours: str,
) -> Figure:
    """The image, and beside it values of its patches; one scale for each row."""
    columns = 1 + len(rows[0])
    size = (1.45 * columns + 0.6, 1.6 * len(rows) + 0.2)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=size, squeeze=False, layout="constrained"
    )
    height, width = picture.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    for own, values, name in zip(axes, rows, names, strict=True):
        for axis in own:
            axis.axis("off")
        own[0].imshow(picture)
        own[0].set_title(name[:16], fontsize=8)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if colours == "RdBu":
            high = max(abs(low), abs(high))
            low = -high
        for axis, grid, title in zip(own[1:], values, titles, strict=True):
            axis.imshow(picture, alpha=0.3)
            shown = {"extent": extent, "alpha": 0.75, "vmin": low, "vmax": high}
            drawn = axis.imshow(grid, cmap=colours, **shown)
            axis.set_title(title, fontsize=7)
        figure.colorbar(drawn, ax=own[-1], fraction=0.06).ax.tick_params(labelsize=6)
    return figure


def patching_figure(found: Patching) -> Figure:
    """The effect of the states of every layer and column; 1 is the whole difference."""
    return value_grid(found.effect, found.columns, "effect", True)[0]


def attribution_figure(found: TokenAttribution) -> Figure:
    """The score of every token of text, and the sum over the tokens of each image."""
    names, values = [], []
    for text, score, kind in zip(found.tokens, found.scores, found.kinds, strict=True):
        visual = kind == TokenKind.IMAGE
        if visual and names and names[-1] == "<image>":
            values[-1] += score
        else:
            names.append("<image>" if visual else text)
            values.append(float(score))
    names, values = names[-TOKENS:], values[-TOKENS:]
    figure, axis = plt.subplots(figsize=(1.5 + 0.3 * len(names), 2.8), layout="constrained")
    colours = ["#0072B2" if value >= 0 else "#D55E00" for value in values]
    axis.bar(range(len(values)), values, color=colours)
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set_xticks(range(len(names)), [name[:12] for name in names], rotation=60, ha="right")
    axis.tick_params(labelsize=7)
    axis.set_ylabel("score", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def attribution_on_image(
    picture: UInt8[np.ndarray, "Y X 3"], found: TokenAttribution, image: int = 0
) -> Figure:
    """The scores of the patches of an image.

    Args:
      picture: The image as the model is given it.
      found: What `attribute_tokens` found, with grids.
      image: The number of the image.
    """
    return on_image(picture, [found.grids[image][None]], ["image"], ["score"], "RdBu")


def parts_figure(parts: LogitParts) -> Figure:
    """What heads add to a logit, and attention, MLPs and edits of each layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    most = float(np.abs(parts.heads).max()) or 1.0
    shown = {"cmap": "RdBu", "vmin": -most, "vmax": most, "aspect": "auto", "origin": "lower"}
    drawn = left.imshow(parts.heads, **shown)
    left.set_xlabel("head", fontsize=8)
    left.set_ylabel("layer", fontsize=8)
    figure.colorbar(drawn, ax=left, fraction=0.05).ax.tick_params(labelsize=7)
    kinds = {"attention": parts.attention, "MLP": parts.mlps, "edits": parts.edits}
    shown_kinds = {name: values for name, values in kinds.items() if np.abs(values).max() > 0}
    width = 0.8 / max(len(shown_kinds), 1)
    for number, (name, values) in enumerate(shown_kinds.items()):
        places = np.arange(len(values)) + (number - (len(shown_kinds) - 1) / 2) * width
        right.bar(places, values, width=width, label=name)
    right.axhline(0, color="#444444", linewidth=0.8)
    right.set_xlabel("layer", fontsize=8)
    right.set_ylabel("added to the logit", fontsize=8)
    for each in (left.xaxis, left.yaxis, right.xaxis):
        each.set_major_locator(MaxNLocator(8, integer=True))
    right.legend(fontsize=7, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    return figure
