"""Figures of ablations: scores over a grid of two ranks, and by parts (MRT's figures 4 and 6)."""

from collections.abc import Mapping

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from moresjax.reports.plots import COLOURS

# A score, and its 95% interval where there is one.
Score = tuple[float, tuple[float, float] | None]


def rank_map(
    scores: Mapping[tuple[int, int], float],
    label: str,
    *,
    printed: Mapping[tuple[int, int], float] | None = None,
    form: str = ".3f",
) -> Figure:
    """A score for every pair of ranks as a heat map; pairs that are missing stay white.

    >>> rank_map({(6, 4): 0.76, (8, 8): 0.78}, "accuracy").axes[0].get_xlabel()
    'rank of the multimodal editors'

    Args:
      scores: The scores by the ranks of the visual and of the multimodal editors.
      label: What the scores are.
      printed: The paper's numbers, written below ours.
      form: How a score is written.
    """
    visual, text = (sorted({ranks[n] for ranks in scores}) for n in range(2))
    grid = np.full((len(visual), len(text)), np.nan)
    for (v, t), score in scores.items():
        grid[visual.index(v), text.index(t)] = score
    size = (1.9 + 0.8 * len(text), 1.1 + 0.6 * len(visual))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    drawn = axis.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (v, t), score in scores.items():
        words, paper = format(score, form), (printed or {}).get((v, t))
        if paper is not None:
            words += f"\n(paper {paper:{form}})"
        place = text.index(t), visual.index(v)
        colour = "white" if score <= middle else "black"
        axis.text(*place, words, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(text)), [str(rank) for rank in text])
    axis.set_yticks(range(len(visual)), [str(rank) for rank in visual])
    axis.set_xlabel("rank of the multimodal editors")
    axis.set_ylabel("rank of the visual editors")
    figure.colorbar(drawn, ax=axis).set_label(label, fontsize=8)
    return figure


def part_scores(
    panels: Mapping[str, Mapping[str, Score]], label: str, base: float | None = None
) -> Figure:
    """Scores of several ablations with their intervals, a panel each, on one scale.

    >>> figure = part_scores({"length": {"mrt": (0.76, (0.74, 0.78)), "2": (0.75, None)}}, "score")
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['mrt', '2']

    Args:
      panels: By ablation and row its score.
      label: What the scores are.
      base: The score that all are compared with, which has a line through all rows.
    """
    most = max(map(len, panels.values()))
    size = (4.1 * len(panels), 0.9 + 0.3 * most)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        if base is not None:
            axis.axvline(base, color="#999999", linewidth=0.8, linestyle=":")
        for number, (score, bounds) in enumerate(rows.values()):
            axis.plot([score], [number], marker="o", markersize=5, color=COLOURS[0])
            if bounds is not None:
                axis.plot(bounds, [number] * 2, linewidth=1.6, alpha=0.7, color=COLOURS[0])
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", color="#eeeeee")
    figure.tight_layout()
    return figure
