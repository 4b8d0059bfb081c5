"""One page about any set of runs: what they are, how right their answers are, where these look.

    mj.report(["runs/mores", "runs/lora"], "report.html")

All of it is gathered in a `Report` first; the template only shows it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moresjax.evaluation.paired import (
    OF_ONE_SEED,
    bootstrap_interval,
    holm,
    is_shown,
    sign_flip,
)
from moresjax.evaluation.statistics import clusters_of
from moresjax.reports import plots
from moresjax.reports.html import figure_uri, render
from moresjax.reports.runs import CURVES, AskedQuestion, ReportedRun, gather

TASKS_PER_TABLE = 6
TEMPLATE = "report.html.j2"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
      uri: The figure as a `data:` address.
      alt: What it shows, in words.
      note: What lies outside of its axes; empty where nothing does.
      width: The greatest width of the figure on the page, in pixels.
    """

    uri: str
    alt: str
    note: str = ""
    width: int = 900


@dataclasses.dataclass(frozen=True)
class Report:
    """What a page says of runs.

    Attributes:
      runs: The runs, the first of which the others are compared with.
      findings: Sentences that follow from paired 95% intervals alone.
      warnings: What keeps numbers from being comparable.
      missing: By run, what is not known of it, with the command that makes it.
      pictures: The figures by name.
      items: A question and its figure for every image with answers.
    """

    runs: Sequence[ReportedRun]
    findings: Sequence[str]
    warnings: Sequence[str]
    missing: Mapping[str, Sequence[str]]
    pictures: Mapping[str, Picture]
    items: Sequence[tuple[str, Picture]]

    @property
    def tasks(self) -> list[str]:
        """The tasks that any run was asked."""
        return list(dict.fromkeys(task for run in self.runs for task in run.tasks))

    @property
    def task_tables(self) -> list[list[str]]:
        """The tasks in tables that fit a narrow page."""
        tasks = self.tasks
        size = -(-len(tasks) // max(-(-len(tasks) // TASKS_PER_TABLE), 1)) or 1
        return [tasks[start : start + size] for start in range(0, len(tasks), size)]

    @property
    def attention_tasks(self) -> list[str]:
        """The different lists of tasks that attention statistics are of."""
        every = (", ".join(run.attention.tasks) for run in self.runs if run.attention)
        return list(dict.fromkeys(every))

    @property
    def layers(self) -> int:
        """The most layers that attention was read in."""
        return max((len(run.attention.share) for run in self.runs if run.attention), default=0)


def report(runs: str | Path | Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """Writes a self-contained page about runs.

    >>> import moresjax as mj
    >>> mj.report("no/such/run")
    Traceback (most recent call last):
    ...
    moresjax.core.errors.UserError: there is no folder no/such/run to report on

    Args:
      runs: Folders of runs, evaluations or `analyze attention`, or with such folders in them; each
        may have a name before it (`NAME=DIR`). The first run is what the others are compared with.
      out: The file of the page.

    Returns:
      The file.

    Raises:
      UserError: A folder is none of these or damaged, or the file cannot be written.
    """
    folders = [runs] if isinstance(runs, str | Path) else runs
    found = make_report(gather([str(folder) for folder in folders]))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_page(found, path)


def write_page(found: Report, path: str | Path, template: str = TEMPLATE, **values: Any) -> Path:
    """Writes the page of a report.

    Args:
      found: The report.
      path: The file.
      template: The page's template, which may extend that of reports.
      values: What it needs beside the report.
    """
    drawn = plots.styles(run.name for run in found.runs)
    values |= {"styles": drawn, "curves": CURVES, "of_one_seed": OF_ONE_SEED}
    return render(template, path, report=found, **values)


def make_report(runs: Sequence[ReportedRun]) -> Report:
    """Compares runs and draws them."""
    pictures, items = draw(runs)
    missing = {run.name: sentences for run in runs if (sentences := what_is_missing(run))}
    return Report(runs, findings(runs), warnings(runs), missing, pictures, items)


def what_is_missing(run: ReportedRun) -> list[str]:
    """What is not known of a run, with the command that makes it."""
    if run.config is not None and not run.config.is_language_model:
        return [f"trained as {run.config.objective}: it answers no questions"]
    found, told = [], run.attention
    lacking = [
        ("evaluation", not run.tasks),
        ("attention statistics", told is None),
        ("shares of single heads", told is not None and told.by_head is None),
        ("answers on their images", told is not None and not run.maps),
    ]
    if names := [name for name, is_missing in lacking if is_missing]:
        found.append(f"no {', no '.join(names)}: {_command(run)}")
    unknown = [("training curves", not run.curves), ("number of parameters", not run.parameters)]
    if names := [name for name, is_missing in unknown if is_missing]:
        found.append(f"no {', no '.join(names)}: give the folder of the run that trained it")
    return found


def _command(run: ReportedRun) -> str:
    """The command that makes what is missing of a run's evaluation."""
    known = {name.split(" (")[0] for name in run.tasks}
    known |= set() if run.attention is None else set(run.attention.tasks)
    tasks = ",".join(sorted({_benchmark(run, name) for name in known})) or "TASKS"
    adapter = run.adapter.removeprefix("adapter ")
    put_on = "" if adapter == run.adapter else f" --adapter {adapter}"
    if run.adapter and not put_on:
        put_on = f" --tuning {run.adapter}"
    model = run.folder if run.has_model else "DIR"
    out = run.asked[0] if run.asked else f"{run.folder}/eval"
    return f"moresjax evaluate --model {model}{put_on} --tasks {tasks} --attention --out {out}"


def _benchmark(run: ReportedRun, task: str) -> str:
    """The name that a task is asked by."""
    for name, result in run.tasks.items():
        if name.split(" (")[0] == task:
            return result.facts["benchmark"]
    told = {} if run.attention is None else run.attention.tasks.get(task, {})
    return told.get("benchmark", task)


def warnings(runs: Sequence[ReportedRun]) -> list[str]:
    """What keeps numbers of runs from being comparable."""
    found = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        own = {run.name: run.tasks[task] for run in runs if task in run.tasks}
        if len({result.prompt_hash for result in own.values()}) > 1:
            counts = ", ".join(f"{name} {result.n}" for name, result in own.items())
            found.append(f"In {task} the runs were asked different questions (n: {counts}).")
    templates = {run.template for run in runs if run.template}
    if len(templates) > 1:
        told = ", ".join(f"{run.name} {run.template}" for run in runs if run.template)
        found.append(
            f"The runs were asked with different templates ({told}); some templates drop the "
            "question. --template of evaluate asks all of them alike."
        )
    if "plain" in templates:
        found.append("The template plain drops every question: those runs saw the image alone.")
    return found


@dataclasses.dataclass(frozen=True)
class Difference:
    """A run's values less the first run's, over the questions that both answered.

    Attributes:
      mean: The mean difference.
      low: Where its 95% interval begins, from drawing images again.
      high: Where it ends.
      n: The number of questions.
      p: The p-value of no difference, from sign flips of images, corrected for all comparisons of a
        report by Holm's method.
    """

    mean: float
    low: float
    high: float
    n: int
    p: float

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero, and so does the test."""
        return is_shown((self.low, self.high), self.p)


def findings(runs: Sequence[ReportedRun]) -> list[str]:
    """How every run differs from the first one, as far as paired intervals and tests tell."""
    reference, *others = runs
    made: list[tuple[str, str, float, Difference]] = []
    found = []
    for measure, of, unit in (
        ("accuracy", lambda asked: asked.score, 100),
        ("share of attention on the image", lambda asked: asked.share, 1),
    ):
        reasons: dict[str, list[str]] = {}
        for run in others:
            difference = _difference(run, reference, of)
            if isinstance(difference, Difference):
                made.append((run.name, measure, unit, difference))
            elif difference:
                reasons.setdefault(difference, []).append(run.name)
        for reason, names in reasons.items():
            pair = f"{', '.join(names)} and {reference.name}"
            found.append(f"The {measure} of {pair} is not compared: {reason}.")
    corrected = holm([one.p for *_, one in made])
    return [
        difference_sentence(name, reference.name, measure, dataclasses.replace(one, p=p), unit)
        for (name, measure, unit, one), p in zip(made, corrected, strict=True)
    ] + found


def _difference(
    run: ReportedRun, reference: ReportedRun, of: Callable[[AskedQuestion], float | None]
) -> Difference | str:
    """A run's values less the reference's, or why they are not compared.

    The reason is empty where one of them has no such values.
    """
    answers = [(own, reference.answers.get(key)) for key, own in run.answers.items()]
    pairs = [
        (one - other, own.images or theirs.images)
        for own, theirs in answers
        if theirs is not None and (one := of(own)) is not None and (other := of(theirs)) is not None
    ]
    if not pairs:
        return ""
    differences, images = zip(*pairs, strict=True)
    if None in images:
        return "the predictions do not say which questions share images; evaluate again"
    clusters = clusters_of(images)
    bounds = bootstrap_interval(differences, clusters)
    if bounds is None:
        return "all common questions are about one image"
    p = sign_flip(differences, clusters)
    return Difference(float(np.mean(differences)), *bounds, len(differences), p)


def difference_sentence(
    first: str, second: str, measure: str, difference: Difference, unit: int | float = 1
) -> str:
    """What an interval and a test say of two runs.

    >>> difference = Difference(mean=0.5, low=-0.125, high=1, n=8, p=0.25)
    >>> difference_sentence("a", "b", "share", difference)[:49]
    'No difference in share could be shown between a a'

    Args:
      first: The name of the first run.
      second: The name of the second run.
      measure: What was measured.
      difference: The first run's mean less the second's.
      unit: 100 for points of accuracy, 1 for shares.
    """
    digits, of = (1, " points") if unit == 100 else (3, "")
    mean, low, high = (
        f"{unit * x:+.{digits}f}" for x in (difference.mean, difference.low, difference.high)
    )
    numbers = f"{mean}{of}, 95% interval {low} to {high}, n = {difference.n}"
    numbers += f", p = {difference.p:.2g} (Holm)"
    if not difference.is_shown:
        return f"No difference in {measure} could be shown between {first} and {second}: {numbers}."
    side = "higher" if difference.mean > 0 else "lower"
    return f"The {measure} of {first} is {side} than that of {second}: {numbers}."


def draw(
    runs: Sequence[ReportedRun],
) -> tuple[dict[str, Picture], list[tuple[str, Picture]]]:
    """The figures of the page, as far as there is something to draw, and those of answers."""
    drawn = plots.styles(run.name for run in runs)
    found: dict[str, Picture] = {}

    def add(
        name: str,
        figure: Figure,
        alt: str,
        values: Mapping[str, Sequence[float]] | None = None,
        width: int = 700,
    ) -> None:
        outside = plots.limits(values)[2] if values else []
        note = f"Far outside of the axis: {', '.join(outside)}." if outside else ""
        found[name] = Picture(figure_uri(figure), alt, note, width)

    scores = {
        task: {
            run.name: (result.score, result.interval)
            for run in runs
            if (result := run.tasks.get(task)) and result.score is not None and result.fraction
        }
        for task in dict.fromkeys(task for run in runs for task in run.tasks)
    }
    if scores := {task: own for task, own in scores.items() if own}:
        figure = plots.scores_with_intervals(scores, drawn)
        values, alt = plots.scores_by_run(scores), "score and 95% interval by task and run"
        add("scores", figure, alt, values, 860)

    looked = {run.name: run.attention for run in runs if run.attention is not None}
    if looked:
        image = {
            name: own.share[:, list(own.groups).index("image")].tolist()
            for name, own in looked.items()
        }
        series = {name: (range(len(y)), y) for name, y in image.items()}
        labels = "layer", "share of attention on the image"
        add("share", plots.lines(series, labels, drawn=drawn), "share by layer and run", image)
        lmar = {name: own.lmar.tolist() for name, own in looked.items()}
        add("lmar", plots.lmar_lines(lmar, "", drawn), "LMAR by layer and run", lmar)
        groups = plots.attention_shares({n: own.share.tolist() for n, own in looked.items()})
        add("groups", groups, "share on each kind of token by layer and run", width=1000)
    heads = {n: own.by_head for n, own in looked.items() if own.by_head is not None}
    if heads:
        alt = "share on the image by layer and head"
        add("heads", plots.shares_by_head(heads), alt, width=1000)
    points = {
        run.name: (run.parameters.trainable, run.attention.visual_share)
        for run in runs
        if run.parameters is not None and run.attention is not None
    }
    if points:
        labels = "share of attention on the image", "trained parameters"
        figure = plots.share_against_size(points, *labels, drawn)
        alt = "share on the image against trained parameters"
        add("size", figure, alt, {name: [y] for name, (_, y) in points.items()})
    for key, title in CURVES.items():
        curves = {run.name: run.curves[key] for run in runs if key in run.curves}
        if curves:
            figure = plots.lines(curves, ("step", f"{title} loss"), drawn=drawn)
            add(key, figure, f"{title} loss by step", {n: y for n, (_, y) in curves.items()})
    return found, _draw_answers(runs)


def _draw_answers(runs: Sequence[ReportedRun]) -> list[tuple[str, Picture]]:
    """A figure for every image that answers were mapped on, with all runs that did."""
    items: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        for one in run.maps:
            items.setdefault((one.task, one.id, one.question), {})[run.name] = one
    found = []
    for own in items.values():
        first = next(iter(own.values()))
        grids = {
            f"{name}: {_short(one.prediction) or '(nothing)'}": one.grid
            for name, one in own.items()
        }
        figure = plots.answers_on_image(first.image, grids)
        question = " ".join(first.question.replace("<image>", "").split())
        right = f", right: {_short(first.answer)}" if first.answer else ""
        width = int(100 * figure.get_figwidth())
        alt = f"attention on the image of {first.task} {first.id}"
        title = f"{first.task} {first.id}: “{_short(question, 160)}”{right}"
        found.append((title, Picture(figure_uri(figure), alt, width=width)))
    return found


def _short(text: str, most: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def as_text(found: Report) -> str:
    """The findings and what is missing, for the terminal."""
    lines = [*found.warnings, *found.findings, *([OF_ONE_SEED] if found.findings else [])]
    lines += [f"{name}: {sentence}" for name, own in found.missing.items() for sentence in own]
    return "\n".join(lines)


def numbers(found: Report) -> dict[str, Any]:
    """The numbers of a report as JSON takes them."""
    return {
        "runs": {run.name: _numbers(run) for run in found.runs},
        "findings": list(found.findings),
        "warnings": list(found.warnings),
        "missing": {name: list(sentences) for name, sentences in found.missing.items()},
    }


def _numbers(run: ReportedRun) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "tuning": run.tuning,
        "trained": None if run.parameters is None else run.parameters.trainable,
        "scores": {name: result.score for name, result in run.tasks.items()},
        "average_visual_share": None if run.attention is None else run.attention.visual_share,
        "lmar": None if run.attention is None else np.asarray(run.attention.lmar).tolist(),
    }
