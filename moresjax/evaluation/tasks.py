"""Benchmarks as `lm_eval` tasks.

A benchmark is a file of `moresjax.evaluation.benchmarks` with a function
`load(data_root, limit, split) -> list[VisualTask]`, registered by `@benchmark(name)`. An item knows
its prompt, images and answer; the task compares the generated text with the answer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from moresjax.errors import choice_error

BENCHMARKS: dict[str, Callable[..., list["VisualTask"]]] = {}


def benchmark(name: str):
    """Registers a benchmark's `load` function."""

    def add(function):
        BENCHMARKS[name] = function
        return function

    return add


def load_benchmark(name: str, **options) -> list["VisualTask"]:
    """The tasks of a benchmark.

    Raises:
      UserError: for an unknown name.
    """
    if name not in BENCHMARKS:
        raise choice_error("task", name, BENCHMARKS)
    return BENCHMARKS[name](**options)


@dataclasses.dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    prompt: str
    answer: str
    images: tuple[Any, ...] = ()


def exact_match(prediction: str, answer: str) -> float:
    """1 for the same text up to case and surrounding blanks."""
    return float(prediction.strip().lower() == answer.strip().lower())


class VisualTask(Task):
    """Generated answers to questions about images, scored one by one."""

    VERSION = 1
    OUTPUT_TYPE = "generate_until"
    MULTIMODAL = True

    def __init__(
        self,
        name: str,
        items: Sequence[Item],
        *,
        max_new_tokens: int,
        metric: Callable[[str, str], float] = exact_match,
    ):
        super().__init__()
        self._config = TaskConfig(task=name, num_fewshot=0, repeats=1, output_type=self.OUTPUT_TYPE)
        self.items = list(items)
        self._max_new_tokens, self._metric = max_new_tokens, metric

    def download(self, *args, **kwargs) -> None:
        """Nothing to fetch: items are given."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Item]:
        return self.items

    def doc_to_text(self, doc: Item) -> str:
        return doc.prompt

    def doc_to_target(self, doc: Item) -> str:
        return doc.answer

    def doc_to_image(self, doc: Item):
        return list(doc.images)

    def build_all_requests(self, *, limit=None, samples=None, rank=0, world_size=1, **_) -> None:
        """One request per item; the model writes the conversation around the prompt itself."""
        docs = self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size)
        self._instances = [self.construct_requests(doc, None, index=i) for i, doc in docs]

    def construct_requests(self, doc: Item, ctx, *, index: int = 0, **_) -> Instance:
        settings = {"until": [], "max_gen_toks": self._max_new_tokens, "do_sample": False}
        return Instance(
            request_type=self.OUTPUT_TYPE,
            doc=doc,
            arguments=(doc.prompt, settings, {"visual": list(doc.images)}),
            idx=0,
            metadata=(self.config.task, index, 1),
        )

    def process_results(self, doc: Item, results: Sequence[str]) -> dict[str, float]:
        return {"accuracy": self._metric(results[0], doc.answer)}

    def aggregation(self) -> dict[str, Callable]:
        return {"accuracy": lambda values: sum(values) / len(values)}

    def higher_is_better(self) -> dict[str, bool]:
        return {"accuracy": True}
