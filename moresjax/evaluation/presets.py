"""The papers' tables as lists of tasks, and results as text in their column order."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """A table of a paper.

    Attributes:
      columns: Header -> (benchmark, name of the detail to print, or an empty one for its score).
      average: The header of the mean over columns, if there is one.
      skipped: Headers of the columns that the mean leaves out.
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
            "MME": ("mme_sampled", ""),
            "Text-VQA": ("textvqa_judged", ""),
            "VSR": ("vsr", ""),
            "SNLI-VE": ("snli_ve", ""),
            "CIFAR-10": ("cifar10", ""),
            "CIFAR-100": ("cifar100", ""),
            "MNIST": ("mnist", ""),
            "POPE": ("pope_judged", ""),
        },
        "MMAvg",
        ("MME",),
    ),
}


_BY_RULE = "*"  # marks the cells that a rule graded in the place of a judge


def expand_presets(names: Sequence[str]) -> list[str]:
    """Names of tasks, each once, with presets replaced by their benchmarks.

    >>> expand_presets(["gqa", "mores-table6", "pope"])
    ['gqa', 'pope', 'hallusionbench']
    """
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


def table(
    scores: Mapping[str, Mapping],
    names: Sequence[str] = (),
    not_run: Mapping[str, str] | None = None,
) -> str:
    """Results as text: a line per task, then the columns of every preset among the names.

    Args:
      scores: The scores of an `EvaluationResult`.
      names: The names that the evaluation was asked for.
      not_run: By benchmark why it was not run.
    """
    lines = [line for name, entry in scores.items() for line in _lines(name, entry)]
    lines += [f"{name:24s} not run: {reason}" for name, reason in (not_run or {}).items()]
    for name in names:
        if name in PRESETS:
            headers, numbers = _row(PRESETS[name], scores)
            widths = [max(len(header), 6) for header in headers]
            lines += ["", name]
            for cells in (headers, numbers):
                pairs = zip(cells, widths, strict=True)
                lines.append("  ".join(f"{cell:>{width}}" for cell, width in pairs))
            if any(number.endswith(_BY_RULE) for number in numbers):
                lines.append(f"{_BY_RULE} graded by a rule, not by a judge: no published number")
    return "\n".join(lines)


def _lines(name: str, entry: Mapping) -> list[str]:
    """The line of a task, and one for each of its groups."""
    groups = entry.get("details", {}).get("groups", {})
    return [
        _line(name, entry),
        *(
            f"  {group:22s} {_number(x)}  (n = {x['n']}, majority {x['majority']:.3f})"
            for group, x in groups.items()
        ),
    ]


def _line(name: str, entry: Mapping) -> str:
    facts = [entry["metric"], f"n = {entry['n']}"]
    error, details = entry["stderr"], entry.get("details", {})
    if error is not None and "stderr_kind" in entry:
        images = f" in {entry['clusters']} groups" if entry["stderr_kind"] != "i.i.d." else ""
        facts.append(f"standard error {entry['stderr_kind']}{images}")
    if entry["missing"]:
        facts.append(f"{entry['missing']} missing, counted as wrong")
    if "decoding" in entry:
        facts.append(entry["decoding"])
    if "judge" in entry:
        facts.append(f"judge: {entry['judge']['name']}")
    if "majority" in details:
        facts.append(f"majority {details['majority']:.3f}")
    if unknown := details.get("without_answer"):
        facts.append(f"{unknown} without an answer: nothing is scored")
    return f"{name:24s} {_number(entry)}  ({', '.join(facts)})"


def _number(entry: Mapping[str, Any]) -> str:
    """A score with its standard error and interval."""
    value, error = entry["score"], entry["stderr"]
    number = "no score" if value is None else f"{value:.3f}"
    spread = "" if error is None else f" +- {error:.3f}"
    if entry.get("interval95"):  # results of version 0.2 have none
        low, high = entry["interval95"]
        spread += f", 95% in {low:.3f} to {high:.3f}"
    return number + spread


def column_values(names: Sequence[str], scores: Mapping[str, Mapping]) -> dict[str, float | None]:
    """The numbers of presets and benchmarks, in percent or points, None where one is missing.

    Args:
      names: The names that an evaluation was asked for.
      scores: The scores of its `EvaluationResult`.

    Returns:
      For a preset its columns by header, for another name its mean over tasks.
    """
    found: dict[str, float | None] = {}
    for name in names:
        if name in PRESETS:
            found |= _numbers(PRESETS[name], scores)[0]
        else:
            own = [entry for key, entry in scores.items() if name in (key, entry.get("benchmark"))]
            found[name] = _mean_of_known([_percent(entry) for entry in own])
    return found


def _row(preset: Preset, scores: Mapping[str, Mapping]) -> tuple[list[str], list[str]]:
    """The headers of a preset, and its numbers as text."""
    numbers, by_rule = _numbers(preset, scores)
    texts = {header: "-" if x is None else f"{x:.1f}" for header, x in numbers.items()}
    marks = {
        header: _BY_RULE if header in by_rule and texts[header] != "-" else "" for header in texts
    }
    return list(texts), [text + marks[header] for header, text in texts.items()]


def _numbers(
    preset: Preset, scores: Mapping[str, Mapping]
) -> tuple[dict[str, float | None], set[str]]:
    """The numbers of a preset by header, and the headers that a rule graded."""
    numbers, by_rule = {}, set()
    for header, (benchmark, detail) in preset.columns.items():
        entries = [entry for entry in scores.values() if entry["benchmark"] == benchmark]
        numbers[header] = _mean_of_known(
            [entry["details"].get(detail) if detail else _percent(entry) for entry in entries]
        )
        if any(entry.get("judge", {}).get("name") == "rule" for entry in entries):
            by_rule.add(header)
    if preset.average:
        columns = [value for header, value in numbers.items() if header not in preset.skipped]
        numbers[preset.average] = _mean_of_known(columns)
        if by_rule - {*preset.skipped}:
            by_rule.add(preset.average)
    return numbers, by_rule


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean, if there are values and all of them are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _percent(entry: Mapping[str, Any]) -> float | None:
    """The score in percent, or in the benchmark's points."""
    score = entry["score"]
    points = entry.get("points", entry["stderr"] is None)
    return score if score is None or points else 100 * score
