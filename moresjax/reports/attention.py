"""Attention statistics of several models on the same questions: numbers and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moresjax.reports import plots


def write_attention_plots(summaries: Mapping[str, Mapping], out: str | Path) -> list[Path]:
    """Figures 1 (left) and 2 of the paper for several models.

    Args:
      summaries: The statistics of every model by its name (`AttentionSummary.to_dict`).
      out: The directory of the PNG files.

    Returns:
      The PNG files.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "attention_share.png": plots.attention_shares(
            {n: s["share"] for n, s in summaries.items()}
        ),
        "lmar.png": plots.lmar_lines(
            {n: s["lmar_of_means"]["text"] for n, s in summaries.items()},
            "LMAR, ratio of means (text = question + answer)",
        ),
        "lmar_mean_of_ratios.png": plots.lmar_lines(
            {n: s["lmar"]["text"] for n, s in summaries.items()},
            "LMAR, mean of ratios (the paper's equation 2)",
        ),
    }
    for name, figure in figures.items():
        plots.save(figure, out / name)
    return [out / name for name in figures]


def attention_report(
    models: Sequence[tuple[str, str]],
    tasks: Sequence[str],
    out: str | Path,
    mesh: Mesh | None = None,
    **options: Any,
) -> dict[str, dict]:
    """Runs models on the same questions and writes `attention.json` and the plots.

    Args:
      models: Pairs of a name and a folder.
      tasks: Names of benchmarks.
      out: The directory of the results.
      mesh: The mesh that the models are placed on.
      options: Further arguments of `moresjax.evaluation.run.evaluate`.

    Returns:
      The statistics and the accuracy of every model by its name.
    """
    from moresjax.evaluation.run import evaluate
    from moresjax.inference.load import load

    summaries = {}
    for name, folder in models:
        result = evaluate(load(folder, mesh=mesh), tasks, attention=True, title=name, **options)
        assert result.attention is not None
        summaries[name] = result.attention.to_dict() | {"accuracy": result.mean_accuracy}
    write_attention_plots(summaries, out)
    (Path(out) / "attention.json").write_text(json.dumps(summaries, indent=2) + "\n")
    return summaries
