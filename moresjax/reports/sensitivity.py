"""The figure of concept sensitivities."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from moresjax.analysis.sensitivity import Sensitivity
from moresjax.reports.plots import styles


def sensitivity_figure(found: Sequence[Sensitivity]) -> Figure:
    """Scores of concepts by layer, with the range of runs; filled where they are significant.

    The crosses are the random concepts of the same runs.
    """
    series: dict[str, list[Sensitivity]] = defaultdict(list)
    several = len({one.site for one in found}) > 1
    for one in found:
        series[f"{one.concept}, {one.site}" if several else one.concept].append(one)
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    drawn, width = styles(series), 0.5 / len(series)
    for number, (name, own) in enumerate(series.items()):
        colour = drawn[name].colour
        x = np.asarray([one.layer for one in own]) + (number - (len(series) - 1) / 2) * width
        y = [one.score for one in own]
        ends = np.percentile([one.scores for one in own], [2.5, 97.5], axis=1)
        axis.vlines(x, ends[0], ends[1], color=colour, linewidth=1)
        fill = [colour if one.significant else "white" for one in own]
        axis.scatter(x, y, c=fill, edgecolors=colour, s=28, zorder=3, label=name)
        axis.scatter(x, [one.random for one in own], marker="x", color=colour, s=18, alpha=0.6)
    axis.axhline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    axis.set_xticks(sorted({one.layer for one in found}))
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("layer")
    axis.set_ylabel("share of questions with a rising logit")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure
