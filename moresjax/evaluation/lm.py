"""A moresjax model as an `lm_eval` model, on which every task of that library runs."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.core.types import Ids
from moresjax.data.images import image_keys
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.scheduler import Completion
from moresjax.generation.text import cut_at_stop
from moresjax.inference.model import Model
from moresjax.tuning.probes import Probe

MAX_NEW_TOKENS = 256  # The default of the library's own models, where a task names no number.


def gen_kwargs(sampling: Sampling) -> dict[str, Any]:
    """The settings of `lm_eval` that differ from greedy ones."""
    names = ("temperature", "top_k", "top_p", "seed") if sampling.temperature else ()
    settings: dict[str, Any] = {name: getattr(sampling, name) for name in names}
    if sampling.repetition_penalty is not None:
        settings["repetition_penalty"] = sampling.repetition_penalty
    return settings | ({"do_sample": True} if names else {})


def task_requests(
    task: BenchmarkTask, examples: Sequence[Example], sampling: Sampling = GREEDY
) -> list[Instance]:
    """The requests of a benchmark's examples: one to generate, or one per choice to score.

    Their `doc` is the example. The model writes the conversation around a prompt itself. What is
    drawn depends on the seed, the task and the example alone.
    """
    kind = "loglikelihood" if task.ranks_choices else "generate_until"
    drawn = gen_kwargs(task.sampling(sampling))

    def settings(example: Example) -> dict[str, Any]:
        own = {"until": [], "max_gen_toks": task.length_limit(example), "do_sample": False} | drawn
        if "seed" in own:
            own["seed"] = f"{own['seed']}/{task.name}/{example.id}"
        return own

    return [
        Instance(
            request_type=kind,
            doc=example,  # pyright: ignore[reportArgumentType]  (lm_eval only hands it through)
            arguments=(example.prompt, wanted, {"visual": list(example.images)} | example.pointed),
            idx=number,
            metadata=(task.name, index, 1),
        )
        for index, example in enumerate(examples)
        for number, wanted in enumerate(example.choices or (settings(example),))
    ]


class MoresjaxLM(LM):
    """Batched generation and log-likelihood.

    Requests with images (`{"visual": [...]}`) are user turns of a conversation in the model's
    template; others are raw text.

    >>> from lm_eval.api.instance import Instance
    >>> from moresjax.testing import talking_model
    >>> model = talking_model("none")
    >>> request = Instance("loglikelihood", {}, ("is there a", " two ?"), 0)
    >>> ((log_probability, is_greedy),) = MoresjaxLM(model).loglikelihood([request])
    >>> log_probability < 0
    True

    Args:
      model: The model.
      batch_size: The rows of a batch.
      probes: Statistics to read while generating.
      on_done: Called with (request, row, completion, text) as soon as a continuation has ended.
      title: The title of the progress bar.
    """

    MULTIMODAL = True

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int = 64,
        probes: Sequence[Probe] = (),
        on_done: Callable[[Instance, Row, Completion, str], None] | None = None,
        title: str = "evaluate",
    ) -> None:
        super().__init__()
        self.model, self.batch_size, self.title = model, batch_size, title
        self._probes, self._on_done = tuple(probes), on_done

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's class, by which `lm_eval` names its cache of requests."""
        return type(self.model.prompts.processor.tokenizer).__name__

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the first stop string.

        Tokens are drawn where a request says so; its `seed` and its prompt make the seed, without
        one its place in the list does.

        Raises:
          UserError: A request wants a beam search.
        """
        arguments = [list(request.args) for request in requests]
        settings: list[dict[str, Any]] = [
            dict(normalize_gen_kwargs(args[1], MAX_NEW_TOKENS)) for args in arguments
        ]
        limits = [own["max_gen_toks"] for own in settings]
        known = {}
        rows = [
            self._row(args[0], args[2], f"request {number}", known)
            if len(args) > 2
            else Row.text(self._ids(args[0])[-max(self.model.service.max_length - limit, 1) :])
            for number, (args, limit) in enumerate(zip(arguments, limits, strict=True))
        ]
        seeds = [
            zlib.crc32(f"{own['seed']}\0{args[0]}".encode()) if "seed" in own else number
            for number, (own, args) in enumerate(zip(settings, arguments, strict=True))
        ]
        texts = [""] * len(rows)
        groups: dict[tuple, list[int]] = {}
        for number, own in enumerate(settings):
            stops = tuple(stop for stop in own["until"] if stop)
            groups.setdefault((stops, _sampling(own)), []).append(number)
        with tqdm(total=len(rows), desc=self.title, disable=disable_tqdm or None) as bar:
            for (stops, sampling), numbers in groups.items():

                def done(
                    place: int,
                    completion: Completion,
                    stops: Sequence[str] = stops,
                    numbers: Sequence[int] = numbers,
                ) -> None:
                    number = numbers[place]
                    text = cut_at_stop(self.model.prompts.spell(completion.tokens), stops)
                    # A turn of a conversation has no blanks around it, raw text may.
                    texts[number] = text = text.strip() if len(arguments[number]) > 2 else text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    if self._on_done is not None:
                        self._on_done(requests[number], rows[number], completion, text)
                    bar.update()

                self.model.service.generate_many(
                    [rows[i] for i in numbers],
                    [limits[i] for i in numbers],
                    batch_size=self.batch_size,
                    probes=self._probes,
                    sampling=sampling,
                    seeds=[seeds[i] for i in numbers],
                    stop=stops,
                    on_done=done,
                )
        return texts

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, tokenised together with their contexts."""

        def score(chunk: Sequence[Instance]) -> list[tuple[float, bool]]:
            return self._score(self._pairs(chunk))

        return self._in_chunks("loglikelihood", score, requests, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows where they are longer than the context.

        One start token stands before a text and is not scored. The library's class for
        `transformers` has two where the tokenizer adds one, and scores the second.
        """

        def score(chunk: Sequence[Instance]) -> list[float]:
            windows = [self._windows(request.args[0]) for request in chunk]
            scores = iter(self._score([pair for own in windows for pair in own]))
            return [float(sum(next(scores)[0] for _ in own)) for own in windows]

        return self._in_chunks("loglikelihood_rolling", score, requests, disable_tqdm)

    def _in_chunks(
        self,
        kind: str,
        score: Callable[[Sequence[Instance]], list],
        requests: Sequence[Instance],
        disable_tqdm: bool,
    ) -> list:
        """Scores of the requests, kept and shown chunk by chunk."""
        found, batches = [], self.model.service.config.scored_batches_per_chunk
        size = batches * self.batch_size
        with tqdm(total=len(requests), desc=self.title, disable=disable_tqdm or None) as bar:
            for start in range(0, len(requests), size):
                chunk = requests[start : start + size]
                scores = score(chunk)
                for request, one in zip(chunk, scores, strict=True):
                    self.cache_hook.add_partial(kind, request.args, one)
                found += scores
                bar.update(len(chunk))
        return found

    def _row(self, text: str, asked: Mapping[str, Any], name: str, known: dict) -> Row:
        """The row of a user's turn with its images, regions and marks."""
        pointed = {key: asked.get(key) for key in ("roi", "marks")}
        return self.model.prompts.row(text, asked["visual"], name, known, **pointed)

    def _pairs(self, requests: Sequence[Instance]) -> list[tuple[Row, Ids]]:
        """Prompt row and continuation of every request."""
        pairs, prompts, known = [], {}, {}
        for number, request in enumerate(requests):
            context, continuation, *visual = list(request.args)
            if visual:
                images, marks = visual[0]["visual"], visual[0].get("marks")
                key = context, repr(visual[0].get("roi")), repr(marks), *image_keys(images)
                if key not in prompts:
                    prompts[key] = self._row(context, visual[0], f"request {number}", known)
                answer = self.model.prompts.with_answer(
                    prompts[key], context, images, continuation.strip(), marks=marks
                )
                pairs.append(answer)
                continue
            if not context.strip():
                pairs.append(self._pair([self._start], self._ids(context + continuation, False)))
                continue
            whole = self._ids(context + continuation)
            # Blanks at the border belong to the continuation.
            head = min(len(self._ids(context.rstrip())), len(whole) - 1)
            pairs.append(self._pair(whole[:head], whole[head:]))
        return pairs

    def _windows(self, text: str) -> list[tuple[Row, Ids]]:
        ids, most = self._ids(text, False), self.model.service.max_length
        windows = get_rolling_token_windows(ids, self._start, most, 1)
        return [self._pair(*make_disjoint_window(window)) for window in windows]

    @property
    def _start(self) -> int:
        """What stands before a text that has nothing before it."""
        tokenizer = self.model.prompts.processor.tokenizer
        bos = tokenizer.bos_token_id
        return tokenizer.eos_token_id if bos is None else bos

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return self.model.prompts.processor.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _pair(self, context: Ids, continuation: Ids) -> tuple[Row, Ids]:
        # A text that is too long loses its beginning, like in the library's own models. The last
        # token is not read.
        cut = len(context) + len(continuation) - 1 - self.model.service.max_length
        return Row.text(context[max(0, min(cut, len(context) - 1)) :]), continuation

    def _score(self, pairs: Sequence[tuple[Row, Ids]]) -> list[tuple[float, bool]]:
        found = self.model.service.score_rows(pairs, self.batch_size)
        return [(score.logprob, score.is_greedy) for score in found]


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """How a request wants its tokens chosen.

    Raises:
      UserError: It wants a beam search.
    """
    if settings.get("num_beams", 1) != 1:
        raise UserError("a request wants a beam search, which evaluations do not have")
    names = ("top_k", "top_p") if settings["do_sample"] else ()
    given = {name: settings[name] for name in (*names, "repetition_penalty") if name in settings}
    temperature = settings.get("temperature", 0.0) if settings["do_sample"] else 0.0
    return Sampling(temperature=temperature, **given)
