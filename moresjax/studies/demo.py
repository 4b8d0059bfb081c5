"""`moresjax demo`: the paper's three stages on handwritten digits, as a list of ordinary runs.

Every stage is `train(config)` with `configs/digits.py`, every score comes from `evaluate`, every
figure from `moresjax.analysis`; this file says in which order, and collects the numbers.
"""

import json
import re
import time
from pathlib import Path

import numpy as np

from moresjax.configs import digits as recipe  # pyright: ignore[reportMissingImports]
from moresjax.core.errors import UserError
from moresjax.data.digits import FAMILIES, UNSEEN
from moresjax.evaluation.benchmarks.digits import DEFAULT_LIMIT, majority_accuracy, make_examples
from moresjax.evaluation.results import EvaluationResult, write_results
from moresjax.evaluation.run import evaluate
from moresjax.inference.analyze import attention_map
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.models.count import count_parameters
from moresjax.reports import plots
from moresjax.reports.attention import write_attention_plots
from moresjax.reports.html import write_demo_report
from moresjax.training.loop import TrainResult, train
from moresjax.weights.adapter import save_adapter

ZERO_SHOT = "zero-shot"
STAGES = ("llm", "vit", "pretrain")
FAST = {"steps": 4, "batch_size": 8}


def run_demo(out: str | Path, *, seeds: int = 1, split: str = "test", fast: bool = False) -> dict:
    """Runs all stages into `out` and writes `results.json`, plots, adapters and `report.html`.

    An interrupted demo goes on where it stopped.

    Args:
      out: The directory of everything that the demo makes.
      seeds: How often stage 2 is repeated.
      split: The handwriting that is scored; `val` is what the recipe was tuned on.
      fast: Runs a few steps of everything, to test the plumbing.

    Returns:
      What `results.json` has.

    Raises:
      UserError: for fewer than one seed, or a directory that holds something else.
    """
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    out, start = Path(out), time.monotonic()
    if out.exists() and any(out.iterdir()) and not (out / STAGES[0]).is_dir():
        raise UserError(f"{out} is not empty and holds no demo to go on with")
    limit = 20 if fast else DEFAULT_LIMIT

    # Stages 0 and 1, then the model that every method starts from.
    stages = {stage: _train(out / stage, fast, stage=stage) for stage in STAGES}
    base = load(out / "pretrain", template=recipe.TEMPLATE)
    scored = {ZERO_SHOT: [_evaluate(base, out / ZERO_SHOT, ZERO_SHOT, split, limit)]}
    trained: dict[str, list[TrainResult]] = {ZERO_SHOT: []}
    models = {ZERO_SHOT: base}

    # Stage 2: every method with the same steps.
    for name, spec in recipe.METHODS.items():
        scored[name], trained[name] = [], []
        for seed in range(seeds):
            workdir = out / "finetune" / f"{slug(name)}-seed{seed}"
            result = _train(workdir, fast, stage="finetune", tuning=spec, seed=seed)
            model = load(workdir)
            models.setdefault(name, model)
            trained[name].append(result)
            title = f"{name}, seed {seed}"
            scored[name].append(_evaluate(model.merge(), workdir, title, split, limit))
        save_adapter(models[name].mllm, out / "adapters" / slug(name), also_train=("connector",))

    specs = {ZERO_SHOT: "none", **recipe.METHODS}
    methods = {
        name: _summary(specs[name], base, name != ZERO_SHOT, scored[name], trained[name])
        for name in scored
    }
    questions = make_examples(split, limit)
    results = {
        "split": split,
        "scenes": limit,
        "seeds": seeds,
        "families": list(FAMILIES),
        "unseen": UNSEEN,
        "majority": {family: majority_accuracy(questions[family]) for family in FAMILIES},
        "methods": methods,
        "stages": {name: _seconds(result) for name, result in stages.items()},
    }
    results["finding"] = finding(results)
    results["heat_map"] = _plots(out, results, models, questions)
    results["seconds"] = round(time.monotonic() - start, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_demo_report(results, out)
    return results


def slug(name: str) -> str:
    """A method's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _train(workdir: Path, fast: bool, **arguments: object) -> TrainResult:
    config = recipe.get_config(",".join(f"{key}={value}" for key, value in arguments.items()))
    config.name = workdir.name
    if arguments["stage"] == "finetune":
        # Folders of stage 2 are one level deeper.
        init = config.to_dict()["init"]
        moved = {part: f"../{x}" for part, x in init.items() if x}
        config.update({"init": moved})
    if fast:
        config.update(FAST)
    return train(config, workdir)


def _evaluate(model: Model, out: Path, title: str, split: str, limit: int) -> EvaluationResult:
    result = evaluate(model, ["digits"], split=split, limit=limit, attention=True, title=title)
    write_results(result, out / f"eval-{split}", split=split, tuning=model.tuning)
    return result


def _seconds(result: TrainResult) -> dict[str, float]:
    return {"compile": round(result.compile_seconds, 1), "run": round(result.seconds, 1)}


def _summary(
    spec: str, base: Model, tuned: bool, runs: list[EvaluationResult], trained: list[TrainResult]
) -> dict:
    """Means over seeds of one method, with their standard deviations."""
    attention = [run.attention for run in runs if run.attention is not None]
    count = count_parameters(base.config, spec)
    accuracy = {f: [run.scores[f"digits_{f}"]["score"] for run in runs] for f in FAMILIES}
    means = [run.mean_accuracy for run in runs if run.mean_accuracy is not None]
    return {
        "tuning": spec,
        "accuracy": {family: float(np.mean(values)) for family, values in accuracy.items()},
        "accuracy_std": {family: float(np.std(values)) for family, values in accuracy.items()},
        "mean": float(np.mean(means)),
        "mean_std": float(np.std(means)),
        "mean_by_seed": means,
        "trainable_in_llm": count.trainable_in_llm if tuned else 0,
        "trainable": count.trainable if tuned else 0,
        "train_seconds": [_seconds(result) for result in trained],
        "evaluate_seconds": [round(run.seconds, 1) for run in runs],
        "attention": attention[0].to_dict(),
        "visual_share_by_seed": [summary.average_visual_share for summary in attention],
    }


def finding(results: dict) -> str:
    """What the numbers say, in words that follow from them alone."""
    methods = {name: m for name, m in results["methods"].items() if name != ZERO_SHOT}
    mean = {name: m["mean"] for name, m in methods.items()}
    ranking = sorted(mean, key=lambda name: mean[name], reverse=True)
    share = {name: float(np.mean(m["visual_share_by_seed"])) for name, m in methods.items()}
    mores = max((n for n in mean if n.startswith("mores")), key=lambda name: mean[name])
    plain = next(name for name in mean if methods[name]["tuning"] == "none")
    gain = 100 * (mean[mores] - mean[plain])
    better = [name for name in ranking if mean[name] > mean[mores]]
    unseen = results["unseen"]
    unseen_gain = 100 * (methods[mores]["accuracy"][unseen] - methods[plain]["accuracy"][unseen])
    (zero,) = results["methods"][ZERO_SHOT]["visual_share_by_seed"]
    direction = "above" if share[mores] > share[plain] else "below"
    most = max(share, key=lambda name: share[name])
    least = min(share, key=lambda name: share[name])
    ahead = f"{', '.join(better)} stay ahead of it" if better else "no method is ahead of it"
    return (
        f"With {methods[mores]['trainable_in_llm']:,} parameters in the LLM, {mores} changes the "
        f"mean accuracy of the {plain} model by {gain:+.1f} points ({unseen_gain:+.1f} on "
        f"{unseen!r}, which the LLM never met as text); {ahead}. Of the attention of generated "
        f"tokens, {share[mores]:.1%} goes to the image with {mores}, {direction} {plain} "
        f"({share[plain]:.1%}) and against {zero:.1%} before stage 2; the most is "
        f"{share[most]:.1%} with {most}, the least {share[least]:.1%} with {least}."
    )


def _plots(out: Path, results: dict, models: dict[str, Model], questions: dict) -> dict:
    """Writes every figure; returns what the heat map shows."""
    methods = results["methods"]
    write_attention_plots({name: m["attention"] for name, m in methods.items()}, out)
    accuracy = {name: m["accuracy"] for name, m in methods.items()}
    plots.save(plots.accuracy_bars(accuracy, results["majority"]), out / "accuracy.png")
    points = {
        name: (m["trainable_in_llm"], float(np.mean(m["visual_share_by_seed"])))
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
