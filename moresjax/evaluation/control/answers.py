"""Answers under some of a model's editors, written while they come."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.core.json_files import append_log, read_log, write_log
from moresjax.data.control.cases import Case
from moresjax.data.images import LazyPixels
from moresjax.data.processor_facts import processor_facts, short_hash
from moresjax.data.region_providers import OWN_REGIONS, RegionProvider
from moresjax.data.regions import EVERYWHERE, Box
from moresjax.evaluation.rows import ControlRow
from moresjax.inference.model import Model
from moresjax.inference.regions import attended_regions
from moresjax.inference.steering import with_part
from moresjax.tuning.base import Method

LOG = "predictions.jsonl"
BASE, ALL, RANDOM = "no editors", "all editors", "all editors, random region"
# By the tower of a site the group of its editors, and all groups in the order of tables.
TOWERS = {"vision": "visual", "connector": "connector", "llm": "text"}
GROUPS = tuple(TOWERS.values())
# The most tokens of an answer: of yes and no, and of answers of TextVQA.
SHORT, LONG = 4, 16
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Some of the editors of a model.

    Attributes:
      name: Its name in tables.
      groups: The groups of editors that act.
      random: Whether they act on a random region of the same size.
    """

    name: str
    groups: tuple[str, ...]
    random: bool = False

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        """The questions with the region that this variant has."""
        if not self.random:
            return list(cases)
        provider = RegionProvider("random")
        return [
            dataclasses.replace(case, roi=provider.boxes_of(case.id, 0, case.roi)) for case in cases
        ]


def editor_groups(model: Model) -> tuple[str, ...]:
    """The groups of editors that a model has.

    >>> from moresjax.testing import talking_model
    >>> editor_groups(talking_model("control:groups=visual;text"))
    ('visual', 'text')

    Raises:
      UserError: It has none.
    """
    found = {group for _, method in model.mllm.tuning.methods for group in _groups(model, method)}
    if not found:
        raise UserError(
            f"the model's tuning {model.tuning!r} has no editors; tune it with --config control"
        )
    return tuple(group for group in GROUPS if group in found)


def _groups(model: Model, method: Method) -> set[str]:
    return {TOWERS[site.split(".")[0]] for site in method.sites(model.config)}


def make_variants(groups: Sequence[str], *, subsets: bool = True) -> list[Variant]:
    """No editors, all of them, a random region, and every subset.

    >>> [variant.name for variant in make_variants(["visual", "text"])]
    ['no editors', 'all editors', 'all editors, random region', 'visual', 'text']

    Args:
      groups: The groups of editors that there are.
      subsets: Whether to have every subset.
    """
    found = [Variant(BASE, ()), Variant(ALL, tuple(groups))]
    if {*groups} != {"text"}:
        found.append(Variant(RANDOM, tuple(groups), random=True))
    for size in range(1, len(groups)) if subsets else ():
        for chosen in itertools.combinations(groups, size):
            found.append(Variant(" + ".join(chosen), chosen))
    return found


def place_regions(model: Model, cases: Sequence[Case]) -> list[Case]:
    """Questions with the regions that the model's own provider gives them, where it has one.

    Args:
      model: The model; a run of `roi=attention(8;20%)` finds regions itself.
      cases: The questions, with the regions of their data.

    Raises:
      UserError: An image cannot be read, or the model has no such layer.
    """
    processor = model.prompts.processor
    provider = processor.regions
    if provider.kind == "boxes":
        return list(cases)

    def place(case: Case) -> Case:
        sample = case.asked
        if provider.kind == "attention":
            sample = attended_regions(model.mllm, processor, sample, provider)
        else:
            sample = provider(sample)
        boxes = (sample.roi or ((),))[0] or ()
        return dataclasses.replace(case, roi=tuple(WHOLE if x == EVERYWHERE else x for x in boxes))

    return [place(case) for case in cases]


class Answers:
    """The answers of a model, which survive a killed process.

    Args:
      model: The model with its editors.
      out: The directory of `predictions.jsonl`; None keeps them in memory.
      batch_size: The rows of a batch.

    Raises:
      UserError: The directory has a damaged file.
    """

    def __init__(
        self, model: Model, out: str | Path | None = None, *, batch_size: int = 64
    ) -> None:
        self._model, self._batch_size = model, batch_size
        self.facts = {
            "model": model.fingerprint,
            "weights": model.exact_fingerprint,
            "tuning": model.tuning,
            "processor": processor_facts(model.prompts.processor)["hash"],
        }
        self._path = None if out is None else Path(out) / LOG
        self._known: dict[str, str] = {}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            rows = read_log(self._path, ControlRow)
            self._known = {row["key"]: row["prediction"] for row in rows}
            if rows:
                write_log(self._path, rows)

    def ask(self, variant: Variant, cases: Sequence[Case]) -> list[str]:
        """The answers to questions under a variant; those that are known are not asked again.

        Raises:
          UserError: A question is too long, or an image cannot be read.
        """
        keys = [self._key(variant, case) for case in cases]
        pending = [n for n, key in enumerate(keys) if key not in self._known]
        if pending:
            model = self._model

            def acts(method: Method) -> bool:
                return _groups(model, method) <= {*variant.groups}

            with with_part(model, acts):
                self._ask(variant, [cases[n] for n in pending], [keys[n] for n in pending])
        return [self._known[key] for key in keys]

    def _ask(self, variant: Variant, cases: Sequence[Case], keys: Sequence[str]) -> None:
        service, prompts = self._model.service, self._model.prompts
        size = self._batch_size * service.config.batches_per_chunk
        for start in range(0, len(cases), size):
            chunk = cases[start : start + size]
            images: dict[tuple, LazyPixels] = {}
            rows = [prompts.sample_row(case.asked, images, OWN_REGIONS) for case in chunk]
            limits = [SHORT if isinstance(case.truth, str) else LONG for case in chunk]
            done = service.generate_many(rows, limits, batch_size=self._batch_size)
            texts = [prompts.text(completion.tokens) for completion in done]
            for key, case, text in zip(keys[start:], chunk, texts, strict=False):
                self._add(key, variant, case, text)

    def _add(self, key: str, variant: Variant, case: Case, text: str) -> None:
        self._known[key] = text
        if self._path is None:
            return
        row = {"editors": variant.name, "id": case.id, "kind": case.kind}
        row |= {"question": case.question.text, "prediction": text, "key": key}
        append_log(self._path, row)

    def _key(self, variant: Variant, case: Case) -> str:
        """Digits that stand for all that an answer follows from."""
        made: Mapping[str, object] = {
            "by": [self.facts["weights"], self.facts["processor"], *variant.groups],
            "asked": [case.id, case.prompt.text, case.prompt.span if variant.groups else ()],
            "roi": case.roi if variant.groups else (),
        }
        return short_hash(json.dumps(made))
