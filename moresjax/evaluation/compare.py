"""Evaluations of several models compared question by question."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from moresjax.core.errors import UserError
from moresjax.core.json_files import read_log
from moresjax.evaluation.paired import (
    OF_ONE_SEED,
    bootstrap_interval,
    holm,
    is_shown,
    mcnemar,
    sign_flip,
)
from moresjax.evaluation.predictions import FILE
from moresjax.evaluation.results import RESULTS
from moresjax.evaluation.rows import PredictionRow
from moresjax.evaluation.statistics import clusters_of

MCNEMAR, SIGN_FLIP = "exact McNemar", "sign flips of images"

# By task, and by id and prompt of a question: its row in `predictions.jsonl`.
Scored = Mapping[str, Mapping[tuple[str, str], Mapping]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the questions of a task.

    Attributes:
      task: The task.
      first: One evaluation, by the name it was given under.
      second: The other.
      n: The number of questions.
      images: The number of clusters of questions that share images.
      scores: The mean score of both.
      difference: The second's mean score minus the first's.
      interval95: Its 95% interval, from drawing images again; None for fewer than two.
      test: The name of the test behind `p`.
      p: The two-sided p-value of no difference.
      p_holm: The same, corrected for the number of comparisons made together.
    """

    task: str
    first: str
    second: str
    n: int
    images: int
    scores: tuple[float, float]
    difference: float
    interval95: tuple[float, float] | None
    test: str
    p: float
    p_holm: float

    @property
    def shown(self) -> bool:
        """Whether a difference is shown: the interval is without zero, and so is the test."""
        return is_shown(self.interval95, self.p_holm)

    @property
    def finding(self) -> str:
        """What the numbers say, in a sentence."""
        if not self.shown:
            return "no difference could be shown"
        word = "higher" if self.difference > 0 else "lower"
        return f"{self.second} is {word} than {self.first}"


def compare(folders: Sequence[str | Path], *, resamples: int = 10_000) -> list[Comparison]:
    r"""All pairs of evaluations on every task that all of them have.

    >>> import json, tempfile
    >>> folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
    >>> for folder, score in zip(folders, (0, 1)):
    ...     rows = [{"task": "mine", "id": str(i), "prediction": "a", "score": score}
    ...             for i in range(9)]
    ...     _ = (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    >>> (found,) = compare(folders)
    >>> found.difference, found.p, found.test
    (1.0, 0.00390625, 'exact McNemar')

    Args:
      folders: Directories of evaluations, or their `results.json` or `predictions.jsonl`.
      resamples: The number of draws of the bootstrap and of sign flips.

    Raises:
      UserError: There are fewer than two different folders, a folder has no scores, they have no
        task in common, or asked different questions.
    """
    found: dict[str, Scored] = {}
    for folder in map(str, folders):
        if folder in found:
            raise UserError(f"{folder} is named twice; a model cannot be compared with itself")
        found[folder] = read_scores(folder)
    if len(found) < 2:
        raise UserError(f"two evaluations at least are needed to compare, got {len(found)}")
    tasks = [task for task in next(iter(found.values())) if all(task in s for s in found.values())]
    if not tasks:
        had = "; ".join(f"{name} has {', '.join(scored)}" for name, scored in found.items())
        raise UserError(f"the evaluations have no task in common: {had}")
    pairs = [(t, *pair) for t in tasks for pair in itertools.combinations(found, 2)]
    made = [_compare(t, a, found[a][t], b, found[b][t], resamples) for t, a, b in pairs]
    corrected = holm([one.p for one in made])
    return [dataclasses.replace(c, p_holm=p) for c, p in zip(made, corrected, strict=True)]


def read_scores(path: str | Path) -> Scored:
    """The scored questions of an evaluation by task; tasks without a score per question are left.

    Raises:
      UserError: There are none.
    """
    folder = Path(path)
    if folder.name in (RESULTS, FILE) and folder.is_file():
        folder = folder.parent
    if not (folder / FILE).is_file():
        raise UserError(f"{path} has no {FILE}; give the --out of an evaluation")
    tasks: dict[str, dict[tuple[str, str], Mapping]] = {}
    unscored = set()
    for row in read_log(folder / FILE, PredictionRow):
        task, score = str(row.get("task")), row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            unscored.add(task)
            continue
        key = str(row.get("id")), str(row.get("prompt"))
        tasks.setdefault(task, {})[key] = row
    scored = {task: rows for task, rows in tasks.items() if task not in unscored}
    if any("images" not in row for rows in scored.values() for row in rows.values()):
        logging.getLogger(__name__).warning(
            f"{folder / FILE} was written before rows named their images; its questions are taken "
            "as having images of their own"
        )
    if not scored:
        raise UserError(f"{folder / FILE} has no task whose questions all have a score")
    return scored


def _compare(
    task: str, first: str, rows: Mapping, second: str, others: Mapping, resamples: int
) -> Comparison:
    if set(rows) != set(others):
        left, right = len(set(rows) - set(others)), len(set(others) - set(rows))
        raise UserError(
            f"{first} and {second} answered different questions of {task}: {left} are in the first "
            f"alone, {right} in the second; evaluate both on the same"
        )
    scores = [[float(side[key]["score"]) for key in rows] for side in (rows, others)]
    clusters = clusters_of([row.get("images") or () for row in rows.values()])
    differences = [b - a for a, b in zip(*scores, strict=True)]
    if len(set(clusters)) == len(clusters) and {*scores[0], *scores[1]} <= {0.0, 1.0}:
        test, p = MCNEMAR, mcnemar(scores[1], scores[0])
    else:
        test, p = SIGN_FLIP, sign_flip(differences, clusters, resamples=resamples)
    return Comparison(
        task=task,
        first=first,
        second=second,
        n=len(rows),
        images=len(set(clusters)),
        scores=(fmean(scores[0]), fmean(scores[1])),
        difference=fmean(differences),
        interval95=bootstrap_interval(differences, clusters, resamples=resamples),
        test=test,
        p=p,
        p_holm=p,
    )


def compare_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons in lines, with what each of them says and what none of them can say."""
    lines = []
    for task, group in itertools.groupby(comparisons, key=lambda one: one.task):
        own = list(group)
        lines.append(f"{task}: {own[0].n:,d} questions in {own[0].images:,d} groups by image")
        for one in own:
            bounds = "no interval"
            if one.interval95 is not None:
                bounds = "95% in {:+.3f} to {:+.3f}".format(*one.interval95)
            corrected = f", {one.p_holm:.2g} by Holm" if len(comparisons) > 1 else ""
            lines += [
                f"  {one.second} - {one.first}: {one.scores[1]:.3f} - {one.scores[0]:.3f} = "
                f"{one.difference:+.3f}, {bounds}",
                f"    p = {one.p:.2g} ({one.test}){corrected}: {one.finding}",
            ]
    return "\n".join([*lines, OF_ONE_SEED])
