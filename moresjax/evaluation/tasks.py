"""Benchmarks as `lm_eval` tasks.

A benchmark is a file of `moresjax.evaluation.benchmarks` with a function
`load(data_root, limit, split) -> list[VisualTask]`, registered by `@benchmark(name)`. An item knows
its prompt, images and answer; the task knows how predictions become a score (`scoring.py`), and in
which format the benchmark's own tools save and expect them (`files.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from moresjax.core.errors import choice_error
from moresjax.core.plugins import load_plugins
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import LETTERS, Unlabelled, read_rows
from moresjax.evaluation.metrics.choices import lowest_loss
from moresjax.evaluation.scoring import Score, Scorer, by_item

_OURS = read_rows("id", "prediction")

BENCHMARKS: dict[str, Callable[..., list["VisualTask"]]] = {}


def benchmark(name: str):
    """Registers a benchmark's `load` function."""

    def add(function):
        BENCHMARKS[name] = function
        return function

    return add


def benchmark_names() -> list[str]:
    """All benchmarks."""
    # They register themselves on import.
    from moresjax.evaluation import benchmarks  # noqa: F401

    load_plugins()
    return sorted(BENCHMARKS)


def load_benchmark(name: str, *, split: str | None = None, **options) -> list["VisualTask"]:
    """The tasks of a benchmark; without a split, those of its default one.

    Raises:
      UserError: for an unknown name, or files that are missing or not as published.
    """
    if name not in benchmark_names():
        raise choice_error("task", name, benchmark_names())
    chosen = {} if split is None else {"split": split}
    return BENCHMARKS[name](**options, **chosen)


class VisualTask(Task):
    """Questions about images, answered in free text, or by ranking choices if the items have them.

    Args:
      name: of the task in results; a benchmark can have several.
      items: the questions.
      max_new_tokens: length limit of an answer.
      score: predictions to score.
      read: (file) to predictions by id, of the benchmark's own result format.
      submissions: file name to a function from predictions by id to the file's content: what the
        benchmark's server or its own tool takes.
    """

    VERSION = 1
    OUTPUT_TYPE = "generate_until"
    MULTIMODAL = True

    def __init__(
        self,
        name: str,
        items: Sequence[Item],
        *,
        max_new_tokens: int = 128,
        score: Scorer | None = None,
        read: Callable[[Path], Mapping[str, str] | Sequence[Unlabelled]] = _OURS,
        submissions: Mapping[str, Callable[[Mapping[str, str]], str]] | None = None,
    ):
        super().__init__()
        self.items = list(items)
        self.ranks = bool(self.items and self.items[0].choices)
        if self.ranks:
            self.OUTPUT_TYPE = "loglikelihood"
        self._config = TaskConfig(task=name, num_fewshot=0, repeats=1, output_type=self.OUTPUT_TYPE)
        self.name, self.max_new_tokens, self.score = name, max_new_tokens, score or by_item()
        self.read, self.submissions = read, submissions or {}

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

    def doc_to_target(self, doc: Item) -> Any:
        return doc.answer

    def doc_to_image(self, doc: Item):
        return list(doc.images)

    def build_all_requests(self, *, limit=None, samples=None, rank=0, world_size=1, **_) -> None:
        """The requests of every item; the model writes the conversation around a prompt itself."""
        docs = self.doc_iterator(rank=rank, limit=limit, samples=samples, world_size=world_size)
        self._instances = [
            request for i, doc in docs for request in self.construct_requests(doc, None, index=i)
        ]

    def construct_requests(self, doc: Item, ctx, *, index: int = 0, **_) -> list[Instance]:
        """One request to generate, or one per choice for its log-likelihood."""
        settings = {"until": [], "max_gen_toks": self.max_new_tokens, "do_sample": False}
        return [
            Instance(
                request_type=self.OUTPUT_TYPE,
                doc=doc,
                arguments=(doc.prompt, wanted, {"visual": list(doc.images)}),
                idx=number,
                metadata=(self.config.task, index, 1),
            )
            for number, wanted in enumerate(doc.choices or (settings,))
        ]

    def prediction(self, doc: Item, results: Sequence) -> str:
        """What a model's replies to `construct_requests` say: the text, or the letter of the
        likeliest choice."""
        if not doc.choices:
            return results[0]
        return LETTERS[lowest_loss([-likelihood for likelihood, _ in results])]

    def process_results(self, doc: Item, results: Sequence) -> dict[str, tuple[Item, str]]:
        return {"score": (doc, self.prediction(doc, results))}

    def aggregation(self) -> dict[str, Callable]:
        def total(pairs: Sequence[tuple[Item, str]]) -> float | None:
            items, texts = zip(*pairs, strict=True)
            score: Score = self.score(items, texts)
            return score.value

        return {"score": total}

    def higher_is_better(self) -> dict[str, bool]:
        return {"score": True}
