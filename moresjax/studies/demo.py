"""`moresjax demo`: the paper's three stages on handwritten digits, as a list of ordinary runs.

Every stage is a run of `configs/digits.py`, every score comes from `evaluate`, every figure from
`moresjax.analysis`; this file says in which order, and collects the numbers.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moresjax.configs import digits as recipe  # pyright: ignore[reportMissingImports]
from moresjax.core.errors import UserError
from moresjax.core.folders import is_empty
from moresjax.core.json_files import write_json
from moresjax.core.locks import one_writer
from moresjax.data.digits import FAMILIES, UNSEEN
from moresjax.evaluation.benchmarks.digits import majority_accuracy, make_examples
from moresjax.evaluation.statistics import mean_with_interval
from moresjax.inference.analyze import attention_map
from moresjax.inference.model import Model
from moresjax.models.count import count_parameters
from moresjax.reports import plots
from moresjax.reports.attention import write_attention_plots
from moresjax.reports.html import write_demo_report
from moresjax.studies.findings import PairedDifference, compare_with, explain
from moresjax.studies.pipeline import ZERO_SHOT, Finetuning, Pipeline, slug
from moresjax.studies.provenance import describe, provenance
from moresjax.studies.states_page import states_page
from moresjax.training.prepare import TrainResult
from moresjax.weights.adapter import save_adapter


@one_writer
def run_demo(out: str | Path, *, seeds: int = 1, split: str = "test", fast: bool = False) -> dict:
    """Runs all stages into `out` and writes `results.json`, plots, adapters and two pages.

    `report.html` is about accuracy and attention, `states.html` about concepts and steering.
    An interrupted demo goes on where it stopped, and one with more seeds adds runs.

    Args:
      out: The directory of everything that the demo makes.
      seeds: How often the whole pipeline, stages 0 to 2, is repeated.
      split: The handwriting that is scored; `val` is what the recipe was tuned on.
      fast: Runs a few steps of everything, to test the plumbing.

    Returns:
      What `results.json` has.

    Raises:
      UserError: for fewer than one seed, a directory that holds something else, or a run that
        diverged or was stopped.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    out, start = Path(out), time.monotonic()
    if out.exists() and not is_empty(out) and not (out / "seed0").is_dir():
        raise UserError(f"{out} is not empty and holds no demo to go on with")
    pipeline = Pipeline(out, range(seeds), split, fast)

    # Stages 0 and 1, then stage 2: every method with the same steps.
    stages = pipeline.train_stages()
    specs = {ZERO_SHOT: "none", **recipe.METHODS}
    trained = pipeline.finetune([Finetuning(*pair) for pair in recipe.METHODS.items()])
    models = {name: pipeline.model(0, name) for name in specs}
    scored = {
        name: [pipeline.scores(n, name, None if n else models[name]) for n in range(seeds)]
        for name in specs
    }
    for name in recipe.METHODS:
        save_adapter(models[name].mllm, out / "adapters" / slug(name), also_train=("connector",))

    questions = make_examples(split, pipeline.limit)
    results: dict[str, Any] = {
        "made_with": provenance(),
        "split": split,
        "scenes": pipeline.limit,
        "seeds": seeds,
        "families": list(FAMILIES),
        "unseen": UNSEEN,
        "majority": {family: majority_accuracy(questions[family]) for family in FAMILIES},
        "methods": {
            name: _summary(specs[name], models[name], scored[name], trained.get(name, ()))
            for name in specs
        },
        "stages": {name: [_seconds(result) for result in own] for name, own in stages.items()},
    }
    add_differences(results)
    results["findings"] = findings(results)
    results["heat_map"] = _plots(out, results, models, questions)
    results["states"] = states_page(models["full"], out, "full", split=split, fast=fast)
    results["seconds"] = round(time.monotonic() - start, 1)
    write_json(out / "results.json", results)
    write_demo_report(results | {"made": describe(results["made_with"])}, out)
    return results


def _seconds(result: TrainResult) -> dict[str, float]:
    return {"compile": round(result.compile_seconds, 1), "run": round(result.seconds, 1)}


def _summary(
    spec: str, model: Model, runs: Sequence[Mapping[str, Any]], trained: Sequence[TrainResult]
) -> dict[str, Any]:
    """What the seeds of one method say: values of every seed, means, and 95% intervals."""
    count = count_parameters(model.config, spec)
    scores = {f: [run["scores"][f"digits_{f}"]["score"] for run in runs] for f in FAMILIES}
    means = [run["mean_accuracy"] for run in runs]
    mean, interval95 = mean_with_interval(means, share=True)
    return {
        "tuning": spec,
        "accuracy": {family: fmean(values) for family, values in scores.items()},
        "accuracy_by_seed": scores,
        "mean": mean,
        "mean_interval95": interval95,
        "mean_by_seed": means,
        "trainable_in_llm": count.trainable_in_llm if trained else 0,
        "trainable": count.trainable if trained else 0,
        "train_seconds": [_seconds(result) for result in trained],
        "evaluate_seconds": [round(run["seconds"], 1) for run in runs],
        "attention": _mean_attention([run["attention"] for run in runs]),
        "visual_share_by_seed": [run["attention"]["average_visual_share"] for run in runs],
    }


def _mean_attention(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attention statistics, their means over seeds."""

    def mean(values: Sequence[Any]) -> Any:
        return np.mean(np.asarray(values, float), axis=0).tolist()

    first = runs[0]
    names = ("lmar", "lmar_of_means")
    lmar = {n: {key: mean([run[n][key] for run in runs]) for key in first[n]} for n in names}
    share = mean([run["share"] for run in runs])
    return {"groups": first["groups"], "share": share, **lmar}


def plain_method(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of connector-only training, which the others are compared with."""
    return next(n for n, m in methods.items() if m["tuning"] == "none" and n != ZERO_SHOT)


def add_differences(results: Mapping[str, Any]) -> None:
    """Adds to every method its paired differences from connector-only training."""
    methods = results["methods"]
    plain = methods[plain_method(methods)]
    for method in methods.values():
        for key in ("mean", "visual_share"):
            own, other = method[f"{key}_by_seed"], plain[f"{key}_by_seed"]
            found = PairedDifference.of(own, other)
            entry = {"mean": found.mean, "interval95": found.interval95}
            method.setdefault("from_connector_only", {})[key] = entry


def findings(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say: sentences that follow from paired intervals over seeds alone."""
    methods = {name: m for name, m in results["methods"].items() if name != ZERO_SHOT}
    plain, unseen = plain_method(methods), results["unseen"]
    mores = [name for name in methods if name.startswith("mores")]
    means = {name: m["mean_by_seed"] for name, m in methods.items()}
    share = {name: m["visual_share_by_seed"] for name, m in methods.items()}
    new = {name: m["accuracy_by_seed"][unseen] for name, m in methods.items()}
    last, first = mores[-1], (plain, *mores[:-1])
    looked = "Share of the image in the attention of generated tokens"
    return [
        explain(results["seeds"]),
        compare_with(plain, "Mean accuracy", means),
        compare_with(last, "Mean accuracy", _without(means, first)),
        compare_with(plain, f"Accuracy on {unseen!r}, which the LLM never met as text,", new),
        compare_with(plain, looked, share),
        compare_with(last, looked, _without(share, first)),
    ]


def _without(values: Mapping[str, list[float]], names: Sequence[str]) -> dict[str, list[float]]:
    return {name: own for name, own in values.items() if name not in names}


def _plots(out: Path, results: dict, models: dict[str, Model], questions: dict) -> dict:
    """Writes every figure; returns what the heat map shows."""
    methods = results["methods"]
    write_attention_plots({name: m["attention"] for name, m in methods.items()}, out)
    accuracy = {name: m["accuracy"] for name, m in methods.items()}
    plots.save(plots.accuracy_bars(accuracy, results["majority"]), out / "accuracy.png")
    points = {
        name: (m["trainable_in_llm"], fmean(m["visual_share_by_seed"]))
        for name, m in methods.items()
    }
    figure = plots.share_against_size(points, "average share of attention on the image")
    plots.save(figure, out / "share_against_size.png")

    mores = next(name for name in models if name.startswith("mores"))
    model, item = models[mores], questions["position"][0]
    found = attention_map(model, item.prompt, item.images, max_new_tokens=1)
    grid, word = found.grid[:, 0], found.tokens[0]
    question = item.prompt.split("\n")[-1]
    title = f"{question}  {word}  ({mores}; right: {item.answer})"
    plots.save(plots.heat_map(item.images[0], grid, title), out / "heat_map.png")
    share = float(np.nansum(grid, axis=(1, 2)).mean())
    return {"question": question, "answer": word, "right": item.answer, "visual_share": share}
