"""A moresjax model as an `lm_eval` model: every task of that library runs on it unchanged."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from lm_eval.api.model import LM
from tqdm import tqdm

from moresjax.data.processor import Row
from moresjax.generation.engine import Generation
from moresjax.generation.text import cut
from moresjax.layout import Segment
from moresjax.model import Model
from moresjax.tuning.base import Probe
from moresjax.types import Ids


class MoresjaxLM(LM):
    """Batched generation and log-likelihood.

    Requests with images (`{"visual": [...]}`) are user turns of a conversation in the model's
    template; others are raw text.

    Args:
      model: the model.
      batch_size: rows per batch.
      probes: statistics to read while generating.
      on_batch: called with (row numbers, rows, generation) after every generated batch.
      title: of the progress bar.
    """

    MULTIMODAL = True

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int = 64,
        probes: Sequence[Probe] = (),
        on_batch: Callable[[Sequence[int], Sequence[Row], Generation], None] | None = None,
        title: str = "evaluate",
    ):
        super().__init__()
        self.model, self.batch_size, self.title = model, batch_size, title
        self._probes, self._on_batch = tuple(probes), on_batch

    @property
    def tokenizer_name(self) -> str:
        return type(self.model.processor.tokenizer).__name__

    def _raw_row(self, ids: Ids) -> Row:
        ids = np.asarray(ids, np.int32)
        zeros = np.zeros_like(ids)
        return {
            "tokens": ids,
            "segment": zeros + int(Segment.QUESTION),
            "image": zeros - 1,
            "position": np.arange(len(ids), dtype=np.int32),
            "document": zeros,
            "branch": zeros,
        }

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut at the first stop string."""
        arguments = [request.args for request in requests]
        rows = [
            self.model.prompt(args[0], args[2]["visual"], f"request {number}")
            if len(args) > 2
            else self._raw_row(self.model.processor.tokenizer(args[0])["input_ids"])
            for number, args in enumerate(arguments)
        ]
        texts: list[str | None] = [None] * len(rows)
        # Neighbours in a batch have the same length limit and about the same length.
        limits = [args[1].get("max_gen_toks", 128) for args in arguments]
        order = sorted(range(len(rows)), key=lambda i: (limits[i], len(rows[i]["tokens"])))
        with tqdm(total=len(rows), desc=self.title, disable=disable_tqdm or None) as bar:
            for numbers in _batches(order, limits, self.batch_size):
                chosen = [rows[i] for i in numbers]
                # Short batches are filled up, so that they do not compile anew.
                filled = chosen + chosen[:1] * (self.batch_size - len(chosen))
                generation = self.model.generate_rows(filled, limits[numbers[0]], self._probes)
                if self._on_batch is not None:
                    kept = len(chosen)
                    part = Generation(
                        generation.tokens[:kept],
                        generation.length[:kept],
                        jax.tree.map(lambda x, n=kept: x[:, :n], generation.stats),
                    )
                    self._on_batch(numbers, chosen, part)
                for i, text in zip(numbers, self.model.decode(generation), strict=False):
                    until = arguments[i][1].get("until") or ()
                    stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
                    texts[i] = cut(text, stops)
                bar.update(len(numbers))
        return texts

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, tokenised together with their contexts."""
        tokenizer = self.model.processor.tokenizer
        pairs, prompts = [], {}
        for number, request in enumerate(requests):
            context, continuation = request.args[:2]
            if len(request.args) > 2:
                images = request.args[2]["visual"]
                key = context, *map(id, images)
                if key not in prompts:  # images of a question are prepared once
                    prompts[key] = self.model.prompt(context, images, f"request {number}")
                answer = self.model.with_answer(prompts[key], context, images, continuation.strip())
                pairs.append(answer)
                continue
            whole = tokenizer(context + continuation)["input_ids"]
            # Blanks at the border belong to the continuation.
            head = tokenizer(context.rstrip())["input_ids"] if context else whole[:1]
            pairs.append(self._split(whole, min(len(head), len(whole) - 1)))
        return self._score(pairs)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts given the start token."""
        tokenizer = self.model.processor.tokenizer
        pairs = [self._split(tokenizer(request.args[0])["input_ids"], 1) for request in requests]
        return [score for score, _ in self._score(pairs)]

    def _split(self, ids: Ids, head: int) -> tuple[Row, Ids]:
        return self._raw_row(ids[:head]), ids[head:]

    def _score(self, pairs) -> list[tuple[float, bool]]:
        found = self.model.score_rows(pairs, self.batch_size)
        return [(score.logprob, score.greedy) for score in found]


def _batches(order: Sequence[int], limits: Sequence[int], size: int):
    """Consecutive numbers with one limit, at most `size` at a time."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or limits[i] != limits[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
