"""Answers of `/v1/chat/completions`, whole or as a stream of chunks."""

import contextlib
import dataclasses
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from moresjax.core.row import Row
from moresjax.generation.row_pool import PoolRequest
from moresjax.serve.attention import answer_attention, head_maps
from moresjax.serve.chat_request import ChatRequest
from moresjax.serve.errors import ApiError
from moresjax.serve.pieces import Numbered, TokenInfo, answers
from moresjax.serve.server import Server


class ChatAnswer:
    """The answers to one request.

    Args:
      server: The server.
      asked: The request, whose images are in the row.
      row: Its prompt.
      adapter: The adapter that answers.
    """

    def __init__(self, server: Server, asked: ChatRequest, row: Row, adapter: str | None) -> None:
        self._server, self._asked, self._row, self._adapter = server, asked, row, adapter
        self._steering = server.steering(asked.steer)
        self._name = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    @classmethod
    async def of(cls, server: Server, asked: ChatRequest) -> "ChatAnswer":
        """The answers to a request, whose prompt is read on another thread.

        Raises:
          ApiError: The model is unknown or cannot read the prompt.
        """
        adapter = server.adapter(asked.model, asked.adapter)
        row = await run_in_threadpool(server.prepare, asked.sample)
        without_files = dataclasses.replace(asked.sample, images=())
        return cls(server, dataclasses.replace(asked, sample=without_files), row, adapter)

    async def head_maps(self, ids: list[int], token: int) -> dict[str, Any]:
        """Where every head looks for one token of an answer; see `head_maps`."""
        job = functools.partial(head_maps, self._server.model, self._row, ids, token)
        async with self._server.steered(self._adapter, self._steering) as name:
            return await self._server.call(job, name)

    def _requests(self, adapter: str | None) -> list[PoolRequest]:
        """A request to an adapter for each answer, with a seed of its own."""
        decoding = self._asked.decoding
        limit = self._server.limit(self._row, decoding)
        sampling = decoding.sampling
        return [
            PoolRequest(
                self._row,
                limit,
                adapter,
                dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32),
                listed=self._asked.top_logprobs > 0,
            )
            for number in range(decoding.count)
        ]

    @contextlib.asynccontextmanager
    async def pieces(self) -> AsyncIterator[Numbered]:
        """The pieces of all answers, with the number of the answer; all wait or run at its start.

        Raises:
          ApiError: The queue is full, or a request does not fit the model.
        """
        server, stop, top = self._server, self._asked.decoding.stop, self._asked.top_logprobs
        async with (
            server.steered(self._adapter, self._steering) as name,
            answers(
                server.scheduler, self._requests(name), stop, top, together=self._asked.together
            ) as pieces,
        ):
            yield pieces

    async def whole(self) -> dict[str, Any]:
        """All answers in one object."""
        count = self._asked.decoding.count
        texts, tokens, reasons, total = [""] * count, [[] for _ in range(count)], [""] * count, 0
        async with self.pieces() as pieces:
            async for number, piece in pieces:
                texts[number] += piece.text
                tokens[number] += piece.tokens
                reasons[number] = piece.reason or ""
                total += piece.count
        choices = []
        for number in range(count):
            message = {"role": "assistant", "content": texts[number], "refusal": None}
            choice = {"index": number, "message": message, "finish_reason": reasons[number]}
            choice |= {"logprobs": self._logprobs(tokens[number])}
            choices.append(choice | (await self._attention(number, tokens[number], 0)))
        return self._object("chat.completion", choices) | {"usage": self._usage(total)}

    async def stream(self) -> AsyncGenerator[dict[str, str], None]:
        """Events of a stream; an error under way is its last event.

        Raises:
          ApiError: As `pieces`, before the first event.
        """
        total, decoding, first = 0, self._asked.decoding, []
        with_usage = {"usage": None} if decoding.with_usage else {}

        def event(choices: list[dict], **more: Any) -> dict[str, str]:
            chunk = self._object("chat.completion.chunk", choices) | with_usage | more
            return {"data": json.dumps(chunk, ensure_ascii=False)}

        async with self.pieces() as pieces:
            for number in range(decoding.count):
                delta = {"role": "assistant", "content": ""}
                yield event([self._delta(number, delta, None, None)])
            try:
                async for number, piece in pieces:
                    total += piece.count
                    said = first if number == 0 else []
                    told = len(said)
                    said += piece.tokens
                    if piece.text or piece.tokens:
                        delta, logprobs = {"content": piece.text}, self._logprobs(piece.tokens)
                        choice = self._delta(number, delta, logprobs, None)
                        yield event([choice | (await self._attention(number, said, told))])
                    if piece.reason:
                        yield event([self._delta(number, {}, None, piece.reason)])
            except ApiError as error:
                yield {"data": json.dumps(error.body)}
                return
        if decoding.with_usage:
            yield event([], usage=self._usage(total))
        yield {"data": "[DONE]"}

    def _delta(self, number: int, delta: dict, logprobs: Any, reason: str | None) -> dict:
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    async def _attention(
        self, number: int, tokens: Sequence[TokenInfo], first: int
    ) -> dict[str, Any]:
        """What tokens of the first answer look at, where that is wanted.

        Args:
          number: The number of the answer.
          tokens: Its tokens so far.
          first: How many of them were looked at before.
        """
        if not self._asked.attention or number:
            return {}
        ids = [token.id for token in tokens]
        job = functools.partial(answer_attention, self._server.model, self._row, ids, first)
        async with self._server.steered(self._adapter, self._steering) as name:
            return {"attention": await self._server.call(job, name)}

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        return {"content": [token.to_dict() for token in tokens], "refusal": None}

    def _object(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "system_fingerprint": self._server.fingerprint,
            "choices": choices,
        }

    def _usage(self, new: int) -> dict[str, int]:
        read = len(self._row)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
