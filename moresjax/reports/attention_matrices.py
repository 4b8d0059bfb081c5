"""The figure of whole attention maps: queries by keys, with the borders of groups of tokens."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moresjax.reports.plots import plt

LEAST = 1e-3  # attention below it is drawn as nothing


def attention_matrices(maps: np.ndarray, groups: Sequence[str], title: str) -> Figure:
    """Attention of every query on every key, a panel per layer.

    >>> import numpy as np
    >>> figure = attention_matrices(np.eye(3)[None], ["system", "image", "image"], "a model")
    >>> len(figure.axes)  # the panel, and the bar of colours
    2

    Args:
      maps: `[L, Q, K]` with Q = K.
      groups: The name of every token's group.
      title: The title of the figure.
    """
    layers = len(maps)
    runs = [(name, len(list(own))) for name, own in groupby(groups)]
    ends = np.cumsum([size for _, size in runs])
    middles = ends - np.asarray([size for _, size in runs]) / 2 - 0.5
    size = (2.5 * layers + 0.8, 2.9)
    figure, axes = plt.subplots(1, layers, figsize=size, squeeze=False, layout="constrained")
    norm = LogNorm(LEAST, 1)
    for layer, (axis, own) in enumerate(zip(axes[0], maps, strict=True)):
        axis.imshow(np.maximum(own, LEAST), cmap="magma", norm=norm)
        for end in ends[:-1]:
            axis.axhline(end - 0.5, color="#56B4E9", linewidth=0.7)
            axis.axvline(end - 0.5, color="#56B4E9", linewidth=0.7)
        names = [name for name, _ in runs]
        axis.set_xticks(middles, names, fontsize=6, rotation=90)
        axis.set_yticks(middles, names if layer == 0 else [], fontsize=6)
        axis.set_title(f"layer {layer}", fontsize=8)
    axes[0, 0].set_ylabel("query", fontsize=7)
    axes[0, 0].set_xlabel("key", fontsize=7)
    figure.suptitle(title, fontsize=8)
    colours = ScalarMappable(norm, "magma")
    figure.colorbar(colours, ax=list(axes[0]), fraction=0.03).ax.tick_params(labelsize=6)
    return figure
