"""LLaVA Steering's tables about single tasks and about hallucination, on the digits world."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moresjax.evaluation.benchmarks.pope import KINDS
from moresjax.studies.findings import compare_with
from moresjax.studies.llava_steering import METHODS, THREE_LAYERS, runs_of
from moresjax.studies.pipeline import Finetuning, Pipeline
from moresjax.studies.printed import PRINTED
from moresjax.studies.study import Outcome, Study, Table, Values, agreement, values_table

# Table 2: one task each -------------------------------------------------------------------------

_NAMES_2 = {
    "adapter": "Adapter",
    "lora r=8": "LoRA",
    "oft": "OFT",
    "ia3": "IA3",
    "mores r=1": "MoReS-B",
}
TABLE_2 = {
    name: PRINTED["llava-steering", "2"][f"LLaVA Steering-3B {row}"]
    for name, row in _NAMES_2.items()
}
_MEAN_2 = {name: sum(scores.values()) / 4 for name, scores in TABLE_2.items()}
FAMILIES = ("count", "compare", "largest", "smallest")
# One question per scene leaves rows of 16 visual tokens and a question; fewer steps are enough.
_ONE = {"data.questions": 1, "max_seq_len": 28, "steps": 100}
_ONE_TASK = tuple(
    Finetuning(f"{name}, {family}", METHODS[name], _ONE | {"data.families": (family,)})
    for name in TABLE_2
    for family in FAMILIES
)


def _table2(pipeline: Pipeline, study: Study) -> Outcome:
    columns: dict[str, dict[str, list[float]]] = {family: {} for family in FAMILIES}
    for family, own in columns.items():
        for name in TABLE_2:
            found = [
                pipeline.scores(seed, f"{name}, {family}", only=f"digits_{family}")
                for seed in pipeline.seeds
            ]
            own[name] = [entry["mean_accuracy"] for entry in found]
    means: Values = {
        name: np.mean([own[name] for own in columns.values()], axis=0).tolist() for name in TABLE_2
    }
    base = "mores r=1"
    return Outcome(
        [values_table("Accuracy by task", {**columns, "mean": means}, base)],
        [
            agreement("Mean accuracy", base, _MEAN_2, means),
            *(
                compare_with(base, f"Accuracy on {family!r}", own)
                for family, own in columns.items()
            ),
        ],
        {"accuracy": columns, "mean": means},
    )


# Table 6: hallucination -------------------------------------------------------------------------

_NAMES_6 = {
    "full": "Full",
    "lora r=8": "LoRA",
    "adapter": "Adapter",
    "oft": "OFT",
    "ia3": "IA3",
    "mores r=4": "MoReS",
}
TABLE_6 = {name: PRINTED["llava-steering", "6"][row] for name, row in _NAMES_6.items()}
_GROUPS = {"Hard Acc": "hard aAcc", "Figure Acc": "fAcc", "Question Acc": "qAcc"}
ASKED = 100  # scenes of either benchmark
COLUMNS_6 = ("POPE Acc", *_GROUPS)


def _table6(pipeline: Pipeline, study: Study) -> Outcome:
    found: dict[str, dict[str, list[float]]] = {name: {} for name in (*COLUMNS_6, *_POPE)}
    pipeline = dataclasses.replace(pipeline, scenes=ASKED)
    for run in study.runs:
        rows = [_hallucination(pipeline, seed, run.name) for seed in pipeline.seeds]
        for name, own in found.items():
            own[run.name] = [row[name] for row in rows]
    base = "mores r=4"
    sentences = [
        agreement(name, base, {n: row[name] for n, row in TABLE_6.items()}, found[name])
        for name in COLUMNS_6
    ]
    return Outcome(
        [
            values_table("Hallucination", {name: found[name] for name in COLUMNS_6}, base),
            values_table("POPE by kind of absent digits", {n: found[n] for n in _POPE}, base),
        ],
        [*sentences, *(compare_with(base, name, found[name]) for name in COLUMNS_6)],
        found,
    )


_POPE = (*KINDS, "share of yes")


def _hallucination(pipeline: Pipeline, seed: int, name: str) -> Mapping[str, float]:
    """A model's numbers, as shares."""
    pope = pipeline.scores(seed, name, benchmark="digits_pope")["scores"]
    pairs = pipeline.scores(seed, name, benchmark="digits_hallusion")["scores"]
    groups = pairs["digits_hallusion"]["details"]
    by_kind = {kind: pope[f"digits_pope_{kind}"] for kind in KINDS}
    yes = [entry["details"]["yes_ratio"] for entry in by_kind.values()]
    return {
        "POPE Acc": float(np.mean([entry["score"] for entry in by_kind.values()])),
        **{column: groups[key] / 100 for column, key in _GROUPS.items()},
        **{kind: entry["score"] for kind, entry in by_kind.items()},
        "share of yes": float(np.mean(yes)),
    }


def _paper(rows: Mapping[str, Mapping[str, float]]) -> Table:
    cells = [[name, *(f"{score:g}" for score in own.values())] for name, own in rows.items()]
    return Table("The paper: 3B", ["method", *next(iter(rows.values()))], cells)


STUDIES = (
    Study(
        "table2",
        "LLaVA Steering, Table 2: one task each",
        _ONE_TASK,
        _paper(TABLE_2),
        "A task is one family of questions, one question per scene and 100 steps; the paper's "
        "tasks have nothing in common with these but that each is tuned on alone. Rates are those "
        f"of the mixture. {THREE_LAYERS}",
        _table2,
        factor=0.4,
    ),
    Study(
        "table6",
        "LLaVA Steering, Table 6: hallucination",
        runs_of(*TABLE_6),
        _paper(TABLE_6),
        "POPE asks which digits are in a scene; adversarial digits look like one that is there. "
        "HallusionBench's questions come in pairs, about a scene and about the same with one digit "
        "exchanged; its questions that need no figure have no counterpart here.",
        _table6,
        more_minutes=0.6,
    ),
)
