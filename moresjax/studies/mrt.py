"""MRT's Table 1 and its ablations (arXiv 2503.00723) on the digits world.

As in the paper the connector trains with the baselines and is frozen under MRT and ReFT, whose
editors train alone. Numbers of the paper are points of MME.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from moresjax.configs import digits as recipe  # pyright: ignore[reportMissingImports]
from moresjax.evaluation.statistics import mean_with_interval
from moresjax.reports.ablations import part_scores, rank_map
from moresjax.studies.findings import compare_with
from moresjax.studies.pipeline import ZERO_SHOT, Finetuning, Pipeline
from moresjax.studies.printed import PRINTED
from moresjax.studies.study import Outcome, Study, Table, Values, agreement, values_table

MRT, RATE = "mrt", 1e-2
# Editors train alone, and start as in the paper.
_ALONE: Mapping[str, Any] = {
    "also_train": (),
    "optimizer.lr": RATE,
    "optimizer.lr_by_component": "",
}
_LIMITS = (
    "Three layers of 96 features, two of 64 in the encoder and questions of seven tokens or so, of "
    "which prefix and suffix take half each: the miniature says nothing about 32 layers, nor about "
    "ranks beside thousands of features. MRT's rate is that of the demo's MoReS, not searched for."
)


def _editors(name: str, keys: str = "") -> Finetuning:
    return Finetuning(name, f"mrt:{keys}" if keys else "mrt", _ALONE)


# Table 1 ----------------------------------------------------------------------------------------

_NAMES = {
    ZERO_SHOT: "LLaVAAlign",
    "full": "LLaVAFT",
    "lora r=8": "LoRA",
    "aprompt": "APrompt",
    "ptum": "PTUM",
    "vpt": "VPT",
    "reft": "ReFT",
    "m2pt": "M2PT",
    "mixlora": "MixLoRA",
    MRT: "MRT",
}
TABLE_1 = {name: PRINTED["mrt", "1"][row] for name, row in _NAMES.items()}
_TUNINGS = {
    "full": recipe.METHODS["full"],
    "lora r=8": recipe.METHODS["lora r=8"],
    "aprompt": "aprompt:length=4,kv_length=2",
    "ptum": "ptum:length=4",
    "vpt": "vpt:length=4",
    "m2pt": "m2pt:visual_length=4,length=4",
    "mixlora": "mixlora:factors=8,rank=4",
}
_BASELINES = (
    *(Finetuning(name, tuning) for name, tuning in _TUNINGS.items()),
    _editors("reft", "groups=prefix;suffix"),
    _editors(MRT),
)


def _table1(pipeline: Pipeline, study: Study) -> Outcome:
    values = pipeline.accuracy(TABLE_1)
    paper = {name: scores["MME"] for name, scores in TABLE_1.items()}
    sentences = [
        agreement("Mean accuracy", MRT, paper, values),
        compare_with(MRT, "Mean accuracy", values),
    ]
    tables = [values_table("Mean accuracy", {"accuracy": values}, MRT)]
    return Outcome(tables, sentences, {"mean_accuracy": values})


# Ablations --------------------------------------------------------------------------------------

RANKS = (2, 4, 6, 8)
LONGEST = 7  # tokens of a question of the digits world
_SAME_LENGTHS = (
    f"A question has five to {LONGEST} tokens, of which prefix and suffix take at most half each: "
    f"all lengths from {LONGEST // 2} are the same edits, so that of the paper's 2, 4, 6, 8 and 10 "
    "all but 2 are `mrt` itself, and 2 differs on the two families with longer questions alone. Of "
    "the paper's ranks 2 to 8 every second one is here."
)


def _ranks_row(visual: int, rank: int) -> str:
    return f"visual {visual}, multimodal {rank}"


def _printed_ranks(visual: int, rank: int) -> float | None:
    return PRINTED["mrt", "Figure 4"].get(_ranks_row(visual, rank), {}).get("mme_sampled")


BEST_RANKS = (6, 4)  # those of `mrt`
_GRID = [(v, r) for v in RANKS for r in RANKS if (v, r) != BEST_RANKS]
# By ablation and row: the keys of `mrt`, and the paper's MME; None where a figure shows no number.
ABLATIONS: Mapping[str, Mapping[str, tuple[str, float | None]]] = {
    "ranks (Figure 4)": {
        _ranks_row(v, r): (f"rank={r},visual_rank={v}", _printed_ranks(v, r)) for v, r in _GRID
    },
    "components (Figure 6, Table S6)": {
        "without vision": ("groups=connector;prefix;suffix", None),
        "without connector": ("groups=visual;prefix;suffix", None),
        "without multimodal": ("groups=visual;connector", 1358.0),
        "LLM alone": ("groups=prefix;suffix", 1473.25),
        "connector alone": ("groups=connector", 1165.33),
        "vision alone": ("groups=visual", 1342.46),
    },
    "depth (Table 3)": {
        "first layer": ("layers=0,visual_layers=0", 1329.84),
        "odd layers": ("layers=every:2,visual_layers=every:2", 1468.21),
        "first half": ("layers=0-1,visual_layers=0", 1440.32),
        "latter half": ("layers=1-2,visual_layers=1", 1447.41),
    },
    "length (Figure 6)": {"length 2": ("length=2", None)},
    "segments (Table S3)": {
        "prefix alone": ("groups=visual;connector;prefix", 1465.32),
        "suffix alone": ("groups=visual;connector;suffix", 1497.35),
        "all text tokens": ("text=all", 1233.90),
    },
}
# Ranks, components, depth and segments of the paper's best are those of `mrt` itself.
_BEST = 1580.40
_LENGTH_6 = PRINTED["mrt", "Figure 6"]["length 6"]["MME"]
_ROWS = {row: keys for rows in ABLATIONS.values() for row, (keys, _) in rows.items()}


def _run(row: str) -> str:
    """The name of a row's runs; ReFT of Table 1 is MRT's editors in the LLM."""
    return "reft" if row == "LLM alone" else f"mrt, {row}"


def _title(what: str) -> str:
    return what[0].upper() + what[1:]


def _ablations(pipeline: Pipeline, study: Study) -> Outcome:
    accuracy = pipeline.accuracy({MRT, *(run.name for run in study.runs)})
    found = {MRT: accuracy[MRT]}
    tables, sentences = [], []
    for what, rows in ABLATIONS.items():
        there = [row for row in rows if _run(row) in accuracy]
        if not there:
            continue
        values = {MRT: accuracy[MRT]} | {row: accuracy[_run(row)] for row in there}
        found |= values
        tables.append(values_table(_title(what), {"accuracy": values}, MRT))
        printed = {row: rows[row][1] for row in there}
        paper = {row: mme for row, mme in printed.items() if mme is not None}
        if paper:
            title = f"{_title(what).partition(' (')[0]}: accuracy"
            sentences.append(agreement(title, MRT, {MRT: _BEST} | paper, values))
        sentences.append(compare_with(MRT, _title(what), values))
    return Outcome(tables, sentences, {"mean_accuracy": found}, _figures(found))


def _figures(found: Values) -> dict[str, Figure]:
    """The miniature's figures 4 and 6, of the rows that there are."""
    figures: dict[str, Figure] = {}
    rows = {ranks: _ranks_row(*ranks) for ranks in _GRID}
    grid = {ranks: fmean(found[row]) for ranks, row in rows.items() if row in found}
    if grid:
        grid[BEST_RANKS] = fmean(found[MRT])
        figures["Figure 4: mean accuracy by ranks"] = rank_map(grid, "mean accuracy")
    panels = {}
    for what, every in ABLATIONS.items():
        there = [row for row in every if row in found]
        if there and "Figure 6" in what:
            own = {row: mean_with_interval(found[row]) for row in (MRT, *there)}
            panels[what.partition(" (")[0]] = own
    if panels:
        name = "Figure 6: mean accuracy by editors and length"
        label = "mean accuracy, with its 95% interval"
        figures[name] = part_scores(panels, label, fmean(found[MRT]))
    return figures


def _printed() -> Table:
    rows = [
        [what, row, f"{mme:.2f}" if mme else "no number in the figure"]
        for what, own in ABLATIONS.items()
        for row, (_, mme) in own.items()
    ]
    same = ["length (Figure 6)", "length 6, here as MRT", f"{_LENGTH_6:.2f}"]
    head = ["ablation", "row", "MME"]
    return Table("The paper", head, [["", "MRT", f"{_BEST:.2f}"], *rows, same])


STUDIES = (
    Study(
        "mrt-table1",
        "MRT, Table 1: methods",
        _BASELINES,
        Table(
            "The paper",
            ["method", "MME", "MMAvg"],
            [[name, f"{s['MME']:.2f}", f"{s['MMAvg']:.2f}"] for name, s in TABLE_1.items()],
        ),
        "Lengths of prompts and pools are small, and no rate but those of full and lora is "
        f"searched for. {_LIMITS}",
        _table1,
    ),
    Study(
        "mrt-ablations",
        "MRT, Figures 4 and 6, Tables 3, S3 and S6: ablations",
        (_editors(MRT), *(_editors(_run(row), keys) for row, keys in _ROWS.items())),
        _printed(),
        f"{_SAME_LENGTHS} {_LIMITS}",
        _ablations,
        in_parts=True,
    ),
)
