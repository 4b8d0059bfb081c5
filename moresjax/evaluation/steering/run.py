"""Steering runs: vectors of states, what they do to answers, and what they are compared with."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.analysis.steering import count_changes, selection, side_effects
from moresjax.analysis.vectors import vector_hash
from moresjax.core.errors import UserError
from moresjax.core.json_files import append_log, read_log, write_json, write_log
from moresjax.core.locks import one_writer
from moresjax.data.processor_facts import short_hash
from moresjax.evaluation.examples import Example
from moresjax.evaluation.judges import Judge
from moresjax.evaluation.metrics.vqa import matches_of_three
from moresjax.evaluation.rows import SteeringRow
from moresjax.evaluation.scoring import Predictions, TaskScore
from moresjax.evaluation.steering.ask import Trial, ask_steered
from moresjax.evaluation.steering.tasks import SteeringTask
from moresjax.evaluation.tasks import BenchmarkTask, questions_hash
from moresjax.inference.model import Model

RESULTS, LOG = "steering.json", "predictions.jsonl"
BASELINE, ALL = "baseline", "all"
VQA = "VQA accuracy"
KEYS = ("task", "id", "prompt", "trial")
Key = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class SteeringResult:
    """What vectors do to the answers of a model.

    Attributes:
      rows: For each task the answers without steering and then for each trial a row of numbers;
        of several tasks then the same rows of the task `all`, over the questions of all of them.
      answers: By task and by trial (`baseline` is without steering) the answers, in the order of
        the questions.
      facts: What was steered.
    """

    rows: list[dict[str, Any]]
    answers: dict[str, dict[str, list[str]]]
    facts: dict[str, Any]

    @property
    def overall(self) -> list[dict[str, Any]]:
        """The rows over all questions."""
        last = self.rows[-1]["task"]
        return [row for row in self.rows if row["task"] == last]

    def row(self, vector: str, **wanted: Any) -> dict[str, Any]:
        """The first row of a vector with some values, such as `alpha=1`.

        Raises:
          UserError: There is none.
        """
        for row in self.rows:
            if row["vector"] == vector and wanted.items() <= row.items():
                return row
        raise UserError(f"no trial of {vector} has {wanted}")


@one_writer
def steer(
    model: Model,
    tasks: Sequence[BenchmarkTask],
    trials: Sequence[Trial],
    steering: SteeringTask,
    *,
    batch_size: int = 64,
    out: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> SteeringResult:
    """Asks the questions without steering and under every trial, and counts what changes.

    >>> import numpy as np
    >>> from moresjax.evaluation.steering.tasks import parse_steering_task
    >>> from moresjax.evaluation.tasks import load_tasks
    >>> from moresjax.testing import talking_model
    >>> tasks = load_tasks(["digits"], None, 2, None)[:1]
    >>> trial = Trial("no", np.ones(16), layer=1, alpha=0.0)
    >>> result = steer(talking_model(), tasks, [trial], parse_steering_task("answers:yes>no"))
    >>> result.row("no")["changed"]
    0.0

    Args:
      model: The model, which keeps its own tuning.
      tasks: The questions.
      trials: The vectors with their layers, strengths and positions.
      steering: Which answers are the source's and the target's.
      batch_size: The rows of a batch.
      out: The directory of `predictions.jsonl`, which grows while answers come, so that a killed
        run goes on, and of `steering.json`.
      facts: What else `steering.json` is to say.

    Raises:
      UserError: Two trials are the same, the directory has other answers, or a vector does not fit.
    """
    if len({trial.key for trial in trials}) < len(trials):
        raise UserError("two trials have one name, layer, strength and positions")
    if twice := {task.name for task in tasks} & {ALL}:
        raise UserError(f"no task may have the name {twice.pop()!r}, which stands for all of them")
    log = _Log(out, model, trials)
    own = {"steering": steering.name, "data": questions_hash(tasks), **log.facts}
    result = SteeringResult([], {}, own | dict(facts or {}))
    for task in tasks:
        if not task.examples:
            raise UserError(f"task {task.name} has no questions")
        ask_steered(
            model,
            task,
            trials,
            batch_size=batch_size,
            pending=lambda example, trial, task=task: not log.knows(task.name, example, trial),
            on_done=lambda example, trial, text, task=task: log.add(
                task.name, example, trial, text
            ),
        )
        found = {
            BASELINE if trial is None else trial.key: [
                log.answer(task.name, example, trial) for example in task.examples
            ]
            for trial in (None, *trials)
        }
        result.answers[task.name] = found
        result.rows.extend(summarize(task, trials, steering, found))
    if len(tasks) > 1:
        result.rows.extend(_over_all(tasks, trials, steering, result.answers))
    if out is not None:
        content = result.facts | {"rows": result.rows}
        write_json(Path(out) / RESULTS, content)
    return result


def _over_all(
    tasks: Sequence[BenchmarkTask],
    trials: Sequence[Trial],
    steering: SteeringTask,
    answers: Mapping[str, Mapping[str, Sequence[str]]],
) -> list[dict[str, Any]]:
    """Rows over the questions of all tasks, with a score where every question has one."""
    keys = [BASELINE, *(trial.key for trial in trials)]
    joined = {key: [text for task in tasks for text in answers[task.name][key]] for key in keys}

    def scorer(
        examples: Sequence[Example], predictions: Predictions, /, judge: Judge | None = None
    ) -> TaskScore:
        rest, parts = list(predictions), []
        for task in tasks:
            count = len(task.examples)
            parts.append(task.scorer(task.examples, rest[:count]))
            rest = rest[count:]
        metrics = {part.metric for part in parts}
        scores = [score for part in parts for score in part.per_example]
        if len(metrics) > 1 or any(part.total is not None for part in parts):
            return TaskScore("several" if len(metrics) > 1 else metrics.pop())
        return TaskScore(metrics.pop(), scores if len(scores) == len(predictions) else ())

    examples = [example for task in tasks for example in task.examples]
    return summarize(BenchmarkTask(ALL, examples, scorer=scorer), trials, steering, joined)


def summarize(
    task: BenchmarkTask,
    trials: Sequence[Trial],
    steering: SteeringTask,
    answers: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """A row of numbers for the answers without steering and for each trial's.

    Args:
      task: The questions.
      trials: The trials.
      steering: Which answers are the source's and the target's.
      answers: By trial (`baseline` is without steering) the answers to the questions.
    """
    baseline = list(answers[BASELINE])
    plain = [steering.normalize(answer) for answer in baseline]
    scored = task.scorer(task.examples, baseline)
    rows = [
        {
            "task": task.name,
            "vector": BASELINE,
            "n": len(plain),
            "distinct": len({*plain}),
            **_scores(task, scored, baseline),
        }
    ]
    for trial in trials:
        own = list(answers[trial.key])
        normal = [steering.normalize(answer) for answer in own]
        score = task.scorer(task.examples, own)
        both = (scored.per_example, score.per_example)
        effects = side_effects(
            plain,
            normal,
            steering.is_source,
            steering.is_target,
            both if all(len(x) == len(plain) for x in both) else None,
        )
        chosen = selection(count_changes(plain, normal))
        rows.append(
            {
                "task": task.name,
                "vector": trial.name,
                "layer": trial.layer,
                "alpha": trial.alpha,
                "site": trial.site,
                "positions": trial.positions,
                **effects.to_dict(),
                "selection": dataclasses.asdict(chosen),
                **_scores(task, score, own),
                **steering.metrics(task.examples, baseline, own),
            }
        )
    return rows


def _scores(task: BenchmarkTask, score: Any, answers: Sequence[str]) -> dict[str, Any]:
    """The task's own score, and of VQA accuracy also the published variant by answer type."""
    found: dict[str, Any] = {"metric": score.metric, "score": score.value}
    details = {k: v for k, v in score.details.items() if isinstance(v, int | float)}
    if details:
        found["details"] = details
    if score.metric == VQA and score.per_example:
        groups: dict[str, list[float]] = defaultdict(list)
        for example, answer in zip(task.examples, answers, strict=True):
            kind = str(example.metadata.get("answer_type", "all"))
            groups[kind].append(matches_of_three(answer, example.answer))
        by_type = {kind: statistics.fmean(x) for kind, x in sorted(groups.items())}
        mean = statistics.fmean(by_type.values())
        found["matches_of_three"] = by_type | {"mean_over_types": mean}
    return found


class _Log:
    """The answers of a run, which survive a killed process.

    Args:
      out: The directory of `predictions.jsonl`; None keeps them in memory.
      model: The model.
      trials: The trials.

    Raises:
      UserError: The directory holds answers of another model, processor, or vector of a name.
    """

    def __init__(self, out: str | Path | None, model: Model, trials: Sequence[Trial]) -> None:
        self.facts = model.provenance
        made = [self.facts[name] for name in ("weights", "processor")]
        self._made = {
            trial.key: short_hash("".join([*made, vector_hash(trial.vector)])) for trial in trials
        } | {BASELINE: short_hash("".join(made))}
        self._answers: dict[Key, str] = {}
        self._limits: dict[Key, int | None] = {}
        self._path = None if out is None else Path(out) / LOG
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_log(self._path, SteeringRow)
        for row in rows:
            trial = str(row.get("trial"))
            if self._made.get(trial, row.get("made")) != row.get("made"):
                raise UserError(
                    f"{self._path} holds answers of another model or vector ({trial}); choose "
                    "another directory"
                )
            self._answers[_key_of(row)] = row["prediction"]
            self._limits[_key_of(row)] = row.get("max_new_tokens")
        if rows:
            write_log(self._path, rows)

    def knows(self, task: str, example: Example, trial: Trial | None) -> bool:
        """Whether an answer of the example's length limit is there."""
        key = self._key(task, example, trial)
        return key in self._answers and self._limits.get(key) == example.max_new_tokens

    def answer(self, task: str, example: Example, trial: Trial | None) -> str:
        """An answer that is there."""
        return self._answers[self._key(task, example, trial)]

    def add(self, task: str, example: Example, trial: Trial | None, text: str) -> None:
        """Keeps an answer."""
        key = self._key(task, example, trial)
        self._answers[key], self._limits[key] = text, example.max_new_tokens
        if self._path is None:
            return
        row = dict(zip(KEYS, key, strict=True)) | {"prediction": text, "made": self._made[key[3]]}
        row |= example.own_limit
        append_log(self._path, row)

    def _key(self, task: str, example: Example, trial: Trial | None) -> Key:
        return task, example.id, example.prompt, BASELINE if trial is None else trial.key


def _key_of(row: Mapping[str, Any]) -> Key:
    """What a row of the log answers."""
    return row["task"], row["id"], row["prompt"], row["trial"]
