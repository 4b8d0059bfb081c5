"""Answers piece by piece: what the scheduler tells of a request, as text and tokens.

Axis legend: N new tokens, K listed tokens.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.types import Ids
from moresjax.generation.row_pool import NewTokens, PoolRequest
from moresjax.generation.text import TextStream, has_stop
from moresjax.serve.errors import ApiError
from moresjax.serve.scheduler import QueueFull, Scheduler, Tell, Ticket, Together

Events = asyncio.Queue[NewTokens | Exception]


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """A new token and what might have stood in its place.

    Attributes:
      id: Its id.
      text: Its text.
      logprob: Its natural log-probability.
      likely: Text and log-probability of the most likely tokens.
    """

    id: int
    text: str
    logprob: float
    likely: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The token as OpenAI's chat API writes it."""
        return _token(self.text, self.logprob) | {
            "top_logprobs": [_token(text, logprob) for text, logprob in self.likely]
        }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


@dataclasses.dataclass(frozen=True)
class AnswerPiece:
    """A piece of an answer.

    Attributes:
      text: Text that never changes again.
      tokens: The new tokens behind it, without the one that ends the answer.
      count: How many tokens that is, the end token included.
      reason: `stop` or `length` with the last piece, else None.
    """

    text: str
    tokens: list[TokenInfo]
    count: int
    reason: str | None


Numbered = AsyncGenerator[tuple[int, AnswerPiece], None]


@contextlib.asynccontextmanager
async def answers(
    scheduler: Scheduler,
    requests: Sequence[PoolRequest],
    stop: Sequence[str] = (),
    top: int = 0,
    *,
    strip: bool = True,
    together: Together | None = None,
) -> AsyncIterator[Numbered]:
    """The pieces of some answers in the order in which they come, with the number of the request.

    All requests are in the queue once the context is entered; when it is left their rows are free.

    Args:
      scheduler: Who answers.
      requests: What is asked.
      stop: An answer ends before the first of these strings.
      top: How many likely tokens each token has.
      strip: Whether blanks around an answer are left out.
      together: The requests of other calls that they are to be read with.

    Raises:
      ApiError: A request does not fit the model, or the queue is full. The iterator raises it when
        an answer fails.
    """
    loop = asyncio.get_running_loop()
    queues: list[Events] = [asyncio.Queue() for _ in requests]

    def teller(queue: Events) -> Tell:
        def tell(event: NewTokens | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, event)

        return tell

    asked = list(zip(requests, map(teller, queues), strict=True))
    tickets = _submit(scheduler, asked, together)
    pairs = zip(tickets, queues, strict=True)
    try:
        readers = [_pieces(scheduler, *pair, stop, top, strip=strip) for pair in pairs]
        async with contextlib.aclosing(merged(readers)) as pieces:
            yield pieces
    finally:
        for ticket in tickets:
            scheduler.cancel(ticket)


def _submit(
    scheduler: Scheduler, asked: Sequence[tuple[PoolRequest, Tell]], together: Together | None
) -> list[Ticket]:
    try:
        return scheduler.submit_all(asked, together)
    except UserError as error:
        raise ApiError(str(error)) from None
    except QueueFull as error:
        raise ApiError(f"{error}; try again later", status=429, retry_after=1) from None


async def _pieces(
    scheduler: Scheduler,
    ticket: Ticket,
    events: Events,
    stop: Sequence[str],
    top: int,
    *,
    strip: bool,
) -> AsyncGenerator[AnswerPiece, None]:
    """The pieces of one answer."""
    prompts = scheduler.model.prompts
    stream = TextStream(prompts.spell, stop, strip=strip)
    ends, ids = set(prompts.processor.eos_ids), []
    while True:
        event = await events.get()
        if isinstance(event, Exception):
            raise _failure(event)
        before = len(ids)
        ids += event.ids.tolist()
        stopped = bool(stop) and has_stop(prompts.spell(ids), stop)
        if stopped:
            scheduler.cancel(ticket, answered=True)
            del ids[_length_with_stop(prompts.spell, ids, stop, before) :]
        final = event.done or stopped
        text = stream.push(ids, final)
        ended = final and bool(ids) and ids[-1] in ends
        kept = ids[before:-1] if ended else ids[before:]
        reason = None if not final else "stop" if ended or stopped else "length"
        infos = _infos(lambda token: prompts.tokenizer.decode([token]), kept, event, top)
        yield AnswerPiece(text, infos, len(ids) - before, reason)
        if final:
            return


def _infos(
    spell: Callable[[int], str], ids: Ids | list[int], new: NewTokens, top: int
) -> list[TokenInfo]:
    """New tokens with their texts and what might have stood there."""
    found = []
    for number, token in enumerate(ids):
        likely: tuple[tuple[str, float], ...] = ()
        if new.likely_ids is not None and new.likely_logprobs is not None:
            pairs = zip(new.likely_ids[number], new.likely_logprobs[number], strict=True)
            likely = tuple((spell(int(i)), float(p)) for i, p in list(pairs)[:top])
        found.append(TokenInfo(token, spell(token), float(new.logprobs[number]), likely))
    return found


def _length_with_stop(
    spell: Callable[[Ids], str], ids: list[int], stop: Sequence[str], least: int
) -> int:
    """How many tokens there are up to the end of the first stop string."""
    lengths = range(least + 1, len(ids))
    return next((n for n in lengths if has_stop(spell(np.asarray(ids[:n])), stop)), len(ids))


def _failure(error: Exception) -> ApiError:
    """What a client is told of an error on the scheduler's thread."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(str(error))
    return ApiError("the server failed to answer; its log says why", status=500)


async def merged(readers: Sequence[AsyncGenerator[AnswerPiece, None]]) -> Numbered:
    """What several readers give, in the order in which it comes, with the reader's number.

    When nobody reads on, or a reader fails, all readers end.
    """
    events: asyncio.Queue[tuple[int, AnswerPiece | Exception | None]] = asyncio.Queue()

    async def follow(number: int, reader: AsyncGenerator[AnswerPiece, None]) -> None:
        try:
            async for piece in reader:
                events.put_nowait((number, piece))
            events.put_nowait((number, None))
        except Exception as error:
            events.put_nowait((number, error))

    tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(readers)]
    try:
        left = len(tasks)
        while left:
            number, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                left -= 1
            else:
                yield number, event
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for reader in readers:
            await reader.aclose()
