"""LLaVA Steering's tables about which tokens and layers are steered, on models that have enough.

Table 8 needs more visual tokens than the demo's 16, Tables 9 and 10 more layers than its 3.
"""

from collections.abc import Mapping
from typing import Any

from moresjax.studies.findings import compare_with
from moresjax.studies.pipeline import Finetuning, Pipeline, Variant
from moresjax.studies.printed import PRINTED
from moresjax.studies.study import Outcome, Study, Table, agreement, values_table

PLAIN = "connector only"

# Patches of 4 pixels instead of 8: 64 visual tokens, of which 1% is one.
_PATCHES = {"model.vision.patch_size": 4}
TOKENS = Variant(
    "64-tokens",
    {
        "vit": _PATCHES | {"data.patch_size": 4},
        "pretrain": _PATCHES | {"max_seq_len": 25 + 48},
        "finetune": _PATCHES | {"max_seq_len": 64 + 48},
    },
)
# Narrower than the demo's LLM, so that a step takes about as long.
_LAYERS: Mapping[str, Any] = {
    "model.llm.num_layers": 8,
    "model.llm.hidden_size": 64,
    "model.llm.intermediate_size": 128,
    "model.llm.num_heads": 4,
}
STEPS = {"steps": 80}  # half of the demo's, for time
LAYERS = Variant("8-layers", {"llm": _LAYERS, "pretrain": _LAYERS, "finetune": _LAYERS})


def _averages(table: str, *names: str) -> dict[str, float]:
    """The means of a table's rows, which are in the order of the names."""
    rows = PRINTED["llava-steering", table].values()
    return {name: row["Avg"] for name, row in zip(names, rows, strict=True)}


# Scores of four tasks, 3B, in Table 8; means of seven benchmarks in Tables 9 and 10.
TABLE_8 = PRINTED["llava-steering", "8"]
TABLE_9 = _averages("9", "every:2", "every:3", "every:4", "all")
TABLE_10 = _averages("10", "shallow", "middle", "deep", "all")
_MEAN_8 = {ratio: round(sum(scores.values()) / 4, 1) for ratio, scores in TABLE_8.items()}


def _compare(
    pipeline: Pipeline, study: Study, base: str, paper: Mapping[str, float], what: str
) -> Outcome:
    """Mean accuracy by what is steered, beside tuning the connector alone."""
    values = pipeline.accuracy(run.name for run in study.runs)
    steered = {name.removeprefix(f"{what} "): own for name, own in values.items() if name != PLAIN}
    return Outcome(
        [values_table("Mean accuracy", {"accuracy": values}, f"{what} {base}")],
        [
            agreement("Mean accuracy", base, paper, steered),
            compare_with(base, "Mean accuracy", steered),
            compare_with(PLAIN, "Mean accuracy", values),
        ],
        {"mean_accuracy": values},
    )


def _table8(pipeline: Pipeline, study: Study) -> Outcome:
    return _compare(pipeline, study, "1%", _MEAN_8, "tokens")


def _table9(pipeline: Pipeline, study: Study) -> Outcome:
    return _compare(pipeline, study, "all", TABLE_9, "layers")


def _table10(pipeline: Pipeline, study: Study) -> Outcome:
    return _compare(pipeline, study, "all", TABLE_10, "layers")


def _steered_layers(*choices: str) -> tuple[Finetuning, ...]:
    spec = "mores:rank=2,positions=image,init=identity"
    own = [Finetuning(f"layers {c}", f"{spec},layers={c}", STEPS) for c in choices]
    return (Finetuning(PLAIN, "none", STEPS), *own)


_STEERED_TOKENS = (
    Finetuning(PLAIN, "none"),
    *(
        Finetuning(f"tokens {r}", f"mores:rank=1,positions=image:{r},init=identity")
        for r in TABLE_8
    ),
)
_LAYER_LIMITS = (
    "8 layers of 64 features, 80 steps of stage 2, rates not searched for. What the last layer "
    "makes of visual tokens is read by nothing, so it counts as steered but never moves."
)


def _rows(paper: Mapping[str, float]) -> list[list[str]]:
    return [[name, f"{score:g}"] for name, score in paper.items()]


STUDIES = (
    Study(
        "table8",
        "LLaVA Steering, Table 8: share of steered visual tokens",
        _STEERED_TOKENS,
        Table(
            "The paper: 3B, f4+l5 as 1%",
            ["tokens", *TABLE_8["1%"], "mean"],
            [
                [r, *(f"{x:g}" for x in own.values()), f"{_MEAN_8[r]:g}"]
                for r, own in TABLE_8.items()
            ],
        ),
        "64 visual tokens (patches of 4 pixels): 1% is the last token alone, which shows a 4 x 4 "
        "corner of the scene; in the paper it is 9 of 729.",
        _table8,
        more_minutes=1.0,
        variant=TOKENS,
        factor=2.0,
    ),
    Study(
        "table9",
        "LLaVA Steering, Table 9: steering every second, third and fourth layer",
        _steered_layers(*TABLE_9),
        Table("The paper: mean of seven benchmarks, 3B", ["layers", "Avg"], _rows(TABLE_9)),
        _LAYER_LIMITS,
        _table9,
        more_minutes=1.1,
        variant=LAYERS,
        factor=0.7,
    ),
    Study(
        "table10",
        "LLaVA Steering, Table 10: steering shallow, middle and deep layers",
        _steered_layers(*TABLE_10),
        Table("The paper: mean of seven benchmarks, 3B", ["layers", "Avg"], _rows(TABLE_10)),
        _LAYER_LIMITS,
        _table10,
        more_minutes=1.1,
        variant=LAYERS,
        factor=0.7,
    ),
)
