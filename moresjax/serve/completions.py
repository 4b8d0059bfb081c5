"""`/v1/completions`: raw text and token ids, what `lm_eval` asks for log-likelihoods.

Axis legend: S prompt tokens, N new tokens.
"""

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.generation.prompt_scores import PromptScores, score_prompts
from moresjax.generation.row_pool import PoolRequest
from moresjax.serve.chat_request import Decoding, read_decoding, read_model
from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields
from moresjax.serve.pieces import AnswerPiece, Numbered, TokenInfo, answers
from moresjax.serve.server import Server

MAX_PROMPTS = 512
MAX_LISTED = 20
DEFAULT_TOKENS = 16  # OpenAI's
SCORED_AT_ONCE = 16  # prompts; between two of these batches, answers go on


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """Texts to go on with.

    Attributes:
      model: The name of the model that is asked for.
      prompts: Texts or token ids.
      decoding: How they are to be continued.
      echo: Whether a completion begins with its prompt.
      listed: How many likely tokens are wanted at each; None for no log-probabilities.
      nothing_new: Whether no new token is wanted.
      adapter: The adapter that answers; None where the model's name says it.
    """

    model: str
    prompts: tuple[str | list[int], ...]
    decoding: Decoding
    echo: bool
    listed: int | None
    nothing_new: bool
    adapter: str | None


def read_completion(body: Any) -> CompletionRequest:
    """The body of a request; fields that it does not know are ignored.

    Raises:
      ApiError: A field is missing or wrong.
    """
    fields = Fields(body)
    echo = fields.flag("echo")
    nothing = fields.get("max_tokens") == 0 and echo
    decoding = read_decoding(Fields({**body, "max_tokens": 1}) if nothing else fields)
    if decoding.max_tokens is None:
        decoding = dataclasses.replace(decoding, max_tokens=DEFAULT_TOKENS)
    listed = fields.get("logprobs")
    return CompletionRequest(
        model=read_model(fields),
        prompts=_prompts(fields),
        decoding=decoding,
        echo=echo,
        listed=None if listed is None else fields.whole("logprobs", 0, 0, MAX_LISTED),
        nothing_new=nothing,
        adapter=fields.text("adapter"),
    )


def _prompts(fields: Fields) -> tuple[str | list[int], ...]:
    given = fields.get("prompt")

    def is_ids(x: Any) -> bool:
        ints = isinstance(x, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in x)
        return ints and len(x) > 0

    prompts = [given] if isinstance(given, str) or is_ids(given) else given
    fine = isinstance(prompts, list) and 0 < len(prompts) <= MAX_PROMPTS
    if not fine or not all(isinstance(x, str) or is_ids(x) for x in prompts):
        raise fields.wrong("prompt", f"a text, token ids, or a list of at most {MAX_PROMPTS}")
    return tuple(prompts)


@dataclasses.dataclass
class _Part:
    """A completion as far as it is there."""

    text: str = ""
    tokens: list[TokenInfo] = dataclasses.field(default_factory=list)
    first: bool = False  # whether the first token has nothing before it, hence no log-probability
    reason: str | None = None
    count: int = 0


class CompletionAnswer:
    """The completions of one request.

    Args:
      server: The server.
      asked: The request.
      rows: Its prompts.
      adapter: The adapter that answers.
    """

    def __init__(
        self, server: Server, asked: CompletionRequest, rows: list[Row], adapter: str | None
    ) -> None:
        self._server, self._asked, self._rows, self._adapter = server, asked, rows, adapter
        self._name, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    @classmethod
    async def of(cls, server: Server, asked: CompletionRequest) -> "CompletionAnswer":
        """The completions of a request, whose prompts are read on another thread.

        Raises:
          ApiError: The model is unknown, or a prompt does not fit it.
        """
        adapter = server.adapter(asked.model, asked.adapter)
        tokenizer, service = server.model.prompts.tokenizer, server.model.service

        def rows() -> list[Row]:
            found = []
            for prompt in asked.prompts:
                ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                ids = ids or [server.start_id]  # an empty text begins like all texts
                row = Row.text(ids)
                # The last token of a prompt that is only scored is not continued.
                service.check_ids(row.tokens)
                service.check_context(row[:-1] if asked.nothing_new else row, 1)
                found.append(row)
            return found

        try:
            return cls(server, asked, await run_in_threadpool(rows), adapter)
        except UserError as error:
            raise ApiError(str(error), param="prompt") from None

    @contextlib.asynccontextmanager
    async def _parts(self) -> AsyncIterator[AsyncIterator[tuple[int, _Part]]]:
        """What comes of the completions, with the number of each; all wait or run at its start.

        Raises:
          ApiError: The queue is full, or a request does not fit the model.
        """
        asked, scheduler = self._asked, self._server.scheduler
        scored = asked.echo and asked.listed is not None
        known = asked.nothing_new or (scored and self._is_in_scores)
        requests = [] if known else self._requests()
        stop, listed = asked.decoding.stop, asked.listed or 0
        async with answers(scheduler, requests, stop, listed, strip=False) as pieces:
            yield self._all_parts(await self._scores() if scored else None, pieces)

    async def _all_parts(
        self, scores: list[PromptScores] | None, pieces: Numbered
    ) -> AsyncIterator[tuple[int, _Part]]:
        """The prompts where they are echoed, and then the new tokens."""
        asked, count = self._asked, self._asked.decoding.count
        if asked.echo:
            for number in range(len(self._rows) * count):
                prompt = number // count
                part = self._echoed(self._rows[prompt], scores[prompt] if scores else None)
                part.reason = "length" if asked.nothing_new else None
                yield number, part
        if asked.nothing_new:
            return
        if scores is not None and self._is_in_scores:
            for number, one in enumerate(scores):
                yield number, self._next(one)
            return
        async for number, piece in pieces:
            yield number, self._new(piece)

    @property
    def _is_in_scores(self) -> bool:
        """Whether the only new token is the most likely one, which scoring has found already."""
        how, penalty = self._asked.decoding, self._server.penalty
        return how.max_tokens == 1 and not how.sampling.temperature and how.count == penalty == 1

    def _requests(self) -> list[PoolRequest]:
        how = self._asked.decoding
        seeds = range(how.sampling.seed, how.sampling.seed + how.count)
        assert how.max_tokens is not None  # it has a default
        return [
            PoolRequest(
                row,
                how.max_tokens,
                self._adapter,
                dataclasses.replace(how.sampling, seed=seed % 2**32),
                listed=bool(self._asked.listed),
            )
            for row in self._rows
            for seed in seeds
        ]

    async def _scores(self) -> list[PromptScores]:
        """Scores of the tokens of all prompts, those of like length together."""
        order = sorted(range(len(self._rows)), key=lambda n: len(self._rows[n]))
        model, found = self._server.model, {}
        for first in range(0, len(order), SCORED_AT_ONCE):
            numbers = order[first : first + SCORED_AT_ONCE]
            rows = [self._rows[n] for n in numbers]

            def job(adapter: str | None, rows: Sequence[Row] = rows) -> list[PromptScores]:
                names = [adapter] * len(rows) if model.mllm.tuning.held else None
                service = model.service
                # One program, whatever a request lists.
                return score_prompts(
                    model.mllm,
                    service.batch,
                    rows,
                    MAX_LISTED,
                    names,
                    mesh=service.mesh,
                    config=service.config,
                )

            scores = await self._server.call(job, self._adapter)
            found |= zip(numbers, scores, strict=True)
        return [found[n] for n in range(len(order))]

    def _echoed(self, row: Row, scores: PromptScores | None) -> _Part:
        """The prompt as the beginning of a completion."""
        text = self._server.model.prompts.spell(row.tokens)
        if scores is None:
            return _Part(text)
        spell = self._server.spell
        tokens = [TokenInfo(int(row.tokens[0]), spell(int(row.tokens[0])), 0.0)]
        for place, logprob in enumerate(scores.logprobs):
            token = int(row.tokens[place + 1])
            likely = self._likely(scores, place)
            tokens.append(TokenInfo(token, spell(token), float(logprob), likely))
        return _Part(text, tokens, first=True)

    def _likely(self, scores: PromptScores, place: int) -> tuple[tuple[str, float], ...]:
        pairs = zip(scores.likely_ids[place], scores.likely_logprobs[place], strict=True)
        pairs = list(pairs)[: self._asked.listed or 0]
        return tuple((self._server.spell(int(i)), float(p)) for i, p in pairs)

    def _next(self, scores: PromptScores) -> _Part:
        """The most likely token after a prompt as its completion."""
        token, logprob = int(scores.likely_ids[-1, 0]), float(scores.likely_logprobs[-1, 0])
        likely = self._likely(scores, -1)
        prompts = self._server.model.prompts
        info = TokenInfo(token, self._server.spell(token), logprob, likely)
        reason = "stop" if token in prompts.processor.eos_ids else "length"
        return _Part(prompts.spell([token]), [info], reason=reason, count=1)

    def _new(self, piece: AnswerPiece) -> _Part:
        return _Part(piece.text, piece.tokens, reason=piece.reason, count=piece.count)

    async def whole(self) -> dict[str, Any]:
        """All completions in one object."""
        total = len(self._rows) * self._asked.decoding.count
        parts = [_Part() for _ in range(total)]
        async with self._parts() as found:
            async for number, new in found:
                part = parts[number]
                part.text, part.tokens = part.text + new.text, part.tokens + new.tokens
                part.first, part.reason = part.first or new.first, new.reason
                part.count += new.count
        choices = [self._choice(number, part, 0) for number, part in enumerate(parts)]
        usage = self._usage(sum(part.count for part in parts))
        return self._object(choices) | {"usage": usage}

    async def stream(self) -> AsyncGenerator[dict[str, str], None]:
        """Events of a stream; an error under way is its last event.

        Raises:
          ApiError: As `whole`, before the first event.
        """
        how, offsets, new = self._asked.decoding, {}, 0
        with_usage = {"usage": None} if how.with_usage else {}
        async with self._parts() as parts:
            yield {"comment": "begun"}
            try:
                async for number, part in parts:
                    choice = self._choice(number, part, offsets.get(number, 0))
                    offsets[number] = offsets.get(number, 0) + len(part.text)
                    new += part.count
                    yield {"data": json.dumps(self._object([choice]) | with_usage)}
            except ApiError as error:
                yield {"data": json.dumps(error.body)}
                return
        if how.with_usage:
            yield {"data": json.dumps(self._object([]) | {"usage": self._usage(new)})}
        yield {"data": "[DONE]"}

    def _choice(self, number: int, part: _Part, offset: int) -> dict[str, Any]:
        choice = {"index": number, "text": part.text, "finish_reason": part.reason}
        return choice | {"logprobs": self._logprobs(part, offset)}

    def _logprobs(self, part: _Part, offset: int) -> dict[str, Any] | None:
        if self._asked.listed is None:
            return None
        offsets, logprobs, likely = [], [], []
        for number, token in enumerate(part.tokens):
            offsets.append(offset)
            offset += len(token.text)
            alone = part.first and number == 0
            logprobs.append(None if alone else token.logprob)
            best = {token.text: token.logprob}
            for text, logprob in token.likely:
                best[text] = max(best.get(text, logprob), logprob)
            likely.append(None if alone or not self._asked.listed else best)
        return {
            "tokens": [token.text for token in part.tokens],
            "token_logprobs": logprobs,
            "top_logprobs": likely if self._asked.listed else None,
            "text_offset": offsets,
        }

    def _object(self, choices: list[dict]) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "text_completion",
            "created": self._created,
            "model": self._asked.model,
            "system_fingerprint": self._server.fingerprint,
            "choices": choices,
        }

    def _usage(self, new: int) -> dict[str, int]:
        read = sum(map(len, self._rows))
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
