"""One thread that owns the model: it takes requests while others are decoded.

Requests wait in a queue of limited length and enter the `RowPool` in the order in which they came;
those behind the first that have its shape are read together with it. Whatever else needs the model
(scores, attention, loading an adapter) runs on the same thread between two steps.

Axis legend: N new tokens, K listed tokens.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from moresjax.core.errors import UserError
from moresjax.generation.row_pool import NewTokens, PoolRequest, RowPool
from moresjax.inference.model import Model
from moresjax.serve.errors import ApiError
from moresjax.serve.metrics import Metrics

Tell = Callable[[NewTokens | Exception], None]
T = TypeVar("T")
logger = logging.getLogger(__name__)


GATHERING = 0.5  # seconds that requests wait for others that are to be read together with them
STOPS = "the server stops and answers nothing more"


class QueueFull(Exception):
    """More requests wait than the server holds; come back later."""


@dataclasses.dataclass(frozen=True)
class Together:
    """Requests of several calls that are to be in one batch, such as those of columns on a page.

    Attributes:
      name: What their client calls them.
      count: How many calls there are.
    """

    name: str
    count: int


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
      request: What is asked.
      tell: Called on the scheduler's thread with every `NewTokens`, or with the exception that
        ended the request.
      slot: Its row while it is answered, else None.
      gone: Whether nobody waits for more of the answer.
      answered: Whether that is because the answer has ended, with a stop string.
      together: The requests that it is to be read with.
      call: Tells the tickets of one call from those of others.
      since: When it came, as `time.monotonic` tells it.
    """

    request: PoolRequest
    tell: Tell
    together: Together | None = None
    call: object = None
    since: float = dataclasses.field(default_factory=time.monotonic)
    slot: int | None = None
    gone: bool = False
    answered: bool = False


class Scheduler:
    """Answers requests with one model, many at a time, on a thread of its own.

    Args:
      model: The model, which nobody else uses until `close`.
      rows: How many requests are answered at a time.
      max_waiting: How many more may wait.
      max_new_tokens: The most new tokens that a request may ask for.
      chunk: The most tokens between two looks at who comes and goes.
      metrics: The counters to keep.
      named: The name by which the model knows the adapter of a request when its turn has come; an
        `ApiError` where it has been taken away.
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int = 32,
        max_waiting: int = 256,
        max_new_tokens: int = 2048,
        chunk: int = 8,
        metrics: Metrics | None = None,
        named: Callable[[str | None], str | None] = lambda adapter: adapter,
    ) -> None:
        self._named = named
        self.model, self.metrics = model, metrics or Metrics()
        self.rows, self.max_waiting, self._chunk = rows, max_waiting, chunk
        self.max_new_tokens = min(max_new_tokens, model.service.max_length)
        self._waiting: deque[Ticket] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future, bool]] = deque()
        self._answering: dict[int, Ticket] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._pool: RowPool | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: PoolRequest, tell: Tell) -> Ticket:
        """Puts a request into the queue; see `submit_all`."""
        (ticket,) = self.submit_all([(request, tell)])
        return ticket

    def submit_all(
        self, asked: Sequence[tuple[PoolRequest, Tell]], together: Together | None = None
    ) -> list[Ticket]:
        """Puts requests into the queue, all of them or none.

        Args:
          asked: What is asked, each with what is called on the scheduler's thread with what comes
            of it.
          together: The requests of other calls that they wait for, `GATHERING` seconds at most.

        Raises:
          UserError: A prompt and its new tokens do not fit the model, or there are more requests
            than the queue ever holds.
          QueueFull: Too many requests wait.
          ApiError: The scheduler has been closed.
        """
        for request, _ in asked:
            self.model.service.check_context(request.row, request.max_new_tokens)
            if request.max_new_tokens > self.max_new_tokens:
                raise UserError(
                    f"max_tokens is {request.max_new_tokens}, but this server answers with "
                    f"{self.max_new_tokens} tokens at most"
                )
        if len(asked) > self.max_waiting:
            raise UserError(
                f"{len(asked)} answers are wanted at once, but this server's queue holds "
                f"{self.max_waiting}; ask for fewer in one request"
            )
        call = object()
        tickets = [Ticket(*one, together=together, call=call) for one in asked]
        with self._changed:
            if self._closed:
                raise ApiError(STOPS, 503)
            if len(self._waiting) + len(tickets) > self.max_waiting:
                self.metrics.add("requests_refused", len(tickets))
                raise QueueFull(f"{len(self._waiting)} requests wait already")
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def cancel(self, ticket: Ticket, *, answered: bool = False) -> None:
        """Gives up a request; its row is free before the next step.

        Args:
          ticket: The request; one that has ended may be given up again.
          answered: Whether its answer has ended rather than its reader gone.
        """
        with self._changed:
            ticket.answered |= answered
            ticket.gone = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self.metrics.add("requests_cancelled")
            self._changed.notify()

    def call(self, job: Callable[[], T], *, alone: bool = False) -> "Future[T]":
        """Runs something with the model between two steps.

        Args:
          job: What runs on the scheduler's thread.
          alone: Whether all rows have to end before, and the pool is made anew afterwards: what
            changes the model's tuning does so.

        Returns:
          What comes of it; an `ApiError` once the scheduler has been closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                future.set_exception(ApiError(STOPS, 503))
                return future
            self._jobs.append((job, future, alone))
            self._changed.notify()
        return future

    @property
    def counts(self) -> dict[str, int]:
        """How many requests are answered and how many wait."""
        return {"running": len(self._answering), "waiting": len(self._waiting)}

    def close(self) -> None:
        """Ends the thread; requests under way are told."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._ready() or self._jobs or self._answering):
                    left = [one.since + GATHERING - time.monotonic() for one in self._waiting]
                    self._changed.wait(max(min(left), 0) if left else None)
                if self._closed:
                    break
                gone = [slot for slot, ticket in self._answering.items() if ticket.gone]
            try:
                self._turn(gone)
            except Exception as error:  # whatever JAX raises; the next requests may go well
                logger.exception("a step of the server failed")
                self._fail(error)
        self._fail(ApiError(STOPS, 503), closing=True)

    def _turn(self, gone: list[int]) -> None:
        """Frees rows that nobody waits for, runs jobs, admits requests, and makes a step."""
        if gone and self._pool is not None:
            self._pool.release(gone)
        for slot in gone:
            ticket = self._answering.pop(slot)
            self.metrics.add("requests_answered" if ticket.answered else "requests_cancelled")
        held = self._run_jobs()
        if self._pool is None:
            self._pool = self._make_pool()
        if not held:
            while self._pool.num_free and self._admit(self._pool):
                pass
        few = max(self.rows // 4, 1) if self._waiting else None
        for new in self._pool.step(few):
            ticket = self._answering[new.slot]
            self.metrics.add("generation_tokens", len(new.ids))
            if new.done:
                del self._answering[new.slot]
                self.metrics.add("requests_answered")
            ticket.tell(new)

    def _run_jobs(self) -> bool:
        """Runs the jobs that may run; whether the next one waits until all rows have ended."""
        while True:
            with self._changed:
                if not self._jobs:
                    return False
                job, future, alone = self._jobs[0]
                if alone and self._answering and not future.cancelled():
                    return True
                self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            if alone:
                self._pool = None
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)

    def _ready(self) -> list[Ticket]:
        """The requests that wait for a row only, and for no others; needs the lock."""
        calls: dict[str, set[object]] = {}
        for one in self._waiting:
            if one.together:
                calls.setdefault(one.together.name, set()).add(one.call)
        over = time.monotonic() - GATHERING
        return [
            one
            for one in self._waiting
            if one.together is None
            or len(calls[one.together.name]) >= one.together.count
            or one.since <= over
        ]

    def _admit(self, pool: RowPool) -> bool:
        """Admits the first request that is ready and those of its shape; whether there was one."""
        most = min(pool.num_free, pool.most_at_once)
        with self._changed:
            ready = self._ready()
            if not ready:
                return False
            shape = ready[0].request.shape
            tickets = [one for one in ready if one.request.shape == shape][:most]
            for ticket in tickets:
                self._waiting.remove(ticket)
        tickets, requests = self._resolved(tickets)
        if not tickets:
            return True
        try:
            slots = pool.admit(requests)
        except UserError as error:
            for ticket in tickets:
                ticket.tell(error)
            return True
        except Exception as error:
            for ticket in tickets:
                ticket.tell(error)
            raise
        self.metrics.add("prompt_tokens", sum(len(ticket.request.row) for ticket in tickets))
        for slot, ticket in zip(slots, tickets, strict=True):
            ticket.slot = slot
            self._answering[slot] = ticket
        return True

    def _resolved(self, tickets: list[Ticket]) -> tuple[list[Ticket], list[PoolRequest]]:
        """Requests with their adapters as the model names them; the others are told of it."""
        found = []
        for ticket in tickets:
            try:
                adapter = self._named(ticket.request.adapter)
            except ApiError as error:
                ticket.tell(error)
            else:
                found.append((ticket, dataclasses.replace(ticket.request, adapter=adapter)))
        return [ticket for ticket, _ in found], [request for _, request in found]

    def _make_pool(self) -> RowPool:
        service, prompts = self.model.service, self.model.prompts
        return RowPool(
            service.engine(),
            service.batch,
            rows=self.rows,
            most=self.max_new_tokens,
            chunk=self._chunk,
            listed=min(20, self.model.config.llm.vocab_size),
            penalty=prompts.processor.generation.repetition_penalty,
            adapters=bool(self.model.mllm.tuning.held),
        )

    def _fail(self, error: Exception, *, closing: bool = False) -> None:
        """Tells everybody of an error, and begins with empty rows.

        Those who wait are told as well where there are no rows for them: at the end, and when none
        could be made.
        """
        with self._changed:
            tickets = [*self._answering.values()]
            self._answering.clear()
            if closing or self._pool is None:
                tickets += self._waiting
                self._waiting.clear()
            jobs = [future for _, future, _ in self._jobs] if closing else []
        self._pool = None
        for future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for ticket in tickets:
            ticket.tell(error)
