"""What is known of runs: gathered from their folders into one structure, which a report shows.

A run's own folder tells its model, tuning and training; folders of `evaluate`, inside of it or
elsewhere, its scores and attention; folders of `analyze attention` the attention of several models.
What belongs to one model is put together.

Axis legend: L layers, N heads, C groups of tokens.
"""

import dataclasses
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError
from moresjax.core.folders import named_folder
from moresjax.core.json_files import read_log, read_object
from moresjax.core.plugins import explain_missing
from moresjax.core.reading import LARGE, check, read_json
from moresjax.evaluation.attention_log import (
    LOG,
    MAPS,
    SUMMARY,
    AnswerOnImage,
    read_maps,
)
from moresjax.evaluation.predictions import FILE, row_key
from moresjax.evaluation.results import RESULTS
from moresjax.evaluation.rows import (
    AttentionEntry,
    AttentionRow,
    PredictionRow,
    ReportedResults,
)
from moresjax.evaluation.tasks import default_split, named_splits
from moresjax.evaluation.validation import NAME as VALIDATION
from moresjax.models.count import ParameterReport, count_parameters
from moresjax.runs.architecture import model_config
from moresjax.runs.config import read_config
from moresjax.runs.paths import is_workdir
from moresjax.runs.run_config import RunConfig

METRICS = "metrics.jsonl"
CURVES = {"loss": "training", "validation_loss": "validation"}
Question = tuple[str, str, str]  # task, id and prompt


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A run's score in a task.

    Attributes:
      score: None where only a server or a judge could tell.
      interval: The 95% confidence interval, where there is one.
      n: The number of questions.
      fraction: Whether the score is a share of what is right.
      split: The split of the data that was asked.
      prompt_hash: Tells whether two runs were asked the same.
      facts: The entry of `results.json`.
    """

    score: float | None
    interval: tuple[float, float] | None
    n: int
    fraction: bool
    split: str | None
    prompt_hash: str
    facts: Mapping[str, Any] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Attention:
    """A run's attention statistics, as `AttentionSummary` defines them.

    Attributes:
      share: Attention on each group of tokens `[L, C]`.
      by_head: Attention of every head on the image `[L, N]`; None where it was not kept.
      lmar: The ratio of means `[L]`.
      samples: The number of answers.
      tasks: The tasks that they are of, with the number of questions, and the share where known.
      split: The split of each of them.
    """

    share: Float[np.ndarray, "L C"]
    by_head: Float[np.ndarray, "L N"] | None
    lmar: Float[np.ndarray, " L"]
    samples: int
    tasks: Mapping[str, Mapping[str, Any]]
    groups: Sequence[str]

    @property
    def visual_share(self) -> float:
        """Share of attention on the image, mean over layers."""
        return float(self.share[:, self.groups.index("image")].mean())


@dataclasses.dataclass(frozen=True)
class AskedQuestion:
    """What is known of a run's answer to a question: score, visual share, names of its images."""

    score: float | None
    share: float | None
    images: tuple[str, ...] | None


@dataclasses.dataclass
class ReportedRun:
    """A model with everything that folders say of it; what no folder says is None or empty.

    Attributes:
      name: The name that tells it from the others.
      folder: The folder of the model, or of what is known of it.
      config: The configuration, of a run's own folder.
      parameters: The number of its parameters.
      adapter: What was put on the model of `folder` when it was asked, if anything was.
      template: The template that it was asked with.
      tasks: Its scores.
      attention: Its attention statistics.
      curves: By name steps and values of what was logged while it trained.
      maps: Where some answers looked on their images.
      answers: Its answers to single questions.
      asked: The folders of evaluations that are shown.
    """

    name: str
    folder: Path
    config: RunConfig | None = None
    parameters: ParameterReport | None = None
    adapter: str = ""
    template: str = ""
    tasks: dict[str, TaskResult] = dataclasses.field(default_factory=dict)
    attention: Attention | None = None
    curves: dict[str, tuple[list[int], list[float]]] = dataclasses.field(default_factory=dict)
    maps: list[AnswerOnImage] = dataclasses.field(default_factory=list)
    answers: dict[Question, AskedQuestion] = dataclasses.field(default_factory=dict)
    asked: list[Path] = dataclasses.field(default_factory=list)

    @property
    def has_model(self) -> bool:
        """Whether the folder holds a model that can be asked."""
        return self.config is not None or (self.folder / "config.json").is_file()

    @property
    def tuning(self) -> str:
        """What was tuned."""
        if self.adapter:
            return self.adapter
        return "" if self.config is None else self.config.tuning

    @property
    def mean_accuracy(self) -> float | None:
        """The mean over tasks; None unless each is a share of what is right."""
        scores = [task.score for task in self.tasks.values() if task.fraction]
        if not scores or len(scores) < len(self.tasks) or None in scores:
            return None
        return float(np.mean([score for score in scores if score is not None]))

    def add(self, other: "ReportedRun") -> None:
        """Takes over what another folder says of the same model; what is known stays."""
        self.config, self.parameters = (
            self.config or other.config,
            self.parameters or other.parameters,
        )
        self.template, self.attention = (
            self.template or other.template,
            self.attention or other.attention,
        )
        self.maps, self.curves = self.maps or other.maps, self.curves or other.curves
        self.tasks, self.answers = other.tasks | self.tasks, other.answers | self.answers
        self.asked += other.asked


def gather(folders: Sequence[str]) -> list[ReportedRun]:
    """Everything that is known of runs.

    Args:
      folders: Folders of runs, of evaluations, of `analyze attention`, or with such folders in
        them, each with a name of its own before it where one is wanted (`NAME=DIR`).

    Raises:
      UserError: A folder is none of these, or holds a damaged file.
    """
    found: dict[tuple[str, ...], ReportedRun] = {}
    for value in folders:
        name, folder = named_folder(str(value))
        for key, run in _read(Path(folder), name):
            if key in found:
                found[key].add(run)
            else:
                found[key] = run
    if not found:
        raise UserError("a report needs at least one folder of a run or of an evaluation")
    _tell_apart(list(found.values()))
    return list(found.values())


Keyed = tuple[tuple[str, ...], ReportedRun]


def _read(folder: Path, name: str) -> list[Keyed]:
    """What a folder tells, with what it tells it of."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to report on")
    if is_workdir(folder):
        return _run_with_evaluations(folder, name)
    if _is_evaluation(folder):
        return [_evaluation(folder, name)]
    if (folder / SUMMARY).is_file():
        return _analysis(folder)
    inside = [
        found
        for child in sorted(folder.iterdir())
        if child.is_dir() and (is_workdir(child) or _is_evaluation(child) or _evaluations(child))
        for found in _read_child(child)
    ]
    if not inside:
        raise UserError(
            f"{folder} holds no run, no evaluation and no attention statistics: give folders of "
            "`moresjax train`, `evaluate --out` or `analyze attention --out`"
        )
    return inside


def _read_child(folder: Path) -> list[Keyed]:
    if is_workdir(folder) or _is_evaluation(folder):
        return _read(folder, "")
    return [_evaluation(child, folder.name) for child in _evaluations(folder)]


def _is_evaluation(folder: Path) -> bool:
    path = folder / RESULTS
    return path.is_file() and "scores" in read_object(path)


def _evaluations(folder: Path) -> list[Path]:
    """The evaluations inside a folder, the newest first."""
    found = [child for child in folder.iterdir() if child.is_dir() and _is_evaluation(child)]
    return sorted(found, key=lambda child: (child / RESULTS).stat().st_mtime, reverse=True)


def _run_with_evaluations(folder: Path, name: str) -> list[Keyed]:
    own = _own(folder, name)
    key, others = _key(folder), []
    for child in _evaluations(folder):
        other, run = _evaluation(child, name, inside=folder)
        if other == key:
            own.add(run)
        else:
            others.append((other, run))
    for child in folder.iterdir():
        if (child / SUMMARY).is_file() and not (child / RESULTS).is_file():
            others += _analysis(child)
    return [(key, own), *others]


def _own(folder: Path, name: str = "") -> ReportedRun:
    """What a folder of a model tells of itself."""
    run = ReportedRun(name or folder.resolve().name, folder)
    if not is_workdir(folder):
        return run
    run.config = config = read_config(folder / "config.json")
    with explain_missing(config.plugins, str(folder)):
        run.parameters = count_parameters(model_config(config), config.tuning, config.also_train)
    rows = read_log(folder / METRICS)
    for key in CURVES:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            run.curves[key] = ([step for step, _ in points], [value for _, value in points])
    return run


def _key(model: str | Path, adapter: object = None, tuning: object = None) -> tuple[str, ...]:
    put_on = str(Path(str(adapter)).resolve()) if adapter else ""
    return str(Path(model).resolve()), put_on, str(tuning or "")


def _of_model(facts: Mapping[str, Any], folder: Path, name: str, inside: Path | None) -> Keyed:
    """The model that results are of, with what its own folder tells."""
    adapter, tuning, model = facts.get("adapter"), facts.get("tuning"), facts.get("model")
    if model is None or (inside and not Path(model).exists()):
        # Written by code, or the run was moved: results inside of a run's folder are the run's.
        model, tuning = inside or folder, tuning if model and not adapter else None
    own = _own(Path(model)) if Path(model).is_dir() else ReportedRun(Path(model).name, Path(model))
    if adapter or tuning:
        own.adapter = str(tuning or f"adapter {adapter}")
        own.name = Path(str(adapter)).name if adapter else f"{own.name} with {tuning}"
        own.parameters, own.curves = None, {}
    if facts.get("model") is None and not inside:
        own.name = folder.resolve().name
        own.name = folder.resolve().parent.name if own.name.startswith("eval") else own.name
    own.name = name or own.name
    return _key(model, adapter, tuning), own


def _earlier_split(benchmark: str, split: str | None) -> str | None:
    """The split of a task in a `results.json` of version 0.2, which has one for all tasks.

    >>> _earlier_split("digits", "digits=val,gqa=train"), _earlier_split("digits", None)
    ('val', 'test')
    """
    given = named_splits(split or "")
    own = given.get(benchmark) if given else split
    return VALIDATION if benchmark == VALIDATION else own or default_split(benchmark)


def _evaluation(folder: Path, name: str, inside: Path | None = None) -> Keyed:
    """What an evaluation tells of its model."""
    data = read_json(folder / RESULTS, ReportedResults)
    key, run = _of_model(data, folder, name, inside)
    run.template, run.asked = data.get("processor", {}).get("template", ""), [folder]
    split = data.get("split")
    run.tasks = {}
    for task, entry in data["scores"].items():
        own = entry["split"] if "split" in entry else _earlier_split(entry["benchmark"], split)
        title = f"{task} ({own})" if own else task
        bounds = entry.get("interval95")
        run.tasks[title] = TaskResult(
            entry["score"],
            (bounds[0], bounds[1]) if bounds else None,
            entry["n"],
            entry.get("fraction", False) and entry["score"] is not None,
            own,
            entry["prompt_hash"],
            entry,
        )
    run.answers = _answers(folder, data)
    entries = _entries(folder) if (folder / SUMMARY).is_file() else {}
    own = data.get("fingerprint")
    told = next((entry for entry in entries.values() if entry.get("fingerprint") == own), None)
    if told is None and "attention" in data:  # as versions 0.1 and 0.2 wrote it
        told = check(data["attention"], AttentionEntry, f"attention in {folder / RESULTS}")
    if told is not None:
        run.attention = _attention(told, data["scores"], folder)
    if (folder / MAPS).is_file():
        run.maps = _maps(folder / MAPS)
    return key, run


def _analysis(folder: Path) -> list[Keyed]:
    """What `analyze attention` tells of its models."""
    found = []
    for name, entry in _entries(folder).items():
        facts = entry if "model" in entry else {"model": str(folder / name)}
        key, run = _of_model(facts, folder, name, None)
        run.template = entry.get("template") or ""
        run.attention = _attention(entry, {}, folder)
        found.append((key, run))
    return found


def _entries(folder: Path) -> dict[str, Any]:
    return read_json(folder / SUMMARY, dict[str, AttentionEntry], most=LARGE)


def _attention(entry: Mapping[str, Any], scores: Mapping[str, Any], folder: Path) -> Attention:
    """The statistics of an entry of `attention.json`."""
    heads, groups = entry.get("share_by_head"), entry["groups"]
    asked = {name: {"n": score["n"]} for name, score in scores.items()}
    try:
        share = np.asarray(entry["share"], float)
        lmar = np.asarray(entry["lmar_of_means"]["text"], float)
        own = None if heads is None else np.asarray(heads, float)[..., groups.index("image")]
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"the attention in {folder} cannot be used: {error!r}") from None
    return Attention(
        share=share,
        by_head=own,
        lmar=lmar,
        samples=entry["samples"],
        tasks=entry.get("tasks", asked),
        groups=groups,
    )


def _maps(path: Path) -> list[AnswerOnImage]:
    try:
        return read_maps(path)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _answers(folder: Path, data: Mapping[str, Any]) -> dict[Question, AskedQuestion]:
    """The answers to questions of tasks whose score is a share of what is right."""
    scored = {name for name, entry in data["scores"].items() if entry.get("fraction")}
    shares = {row_key(row): row for row in read_log(folder / LOG, AttentionRow)}
    found = {}
    for row in read_log(folder / FILE, PredictionRow):
        if row["task"] not in data["scores"] or "prompt" not in row:
            continue
        key, images = row_key(row), row.get("images")
        looked = shares.get(key, {})
        found[key] = AskedQuestion(
            row.get("score") if row["task"] in scored else None,
            looked["visual_share"] if looked.get("has_image") else None,
            None if images is None else tuple(images),
        )
    return found


def _tell_apart(runs: Iterable[ReportedRun]) -> None:
    """Gives runs of one name the names of their folders' parents too."""
    named: dict[str, list[ReportedRun]] = {}
    for run in runs:
        named.setdefault(run.name, []).append(run)
    for name, same in named.items():
        for number, run in enumerate(same if len(same) > 1 else ()):
            parent = run.folder.resolve().parent.name
            others = {other.folder.resolve().parent.name for other in same if other is not run}
            run.name = f"{parent}/{name}" if parent not in others else f"{name} ({number + 1})"
