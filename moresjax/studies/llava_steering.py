"""Tables and figures of LLaVA Steering (arXiv 2412.12359) on the digits world.

`paper` of every study holds what the paper prints, or claims where a figure has no numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moresjax.configs import digits as recipe  # pyright: ignore[reportMissingImports]
from moresjax.data.digits import FAMILIES
from moresjax.reports import plots
from moresjax.studies.findings import PairedDifference, compare_with, listed
from moresjax.studies.pipeline import Finetuning, Pipeline
from moresjax.studies.study import (
    Outcome,
    Study,
    Table,
    Values,
    agreement,
    claim,
    values_table,
    with_interval,
)
from moresjax.studies.text_only import text_only

PLAIN, MORES = "connector only", "mores r=1"
METHODS = {
    **recipe.METHODS,
    "mores r=2": "mores:rank=2,positions=image,init=identity",
    "mores r=8": "mores:rank=8,positions=image,init=identity",
    "adapter": "adapter:bottleneck=16",
    "oft": "oft:block_size=8",
}
THREE_LAYERS = "Three layers and a thousandth of the paper's hidden states say nothing about 32."


def runs_of(*names: str) -> tuple[Finetuning, ...]:
    """Runs of stage 2 by their names."""
    return tuple(Finetuning(name, METHODS[name]) for name in names)


def _accuracy(pipeline: Pipeline, study: Study, base: str, paper: Mapping[str, float]) -> Outcome:
    """Mean accuracy of methods, and whether they are ordered as in the paper."""
    values = pipeline.accuracy(run.name for run in study.runs)
    tables = [values_table("Mean accuracy", {"accuracy": values}, base)]
    sentences = [agreement("Mean accuracy", base, paper, values)]
    if PLAIN in values:
        sentences.append(compare_with(PLAIN, "Mean accuracy", values))
    return Outcome(tables, sentences, {"mean_accuracy": values})


# Table 1 and the figures about the same runs ----------------------------------------------------

TABLE_1 = {
    "full": 61.5,
    "adapter": 58.2,
    "lora r=8": 59.9,
    "oft": 58.3,
    "ia3": 57.1,
    "mores r=1": 56.9,
    "mores r=2": 57.3,
    "mores r=4": 57.4,
}
_COMPARED = runs_of(PLAIN, *TABLE_1)


def _table1(pipeline: Pipeline, study: Study) -> Outcome:
    return _accuracy(pipeline, study, MORES, TABLE_1)


def _attention(pipeline: Pipeline, study: Study, *keys: str) -> dict[str, list[Any]]:
    """By method an entry of the attention statistics of every seed."""
    found = {}
    for run in study.runs:
        entries = [pipeline.scores(seed, run.name)["attention"] for seed in pipeline.seeds]
        for key in keys:
            entries = [entry[key] for entry in entries]
        found[run.name] = entries
    return found


def _mean_lines(pipeline: Pipeline, study: Study, *keys: str) -> dict[str, np.ndarray]:
    """The same, its mean over seeds."""
    entries = _attention(pipeline, study, *keys)
    return {name: np.mean(np.asarray(own, float), axis=0) for name, own in entries.items()}


def _fig1(pipeline: Pipeline, study: Study) -> Outcome:
    values = _attention(pipeline, study, "average_visual_share")
    sizes = {run.name: pipeline.trainable_in_llm(run.tuning) for run in study.runs}
    by_size = [_rank_correlation(sizes, values, n) for n in range(len(pipeline.seeds))]
    shares = {name: share.tolist() for name, share in _mean_lines(pipeline, study, "share").items()}
    points = {name: (sizes[name], float(np.mean(values[name]))) for name in values}
    label = "average share of attention on the image"
    sentences = [
        agreement("Share of the image", MORES, {"full": 0, "lora r=8": 0, MORES: 1}, values),
        compare_with(PLAIN, "Share of the image", values),
        "Rank correlation of the share with the number of tuned parameters, mean over seeds with "
        f"its 95% interval: {with_interval(by_size, 2)}; the paper's figure claims a negative one.",
    ]
    return Outcome(
        [values_table("Share of attention on the image", {"share": values}, PLAIN)],
        sentences,
        {"visual_share": values, "rank_correlation": by_size},
        {
            "attention by layer and method": plots.attention_shares(shares),
            "share of the image against parameters": plots.share_against_size(points, label),
        },
    )


def _rank_correlation(sizes: Mapping[str, int], values: Values, seed: int) -> float:
    """Spearman's correlation over methods; equal sizes share their rank."""

    def ranks(numbers: np.ndarray) -> np.ndarray:
        lower, same = numbers[:, None] > numbers, numbers[:, None] == numbers
        return lower.sum(1) + (same.sum(1) - 1) / 2

    size = np.asarray([sizes[name] for name in values], float)
    share = np.asarray([own[seed] for own in values.values()], float)
    return float(np.corrcoef(ranks(size), ranks(share))[0, 1])


def _fig4(pipeline: Pipeline, study: Study) -> Outcome:
    sizes = {run.name: pipeline.trainable_in_llm(run.tuning) for run in study.runs}
    by_task: dict[str, dict[str, list[float]]] = {family: {} for family in FAMILIES}
    for run in study.runs:
        entries = [pipeline.scores(seed, run.name)["scores"] for seed in pipeline.seeds]
        for family, own in by_task.items():
            own[run.name] = [entry[f"digits_{family}"]["score"] for entry in entries]
    means: Values = {
        name: np.mean([own[name] for own in by_task.values()], axis=0).tolist() for name in sizes
    }
    beaten = {
        name: [f for f, own in by_task.items() if _beaten(name, own, sizes)] for name in sizes
    }
    rows = [
        [name, f"{sizes[name]:,}", with_interval(means[name]), ", ".join(beaten[name]) or "none"]
        for name in sizes
    ]
    on, off = ([n for n in sizes if bool(_beaten(n, means, sizes)) == off] for off in (False, True))
    sentences = [
        f"Mean accuracy: no method with as few parameters or fewer was shown to be better than "
        f"{listed(on)}."
    ]
    if off:
        cases = [f"{name} ({listed(_beaten(name, means, sizes))})" for name in off]
        sentences.append(f"Smaller and better, with an interval above zero: for {listed(cases)}.")
    points = {name: (sizes[name], float(np.mean(means[name]))) for name in sizes}
    return Outcome(
        [
            Table(
                "Tuned parameters in the LLM, mean accuracy, and families of questions in which a "
                "method that is no larger was shown to be better",
                ["method", "parameters", "mean accuracy", "beaten in"],
                rows,
            )
        ],
        sentences,
        {"accuracy": by_task, "parameters": sizes},
        {"mean accuracy against parameters": plots.share_against_size(points, "mean accuracy")},
    )


def _beaten(name: str, values: Values, sizes: Mapping[str, int]) -> list[str]:
    """The methods that are no larger than one and were shown to be better."""
    others = [other for other in sizes if other != name and sizes[other] <= sizes[name]]
    pairs = {other: PairedDifference.of(values[other], values[name]) for other in others}
    return [other for other, found in pairs.items() if found.direction == "higher"]


def _fig2(pipeline: Pipeline, study: Study) -> Outcome:
    by_seed = _attention(pipeline, study, "lmar_of_means", "text")
    values = {name: [float(np.mean(line)) for line in own] for name, own in by_seed.items()}
    layers = range(len(by_seed[PLAIN][0]))
    rows = [
        [name, *(with_interval(layer, 2) for layer in zip(*own, strict=True))]
        for name, own in by_seed.items()
    ]
    claim = {name: float(name.startswith("mores")) for name in values if name != PLAIN}
    drawn = {name: np.mean(own, axis=0).tolist() for name, own in by_seed.items()}
    return Outcome(
        [
            values_table("LMAR, mean over layers (ratio of means)", {"LMAR": values}, PLAIN),
            Table("LMAR by layer, mean over seeds", ["method", *map(str, layers)], rows),
        ],
        [agreement("LMAR", MORES, claim, values), compare_with(PLAIN, "LMAR", values)],
        {"lmar": values, "lmar_by_layer": by_seed},
        {"LMAR by layer and method": plots.lmar_lines(drawn, "LMAR, ratio of means")},
    )


# Tables 3, 4 and 7 ------------------------------------------------------------------------------

# Scenes by the paper's name of a scale, and its means over SciQA-IMG, VizWiz and IconQA.
SCALES = {"Small": 50, "Medium": 250, "Large": 500}
TABLE_3 = {
    "Small": {"full": 51.0, "adapter": 70.3, "lora r=8": 72.2, "oft": 52.8, "ia3": 67.8},
    "Medium": {"full": 76.4, "adapter": 82.0, "lora r=8": 82.0, "oft": 58.8, "ia3": 79.9},
    "Large": {"full": 81.3, "adapter": 83.0, "lora r=8": 83.9, "oft": 58.1, "ia3": 80.7},
}
for _scale, _mean in {"Small": 67.6, "Medium": 79.5, "Large": 80.3}.items():
    TABLE_3[_scale]["mores r=2"] = _mean
_SCALED = tuple(
    Finetuning(f"{name}, {size} scenes", METHODS[name], {"data.size": size})
    for size in SCALES.values()
    for name in TABLE_3["Small"]
)


def _table3(pipeline: Pipeline, study: Study) -> Outcome:
    values = pipeline.accuracy(run.name for run in study.runs)
    columns, sentences = {}, []
    for scale, size in SCALES.items():
        ending = f", {size} scenes"
        own = {n.removesuffix(ending): v for n, v in values.items() if n.endswith(ending)}
        columns[f"{scale}, {size} scenes"] = own
        sentences.append(agreement(f"{scale}: accuracy", "full", TABLE_3[scale], own))
    tables = [values_table("Mean accuracy by number of training scenes", columns, "full")]
    return Outcome(tables, sentences, {"mean_accuracy": values})


TABLE_4 = {"lora r=8": 70.5, "adapter": 66.4, "oft": 69.1, "ia3": 71.8, MORES: 71.9}
TABLE_7 = {"mores r=1": 81.8, "mores r=2": 81.7, "mores r=4": 81.5, "mores r=8": 81.5}


def _table4(pipeline: Pipeline, study: Study) -> Outcome:
    return text_only(pipeline, study, MORES, TABLE_4)


def _table7(pipeline: Pipeline, study: Study) -> Outcome:
    return _accuracy(pipeline, study, MORES, TABLE_7)


def _paper(title: str, columns: Mapping[str, Mapping[str, float]]) -> Table:
    names = list(next(iter(columns.values())))
    rows = [[name, *(f"{own[name]:g}" for own in columns.values())] for name in names]
    return Table(f"The paper: {title}", ["method", *columns], rows)


STUDIES = (
    Study(
        "table1",
        "LLaVA Steering, Table 1: methods",
        _COMPARED,
        _paper("mean of seven benchmarks, 3B", {"Avg": TABLE_1}),
        "One task of seven question families stands for seven benchmarks. Rates of adapter, oft "
        f"and ranks 2 and 8 are not searched for. {THREE_LAYERS}",
        _table1,
    ),
    Study(
        "fig1",
        "LLaVA Steering, Figure 1: attention on the image",
        _COMPARED,
        claim(
            "MoReS uses visual representations more than full fine-tuning and LoRA do; methods "
            "with a higher visual share tend to have fewer parameters."
        ),
        THREE_LAYERS,
        _fig1,
    ),
    Study(
        "fig4",
        "LLaVA Steering, Figure 4: parameters against score",
        _COMPARED,
        claim("MoReS variants consistently achieve Pareto-optimal performance."),
        THREE_LAYERS,
        _fig4,
    ),
    Study(
        "fig2",
        "LLaVA Steering, Figure 2: LMAR",
        _COMPARED,
        claim("MoReS has the highest LMAR in most layers."),
        THREE_LAYERS,
        _fig2,
    ),
    Study(
        "table3",
        "LLaVA Steering, Table 3: sizes of training data",
        _SCALED,
        _paper("mean of SciQA-IMG, VizWiz and IconQA, 3B", TABLE_3),
        "The steps are the same for every size, so that few scenes come often. " + THREE_LAYERS,
        _table3,
    ),
    Study(
        "table4",
        "LLaVA Steering, Table 4: text-only tasks after tuning",
        runs_of(*TABLE_4),
        _paper("HellaSwag, 3B", {"HellaSwag": TABLE_4}),
        "The text task is what the LLM was trained on in stage 0.",
        _table4,
    ),
    Study(
        "table7",
        "LLaVA Steering, Table 7: subspace rank",
        runs_of(*TABLE_7),
        _paper("mean of four tasks, 3B", {"Avg": TABLE_7}),
        THREE_LAYERS,
        _table7,
    ),
)
