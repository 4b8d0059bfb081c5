"""Control of a trained model: asked with and without its editors, and in other words."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax._version import __version__
from moresjax.core.errors import UserError
from moresjax.core.json_files import write_json
from moresjax.core.locks import one_writer
from moresjax.data.control.cases import OTHER, TARGET, Case
from moresjax.data.control.questions import Phrasing
from moresjax.data.control.rephrase import Rephraser, TemplateRephraser, rephrase
from moresjax.data.control.source import ControlSource
from moresjax.data.processor_facts import short_hash
from moresjax.evaluation.control.answers import (
    ALL,
    BASE,
    Answers,
    Variant,
    editor_groups,
    make_variants,
    place_regions,
)
from moresjax.evaluation.control.measure import Measured, Rate, correct, image_of, says
from moresjax.inference.model import Model

RESULTS = "control.json"


@dataclasses.dataclass(frozen=True)
class Paraphrased:
    """How often a paraphrase is controlled.

    Attributes:
      text: The paraphrase, with `{e}` for article and indicator.
      base: The share of the target's questions that the model without editors answers as wanted.
      without: The same with editors, asked as it stands.
      rephrased: The same with editors, asked in the words of the rephraser.
      others: The error on other questions with editors and rephraser.
      lost: Questions whose indicator the rephraser lost; they are asked as they stand.
    """

    text: str
    base: Rate | None
    without: Rate | None
    rephrased: Rate | None
    others: Rate | None
    lost: int


@dataclasses.dataclass(frozen=True)
class ControlResult:
    """What a set of editors does.

    Attributes:
      measured: The answers of every subset of the editors.
      paraphrases: A row for every paraphrase; none without a rephraser.
      facts: What was asked, and of what.
    """

    measured: Measured
    paraphrases: Sequence[Paraphrased]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as `control.json` has it."""
        rows = [dataclasses.asdict(row) for row in self.paraphrases]
        return self.facts | self.measured.to_dict() | {"paraphrases": rows}


@one_writer
def measure_control(
    model: Model,
    source: ControlSource,
    *,
    limit: int | None = None,
    classes: Sequence[str] = (),
    negatives: bool = True,
    subsets: bool = True,
    rephraser: Rephraser | None = None,
    batch_size: int = 64,
    out: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> ControlResult:
    """Asks a model with its editors, without them and with some of them, and counts.

    >>> from moresjax.testing import talking_model
    >>> source = ControlSource("digits", split="test", target="three")
    >>> result = measure_control(talking_model("control:groups=text"), source, limit=12)
    >>> [*result.measured.answers]
    ['no editors', 'all editors']

    Args:
      model: The model with the editors.
      source: The questions of a split, and their scenario.
      limit: The number of images; None: all of the split.
      classes: Only questions about these classes; empty: all.
      negatives: Whether to ask about classes that are not there, too.
      subsets: Whether to ask with every subset of the editors.
      rephraser: Leads paraphrases back to the trained phrasing; None leaves paraphrases out.
      batch_size: The rows of a batch.
      out: The directory of `predictions.jsonl`, with which a killed run goes on, and of
        `control.json`.
      facts: What else `control.json` is to say.

    Raises:
      UserError: The model has no editors, a class is unknown, or paraphrases of a data set that
        asks its own questions are wanted.
    """
    if rephraser is not None and source.phrasings is None:
        raise UserError(f"{source.dataset} asks its own questions, which no rephraser changes")
    cases = source.cases(limit, classes, negatives)
    if not any(case.kind == TARGET for case in cases):
        raise UserError(f"none of the {len(cases)} questions is about the target {source.target!r}")
    variants = make_variants(editor_groups(model), subsets=subsets)
    cases = place_regions(model, cases)
    answers = Answers(model, out, batch_size=batch_size)
    reworded = []
    if rephraser is not None and source.phrasings is not None:
        asked = [case for case in cases if case.kind in (TARGET, OTHER)]
        reworded = [Reworded.of(asked, way, rephraser) for way in source.phrasings.paraphrases]
    found = {}
    for variant in variants:
        # What a variant is asked is asked at once: each has programs of its own.
        own = variant.cases(cases)
        more = [case for one in reworded for case in one.asked_of(variant.name)]
        found[variant.name] = answers.ask(variant, [*own, *more])[: len(own)]
    by_name = {variant.name: variant for variant in variants}
    rows = [one.measured(answers, by_name, source.plan.counterfactual) for one in reworded]
    data = json.dumps([[c.id, c.kind, c.question.text, c.roi] for c in cases])
    options = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    known = answers.facts | {"data": options, "data_hash": short_hash(data), "n": len(cases)}
    known |= {
        "roi": str(model.prompts.processor.regions),
        "seed": source.seed,
        "version": __version__,
        **(facts or {}),
    }
    result = ControlResult(Measured(source.plan, cases, found), rows, known)
    if out is not None:
        write_json(Path(out) / RESULTS, result.to_dict())
    return result


@dataclasses.dataclass(frozen=True)
class Reworded:
    """Questions in the words of a paraphrase.

    Attributes:
      phrasing: The paraphrase.
      plain: The questions as the paraphrase asks them.
      rephrased: The same as a rephraser leads them back.
      lost: Questions whose indicator the rephraser lost; they are asked as they stand.
    """

    phrasing: Phrasing
    plain: Sequence[Case]
    rephrased: Sequence[Case]
    lost: int

    @classmethod
    def of(cls, cases: Sequence[Case], phrasing: Phrasing, rephraser: Rephraser) -> "Reworded":
        """Questions of the trained phrasing in those of a paraphrase, and rephrased."""
        plain, rephrased, lost = [], [], 0
        for case in cases:
            own = dataclasses.replace(case, question=phrasing.ask(case.question.indicator))
            question = rephrase(rephraser, own.question)
            lost += question is None
            plain.append(own)
            again = own if question is None else dataclasses.replace(own, question=question)
            rephrased.append(again)
        return cls(phrasing, plain, rephrased, lost)

    def asked_of(self, variant: str) -> list[Case]:
        """What a variant is asked of it."""
        both = {BASE: [*self.plain], ALL: [*self.plain, *self.rephrased]}
        return both.get(variant, [])

    def measured(
        self, answers: Answers, variants: Mapping[str, Variant], wanted: str
    ) -> Paraphrased:
        """How often it is controlled.

        Args:
          answers: The answers that are known.
          variants: The model without editors and with all of them, by name.
          wanted: The answer that the target's questions are to get.
        """

        def rate(kind: str, variant: str, asked: Sequence[Case]) -> Rate | None:
            own = [case for case in asked if case.kind == kind]
            texts = answers.ask(variants[variant], own)
            hits = [
                float(says(text, wanted)) if kind == TARGET else 1.0 - correct(case, text)
                for case, text in zip(own, texts, strict=True)
            ]
            return Rate.of(hits, [image_of(case) for case in own])

        return Paraphrased(
            self.phrasing.text,
            rate(TARGET, BASE, self.plain),
            rate(TARGET, ALL, self.plain),
            rate(TARGET, ALL, self.rephrased),
            rate(OTHER, ALL, self.rephrased),
            self.lost,
        )


def template_rephraser(source: ControlSource) -> TemplateRephraser:
    """The rephraser by tables of a data set, to the phrasing that was trained.

    Raises:
      UserError: The data set asks its own questions.
    """
    if source.phrasings is None:
        raise UserError(f"{source.dataset} asks its own questions, which no rephraser changes")
    known = (*source.phrasings.trained, *source.phrasings.paraphrases)
    return TemplateRephraser(source.phrasings.number(source.phrasing), known)
