"""A server on a socket of this machine, until it is interrupted."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from moresjax.core.errors import UserError
from moresjax.data.samples import Sample, Turn
from moresjax.generation.row_pool import PoolRequest
from moresjax.serve.app import make_app
from moresjax.serve.pieces import answers
from moresjax.serve.server import Server


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one.

    Raises:
      UserError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        reason = error.strerror or error
        raise UserError(f"{host}:{port} cannot be listened at: {reason}; try --port 0") from None
    return sock


def make_uvicorn(server: Server) -> uvicorn.Server:
    """The HTTP server around an application; nothing of a request is written to a log."""
    config = uvicorn.Config(
        make_app(server),
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    return uvicorn.Server(config)


def serve(server: Server, host: str, port: int, *, as_json: bool = False) -> None:
    """Serves until it is interrupted.

    Args:
      server: The server, which is closed at the end.
      host: The address to listen at.
      port: The port; 0 takes a free one.
      as_json: Whether the address is printed as JSON.

    Raises:
      UserError: The address cannot be had.
    """
    try:
        sock = bound_socket(host, port)
    except UserError:
        server.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{sock.getsockname()[1]}"
    names = [one["id"] for one in server.models()]
    text = f"{', '.join(names)} at {url} (API at {url}/v1); Ctrl-C ends"
    print(json.dumps({"url": url, "models": names}) if as_json else text, flush=True)
    make_uvicorn(server).run(sockets=[sock])


def check(server: Server) -> None:
    """Answers one question with one token, which shows that all is there, and closes the server.

    Raises:
      UserError: The model cannot answer.
    """

    async def answer() -> int:
        row = server.prepare(Sample("the check", (Turn("hello"),)))
        async with answers(server.scheduler, [PoolRequest(row, 1)]) as pieces:
            return sum([piece.count async for _, piece in pieces])

    try:
        asyncio.run(answer())
    finally:
        server.close()


@contextlib.contextmanager
def running(server: Server, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves on a thread at a free port while the context lasts, and gives the address.

    Args:
      server: The server, which is closed at the end.
      host: The address to listen at.
    """
    sock = bound_socket(host, 0)
    http = make_uvicorn(server)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not http.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://{host}:{sock.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join()
        sock.close()
