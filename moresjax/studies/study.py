"""What a study is: a table or figure of a paper in miniature, on the digits world.

A study trains methods with every seed of the whole pipeline, in folders that all studies below one
directory share, and says in tables and sentences what came out, beside the paper's own numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moresjax.core.errors import UserError, choice_error
from moresjax.core.json_files import write_json
from moresjax.evaluation.statistics import mean_with_interval
from moresjax.reports.html import figure_uri, render
from moresjax.reports.tables import Table
from moresjax.studies.findings import PairedDifference, explain, listed
from moresjax.studies.pipeline import Finetuning, Pipeline, Variant
from moresjax.studies.provenance import describe, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Minutes on two quiet cores, from the CPU seconds of runs of the demo: for a run of stage 2 with
# its evaluation, and for the stages 0 and 1 of a seed.
RUN_MINUTES, STAGE_MINUTES = 0.25, 0.9

# By name of a method, the value of every seed.
Values = Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a study found.

    Attributes:
      tables: The miniature's tables.
      findings: Sentences that follow from paired intervals over seeds.
      values: The numbers of every seed behind them.
      figures: Figures by what they show.
    """

    tables: Sequence[Table]
    findings: Sequence[str]
    values: Mapping[str, Any]
    figures: Mapping[str, "Figure"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A table or figure of a paper.

    Attributes:
      name: The name that the command line takes.
      title: What of which paper it is.
      runs: The runs of stage 2, one for every seed.
      paper: The paper's own numbers or claims.
      limits: What the miniature cannot tell, in a sentence.
      make: Says what came out of the runs.
      more_minutes: About how long what `make` asks of the models takes for a seed.
      in_parts: Whether `make` says something of a part of the runs.
      variant: Settings of the stages beside the recipe's.
      factor: How much longer a run takes than one of the plain pipeline.
    """

    name: str
    title: str
    runs: Sequence[Finetuning]
    paper: Table
    limits: str
    make: Callable[[Pipeline, "Study"], Outcome]
    more_minutes: float = 0.0
    in_parts: bool = False
    variant: Variant | None = None
    factor: float = 1.0

    @property
    def minutes(self) -> float:
        """About how long a seed takes on two quiet cores, once stages 0 and 1 are there."""
        return self.factor * RUN_MINUTES * len(self.runs) + self.more_minutes


def run_study(
    study: Study,
    out: str | Path,
    *,
    seeds: int = 5,
    fast: bool = False,
    only: Sequence[str] = (),
) -> Path:
    """Trains what a study needs and writes `NAME.json` and its page `NAME.html`.

    What an earlier study left in the same directory is taken over.

    Args:
      study: The study.
      out: The directory of all studies.
      seeds: Seeds of the whole pipeline.
      fast: Runs a few steps of tiny models, to test the plumbing.
      only: Names of the runs that are made; the study must say something of a part. Default: all.

    Returns:
      The page.

    Raises:
      UserError: There are fewer than two seeds, a run has no such name, or a run diverged or was
        stopped.
    """
    if seeds < 2:
        raise UserError(f"a study gives intervals over seeds, which need at least 2, got {seeds}")
    if only:
        study = _part(study, only)
    out = Path(out)
    pipeline = Pipeline(out / "runs", range(seeds), fast=fast, variant=study.variant)
    pipeline.train_stages()
    pipeline.finetune(study.runs)
    outcome = study.make(pipeline, study)
    facts = provenance()
    place = out.name if out.is_absolute() else out  # the command is for every machine
    command = f"moresjax study {study.name} --out {place} --seeds {seeds}"
    if only:
        command += f' --only "{";".join(only)}"'
    record = {
        "study": study.name,
        "command": command,
        "made_with": facts,
        "seeds": seeds,
        "findings": list(outcome.findings),
        "tables": [dataclasses.asdict(table) for table in (*outcome.tables, study.paper)],
        "values": outcome.values,
    }
    write_json(out / f"{study.name}.json", record, indent=1)
    return render(
        "study.html.j2",
        out / f"{study.name}.html",
        study=study,
        outcome=outcome,
        figures={alt: figure_uri(figure) for alt, figure in outcome.figures.items()},
        rests=explain(seeds),
        command=command,
        made=describe(facts),
    )


def _part(study: Study, only: Sequence[str]) -> Study:
    names = [run.name for run in study.runs]
    if not study.in_parts:
        raise UserError(f"study {study.name} compares all of its runs; it has no part of them")
    if wrong := [name for name in only if name not in names]:
        raise choice_error(f"run of study {study.name}", wrong[0], names)
    first, *rest = study.runs
    return dataclasses.replace(study, runs=[first, *(run for run in rest if run.name in only)])


def values_table(title: str, columns: Mapping[str, Values], base: str) -> Table:
    """Means with intervals by method, each column with its difference from one method in points.

    Args:
      title: The title.
      columns: By header, the values of every method and seed.
      base: The method that the others are compared with.
    """
    head, names = ["method"], list(next(iter(columns.values())))
    for header in columns:
        head += [header, f"from {base}"]
    rows = []
    for name in names:
        row = [name]
        for values in columns.values():
            row.append(with_interval(values[name]))
            found = PairedDifference.of(values[name], values[base])
            row.append("" if name == base else found.points)
        rows.append(row)
    return Table(title, head, rows)


def claim(text: str) -> Table:
    """The paper's table where the paper has a claim and no numbers."""
    return Table("The paper", ["claim"], [[text]])


def with_interval(values: Sequence[float], digits: int = 3) -> str:
    """A mean with its 95% interval over seeds.

    >>> with_interval([0.5, 0.5])
    '0.500 [0.500, 0.500]'
    """
    mean, bounds = mean_with_interval(values)
    text = f"{mean:.{digits}f}"
    return text if bounds is None else f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def agreement(what: str, base: str, paper: Mapping[str, float], values: Values) -> str:
    """A sentence on which of a paper's differences from one method appear in the miniature.

    >>> here = {"a": [0.5] * 5, "b": [0.6] * 5, "c": [0.4] * 5}
    >>> agreement("Accuracy", "a", {"a": 50, "b": 61, "c": 52}, here)
    'Accuracy against a: as in the paper for b; against the paper for c.'

    Args:
      what: What is compared.
      base: The method that the others are compared with.
      paper: The paper's number of every method; only its order counts.
      values: The miniature's, of every seed.
    """
    found: dict[str, list[str]] = {"as in the paper": [], "against the paper": []}
    unknown = "no difference could be shown, where the paper has one,"
    found[unknown] = []
    for name in (name for name in paper if name in values):
        sign = (paper[name] > paper[base]) - (paper[name] < paper[base])
        if name == base or not sign:
            continue
        direction = PairedDifference.of(values[name], values[base]).direction
        own = {"higher": 1, "lower": -1, "": 0}[direction]
        key = unknown if not own else "as in the paper" if own == sign else "against the paper"
        found[key].append(name)
    parts = [f"{words} for {listed(names)}" for words, names in found.items() if names]
    return f"{what} against {base}: {'; '.join(parts)}."
