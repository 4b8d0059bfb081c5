"""The HTTP application: routes, and what each of them answers."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from moresjax.serve.chat_answers import ChatAnswer
from moresjax.serve.chat_request import read_chat
from moresjax.serve.completions import CompletionAnswer, read_completion
from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields
from moresjax.serve.guard import App, Guard, error_response
from moresjax.serve.samples import sample_images
from moresjax.serve.server import Server

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
PING = 15  # seconds between signs of life of a stream
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def make_app(server: Server) -> App:
    """The ASGI application of a server.

    Args:
      server: The server, which the application closes when it ends.
    """
    handlers = Handlers(server)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(server.close)

    app = Starlette(
        routes=[
            Route("/health", handlers.health),
            Route("/metrics", handlers.metrics),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/v1/attention", handlers.attention, methods=["POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/load_lora_adapter", handlers.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", handlers.unload_adapter, methods=["POST"]),
            Route("/v1/steering_vectors", handlers.vectors),
            Route("/v1/samples", handlers.samples),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        exception_handlers={ApiError: _told, HTTPException: _told_http, Exception: _failed},
        lifespan=lifespan,
    )
    config = server.config
    return Guard(app, config.hosts, config.api_key, config.max_body)


class Handlers:
    """What the routes answer.

    Args:
      server: The server.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    async def health(self, _: Request) -> Response:
        """That the server lives."""
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        """Counters for Prometheus."""
        counts = self._server.scheduler.counts | {"rows": self._server.config.rows}
        return PlainTextResponse(self._server.metrics.text(counts))

    async def models(self, _: Request) -> Response:
        """The base model and its adapters."""
        return JSONResponse({"object": "list", "data": self._server.models()})

    async def model(self, request: Request) -> Response:
        """One of the models."""
        name = request.path_params["name"]
        self._server.adapter(name, None)
        return JSONResponse(next(one for one in self._server.models() if one["id"] == name))

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        answer, streams = await self._chat(request)
        if streams:
            return await streamed(request, answer.stream())
        return JSONResponse(await unless_closed(request, answer.whole()))

    async def _chat(self, request: Request) -> tuple[ChatAnswer, bool]:
        """The answers to a request, whose body is not kept, and whether they are streamed."""
        body = await read_json(request)
        asked = await run_in_threadpool(read_chat, body, self._server.config.images)
        return await ChatAnswer.of(self._server, asked), asked.decoding.stream

    async def attention(self, request: Request) -> Response:
        """Where every head looks for one token of a given answer."""
        body = await read_json(request)
        fields = Fields(body)
        asked = await run_in_threadpool(read_chat, body, self._server.config.images)
        if not asked.sample.images:
            raise ApiError("a map of attention needs an image", param="messages")
        answer = await ChatAnswer.of(self._server, asked)
        ids = await run_in_threadpool(self._server.answer_ids, fields, asked.sample)
        token = fields.whole("token", 0, 0, len(ids) - 1)
        return JSONResponse(await unless_closed(request, answer.head_maps(ids, token)))

    async def completions(self, request: Request) -> Response:
        """Goes on with raw texts."""
        body = await read_json(request)
        asked = await run_in_threadpool(read_completion, body)
        completion = await CompletionAnswer.of(self._server, asked)
        if asked.decoding.stream:
            return await streamed(request, completion.stream())
        return JSONResponse(await unless_closed(request, completion.whole()))

    async def load_adapter(self, request: Request) -> Response:
        """Puts an adapter of a folder of this machine beside the others."""
        fields = Fields(await read_json(request))
        name, path = fields.text("lora_name"), fields.text("lora_path")
        if not name or not path:
            raise ApiError("lora_name and lora_path must be texts")
        await self._server.load_adapter(name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        """Takes an adapter away."""
        name = Fields(await read_json(request)).text("lora_name")
        if not name:
            raise ApiError("lora_name must be a text")
        await self._server.unload_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def vectors(self, _: Request) -> Response:
        """The shelf of steering vectors."""
        return JSONResponse({"data": [one.to_dict() for one in self._server.shelf.values()]})

    async def samples(self, _: Request) -> Response:
        """Images of the built-in world to try."""
        return JSONResponse({"data": await run_in_threadpool(sample_images)})


async def read_json(request: Request) -> Any:
    """The body of a request, which is not kept.

    Raises:
      ApiError: It is no JSON, or has texts that are no Unicode.
    """
    try:
        text = b"".join([chunk async for chunk in request.stream()]).decode("utf-8-sig")
        found = json.loads(text)
        if SURROGATE.search(text):  # half a pair is a text for Python, but has no bytes
            json.dumps(found, ensure_ascii=False).encode()
    except ClientDisconnect:
        raise ApiError("the client has closed the connection", status=499) from None
    except UnicodeError:
        raise ApiError("the body of the request is not valid Unicode") from None
    except (ValueError, RecursionError):
        raise ApiError("the body of the request is no JSON") from None
    return found


async def streamed(request: Request, events: AsyncGenerator[dict[str, str], None]) -> Response:
    """A response that streams events; what is refused before the first has its own status.

    Raises:
      ApiError: The request is refused, or its client has gone.
    """

    async def begun() -> dict[str, str]:
        return await anext(events)

    first = await unless_closed(request, begun())

    async def all_events() -> AsyncIterator[dict[str, str]]:
        async with contextlib.aclosing(events):
            yield first
            async for event in events:
                yield event

    return EventSourceResponse(all_events(), sep="\n", ping=PING)


async def unless_closed(request: Request, answer: Awaitable[T]) -> T:
    """The answer, which is given up when the client closes the connection.

    Raises:
      ApiError: The client has gone.
    """
    task = asyncio.ensure_future(answer)

    async def closed() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(closed())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client has closed the connection", status=499)
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _told_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(f"{request.url.path}: {error.detail}", status=error.status_code))


async def _failed(_: Request, error: Exception) -> Response:
    return error_response(ApiError("the server failed; its log says why", status=500))
