"""The papers' tables as lists of tasks, and results as text in their column order."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Preset:
    """A table of a paper.

    Attributes:
      columns: header -> (benchmark, name of the detail to print, or nothing for its score).
      average: header of the mean over columns, if there is one.
      skipped: columns that the mean leaves out.
    """

    columns: Mapping[str, tuple[str, str]]
    average: str = ""
    skipped: tuple[str, ...] = ()


PRESETS = {
    "mores-table1": Preset(
        {
            "VQAv2": ("vqav2", ""),
            "GQA": ("gqa", ""),
            "TextVQA": ("textvqa", ""),
            "SciQA-IMG": ("scienceqa_img", ""),
            "POPE": ("pope", ""),
            "MM-Vet": ("mm_vet", ""),
            "MMMU": ("mmmu", ""),
        },
        "Avg",
    ),
    "mores-table2": Preset(
        {
            "SciQA-IMG": ("scienceqa_img_ft", ""),
            "VizWiz": ("vizwiz_ft", ""),
            "IconQA-txt": ("iconqa_txt", ""),
            "IconQA-blank": ("iconqa_blank", ""),
        }
    ),
    "mores-table6": Preset(
        {
            "POPE Acc": ("pope", ""),
            "Hard Acc": ("hallusionbench", "hard aAcc"),
            "Figure Acc": ("hallusionbench", "fAcc"),
            "Question Acc": ("hallusionbench", ""),
        }
    ),
    "mrt-table1": Preset(
        {
            "MME": ("mme", ""),
            "Text-VQA": ("textvqa_judged", ""),
            "VSR": ("vsr", ""),
            "SNLI-VE": ("snli_ve", ""),
            "CIFAR-10": ("cifar10", ""),
            "CIFAR-100": ("cifar100", ""),
            "MNIST": ("mnist", ""),
            "POPE": ("pope", ""),
        },
        "MMAvg",
        ("MME",),
    ),
}


def expand(names: Sequence[str]) -> list[str]:
    """Benchmarks, each once, with presets replaced by theirs."""
    found = [
        benchmark
        for name in names
        for benchmark in (
            [benchmark for benchmark, _ in PRESETS[name].columns.values()]
            if name in PRESETS
            else [name]
        )
    ]
    return list(dict.fromkeys(found))


def table(scores: Mapping[str, Mapping], names: Sequence[str] = ()) -> str:
    """Results as text: a line per task, then a line per preset among the names.

    Args:
      scores: of an `EvaluationResult`.
      names: what was asked for.
    """
    lines = [_line(name, entry) for name, entry in scores.items()]
    for name in names:
        if name in PRESETS:
            headers, numbers = _row(PRESETS[name], scores)
            widths = [max(len(header), 6) for header in headers]
            lines += ["", name]
            for cells in (headers, numbers):
                pairs = zip(cells, widths, strict=True)
                lines.append("  ".join(f"{cell:>{width}}" for cell, width in pairs))
    return "\n".join(lines)


def _line(name: str, entry: Mapping) -> str:
    value, error = entry["score"], entry["stderr"]
    number = "no score" if value is None else f"{value:.3f}"
    spread = "" if error is None else f" +- {error:.3f}"
    facts = [entry["metric"], f"n = {entry['n']}"]
    if entry["missing"]:
        facts.append(f"{entry['missing']} missing")
    if "judge" in entry:
        facts.append(f"judge: {entry['judge']['name']}")
    return f"{name:24s} {number}{spread}  ({', '.join(facts)})"


def _row(preset: Preset, scores: Mapping[str, Mapping]) -> tuple[list[str], list[str]]:
    numbers = {}
    for header, (benchmark, detail) in preset.columns.items():
        entries = [entry for entry in scores.values() if entry["benchmark"] == benchmark]
        values = [entry["details"].get(detail) if detail else _percent(entry) for entry in entries]
        known = bool(values) and None not in values
        numbers[header] = statistics.fmean(values) if known else None
    if preset.average:
        parts = [value for header, value in numbers.items() if header not in preset.skipped]
        numbers[preset.average] = None if None in parts else statistics.fmean(parts)
    return list(numbers), ["-" if x is None else f"{x:.1f}" for x in numbers.values()]


def _percent(entry: Mapping) -> float | None:
    """The score in percent, or in the benchmark's points."""
    points = entry["score"] is None or entry["stderr"] is None
    return entry["score"] if points else 100 * entry["score"]
