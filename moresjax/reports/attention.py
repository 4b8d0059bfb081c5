"""Attention statistics of several models on the same questions: numbers and plots."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.evaluation.attention_log import write_attention
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.inference.model import Model
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
    models: Sequence[tuple[str, Callable[[], Model]]],
    tasks: Sequence[str | BenchmarkTask],
    out: str | Path,
    folders: Mapping[str, str] | None = None,
    adapters: Mapping[str, str | None] | None = None,
    **options: Any,
) -> dict[str, dict]:
    """Runs models on the same questions and writes `attention.json` and the plots.

    Args:
      models: Pairs of a name and a function that loads the model, one after the other.
      tasks: What `moresjax.evaluation.run.evaluate` takes.
      out: The directory of the results.
      folders: By the models' names where they come from, which is noted beside the numbers.
      adapters: By the models' names the folders of the adapters on them.
      options: Further arguments of `moresjax.evaluation.run.evaluate`.

    Returns:
      The statistics and the accuracy of every model by its name, with its folder, fingerprint and
      template, and the tasks with split, number of questions and the hash of their prompts.

    Raises:
      UserError: As `evaluate`, and for a model that answers no question about an image.
    """
    from moresjax.evaluation.run import evaluate

    summaries = {}
    for name, load in models:
        result = evaluate(load(), tasks, attention=True, title=name, **options)
        if result.attention is None:
            raise UserError(f"{name} answered no question about an image")
        facts: dict[str, Any] = {"model": (folders or {}).get(name, name)}
        if adapters and adapters.get(name):
            facts["adapter"] = adapters[name]
        summaries[name] = result.attention_entry(**facts)
    write_attention_plots(summaries, out)
    write_attention(summaries, out)
    return summaries
