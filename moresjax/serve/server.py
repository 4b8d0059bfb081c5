"""What a server knows: its model under its names, the scheduler, and what steers it."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.row import Row
from moresjax.data.region_providers import OWN_REGIONS
from moresjax.data.samples import Sample
from moresjax.inference.model import Model
from moresjax.serve.chat_request import Decoding
from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields
from moresjax.serve.images import ImageLimits
from moresjax.serve.metrics import Metrics
from moresjax.serve.scheduler import Scheduler
from moresjax.serve.steering import (
    NoRoom,
    ShelfVector,
    SteeredAdapters,
    Steering,
    read_steering,
)
from moresjax.tuning.multi_adapter import BASE

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What a server allows.

    Attributes:
      rows: How many requests are answered at a time.
      max_waiting: How many more may wait; others are refused with status 429.
      max_new_tokens: The most new tokens of an answer.
      default_new_tokens: The most new tokens where a request names no number.
      max_body: The most bytes of a request.
      images: What images a request may have.
      api_key: What clients have to send as a bearer token; None for no key.
      hosts: The names that the server may be called by, beside those of this machine itself.
    """

    rows: int = 32
    max_waiting: int = 256
    max_new_tokens: int = 2048
    default_new_tokens: int = 512
    max_body: int = 64 << 20
    images: ImageLimits = dataclasses.field(default_factory=ImageLimits)
    api_key: str | None = dataclasses.field(default=None, repr=False)
    hosts: tuple[str, ...] = ()


DEFAULT_CONFIG = ServerConfig()


class Server:
    """A model under its names, answered by a scheduler.

    Args:
      model: The model, which belongs to the server until `close`.
      name: The name of the base model.
      config: What the server allows.
      shelf: The steering vectors that clients know by name.
      folders: The folders of the model and its adapters by name, which `models` tells.

    Attributes:
      adapters: The names of the adapters that clients choose from.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        config: ServerConfig = DEFAULT_CONFIG,
        shelf: Mapping[str, ShelfVector] | None = None,
        folders: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.adapters, self.shelf = model.adapters, dict(shelf or {})
        self._folders = dict(folders or {})
        self._tuning = "none" if model.adapters else model.tuning
        self._steered = SteeredAdapters(model, steers=bool(shelf))
        self.model, self.name, self.config = model, name, config
        self.created = int(time.time())
        self.metrics = Metrics()
        self.fingerprint = f"fp_{model.fingerprint}"
        self.scheduler = Scheduler(
            model,
            rows=config.rows,
            max_waiting=config.max_waiting,
            max_new_tokens=config.max_new_tokens,
            metrics=self.metrics,
            named=self._steered.named,
        )
        self._preparing = threading.Lock()

    @property
    def penalty(self) -> float:
        """The repetition penalty of the model's folder; 1 for none."""
        return self.model.prompts.processor.generation.repetition_penalty

    @property
    def start_id(self) -> int:
        """The token that stands before a text that has nothing before it."""
        tokenizer = self.model.prompts.tokenizer
        bos = tokenizer.bos_token_id
        return tokenizer.eos_token_id if bos is None else bos

    def spell(self, token: int) -> str:
        """A single token as text, special ones included."""
        return self.model.prompts.tokenizer.decode([token])

    def close(self) -> None:
        """Ends the scheduler."""
        self.scheduler.close()

    def models(self) -> list[dict[str, Any]]:
        """The base model and its adapters, as OpenAI's API lists them."""
        base = {"id": self.name, "object": "model", "created": self.created}
        base |= {
            "owned_by": "moresjax",
            "root": str(self._folders.get(self.name, self.name)),
            "parent": None,
        }
        base["max_model_len"] = self.model.service.max_length
        base["tuning"] = self._tuning
        own = {name: str(self._folders.get(name, name)) for name in self.adapters}
        more = {"parent": self.name}
        adapters = [base | more | {"id": n, "root": own[n], "tuning": self._spec(n)} for n in own]
        return [base, *adapters]

    def _spec(self, adapter: str) -> str:
        """The spec of an adapter's tuning."""
        held = self.model.mllm.tuning.held
        own = held.source.adapters.get(adapter) if held else None
        return "none" if own is None else own.tuning.spec

    def adapter(self, model: str, adapter: str | None) -> str | None:
        """The adapter that answers for a model's name; None for the model as it was loaded.

        Raises:
          ApiError: There is no such model or adapter.
        """
        chosen = None
        for name, param in ((model, "model"), (adapter, "adapter")):
            if name is None:
                continue
            if name in self.adapters:
                chosen = name
            elif name == self.name or (param == "adapter" and name == BASE):
                chosen = None
            else:
                known = ", ".join((self.name, *self.adapters))
                raise ApiError(
                    f"the {param} {name!r} does not exist; there are {known}",
                    status=404,
                    param=param,
                    code="model_not_found",
                )
        return chosen

    async def load_adapter(self, name: str, folder: str) -> None:
        """Puts an adapter beside the others, once the answers under way have ended.

        Raises:
          ApiError: The name is taken or not printable, or the folder is no adapter of this model.
        """
        if not name.isprintable():
            raise ApiError(f"the name {name!r} has control characters", param="lora_name")
        self._check_free(name)

        def job() -> None:
            self._check_free(name)  # another request may have taken it meanwhile
            self._steered.keep_own()
            self.model.load_adapters({name: folder})
            self.adapters = (*self.adapters, name)
            self._folders[name] = folder

        await self._change(job, "lora_path")

    def _check_free(self, name: str) -> None:
        if name in (self.name, BASE, *self.adapters):
            raise ApiError(f"there is a model {name!r} already", param="lora_name")

    async def unload_adapter(self, name: str) -> None:
        """Takes an adapter away, once the answers under way have ended.

        Raises:
          ApiError: There is no such adapter.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ApiError(
                f"there is no adapter {name!r}; there are {known}", 404, "lora_name", "not_found"
            )

        def job() -> None:
            self.model.unload_adapter(name)
            self._steered.forget(name)
            self.adapters = tuple(other for other in self.adapters if other != name)

        await self._change(job, "lora_name")

    async def _change(self, job: Callable[[], None], param: str) -> None:
        await _ended(self.scheduler.call(job, alone=True), param)

    async def call(self, job: Callable[[str | None], T], adapter: str | None) -> T:
        """Runs something with an adapter between two steps of the scheduler.

        Args:
          job: What is run, given the name by which the model knows the adapter.
          adapter: The adapter; None for the model as it was loaded.

        Raises:
          ApiError: The adapter has been taken away, or the job raises a `UserError`.
        """
        return await _ended(self.scheduler.call(lambda: job(self._steered.named(adapter))))

    def steering(self, given: Any) -> Steering | None:
        """The field `steer` of a request; None where it adds nothing.

        Raises:
          ApiError: It is wrong.
        """
        llm = self.model.config.llm
        return read_steering(given, self.shelf, llm.hidden_size, llm.num_layers)

    @contextlib.asynccontextmanager
    async def steered(
        self, adapter: str | None, steering: Steering | None
    ) -> AsyncIterator[str | None]:
        """The adapter with a steering, which is held as long as the context lasts.

        Raises:
          ApiError: Too many steerings are under way, or a selector does not fit the model.
        """
        if steering is None:
            yield adapter
            return
        try:
            name = await self._hold(adapter, steering, may_compile=False)
        except NoRoom:
            name = await self._hold(adapter, steering, may_compile=True)
        try:
            yield name
        finally:
            self.scheduler.call(lambda: self._steered.release(name))

    async def _hold(self, adapter: str | None, steering: Steering, *, may_compile: bool) -> str:
        """The name of an adapter with a steering; once all answers have ended if it may compile."""

        def job() -> str:
            return self._steered.hold(adapter, steering, may_compile=may_compile)

        future = self.scheduler.call(job, alone=may_compile)
        try:
            return await _ended(future, "steer")
        except asyncio.CancelledError:  # the client has gone, but the job may run already
            self.scheduler.call(lambda: _release_if_held(self._steered, future))
            raise

    def prepare(self, sample: Sample) -> Row:
        """The row of a conversation; on a thread of its own, for images are decoded.

        Raises:
          ApiError: The model cannot read it.
        """
        prompts = self.model.prompts
        try:
            with self._preparing:
                system = prompts.system_prompt(sample.system)
                sample, regions = dataclasses.replace(sample, system=system), None
                if prompts.asks_model(sample):  # which the scheduler's thread alone may run
                    looks = functools.partial(prompts.attended, sample)
                    sample, regions = self.scheduler.call(looks).result(), OWN_REGIONS
                return prompts.sample_row(sample, regions=regions)
        except UserError as error:
            raise ApiError(str(error), param="messages") from None

    def answer_ids(self, fields: Fields, sample: Sample) -> list[int]:
        """The tokens of a given answer: its `answer_ids`, or those that the text `answer` has.

        It waits for prompts that are prepared, hence runs on a thread of its own.

        Args:
          fields: The request.
          sample: Its conversation.

        Raises:
          ApiError: There is no answer, or it does not fit the model.
        """
        ids, text = fields.get("answer_ids"), fields.text("answer")
        if ids is not None:
            size = self.model.config.llm.vocab_size
            fine = isinstance(ids, list) and all(type(x) is int and 0 <= x < size for x in ids)
            if not fine or not ids:
                raise fields.wrong("answer_ids", "token ids")
            return ids
        if not text:
            raise ApiError("give the tokens of an answer as answer_ids, or its text as answer")
        last = dataclasses.replace(sample.turns[-1], answer=text)
        sample = dataclasses.replace(sample, turns=(*sample.turns[:-1], last))
        try:
            with self._preparing:
                row = self.model.prompts.processor.without_end.text_row(sample)
        except UserError as error:
            raise ApiError(str(error), param="answer") from None
        ends = np.flatnonzero(row.kind != TokenKind.ANSWER)  # the last of them opens the answer
        return row.tokens[int(ends[-1]) + 1 :].tolist()

    def limit(self, row: Row, decoding: Decoding) -> int:
        """The most new tokens of an answer to a prompt."""
        if decoding.max_tokens is not None:
            return decoding.max_tokens
        room = self.model.service.max_length - len(row)
        return max(min(self.config.default_new_tokens, self.scheduler.max_new_tokens, room), 1)


async def _ended(future: "Future[T]", param: str | None = None) -> T:
    """What a job on the scheduler's thread gives.

    Raises:
      ApiError: It raises this or a `UserError`.
    """
    try:
        return await asyncio.wrap_future(future)
    except UserError as error:
        raise ApiError(str(error), param=param) from None


def _release_if_held(steered: SteeredAdapters, future: "Future[str]") -> None:
    """Gives up what a job may have held; runs after the job, on its thread."""
    if future.done() and not future.cancelled() and future.exception() is None:
        steered.release(future.result())
