"""Nothing is fetched unless somebody says so."""

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator

# Audit events of the standard library, whose sockets nearly all Python code uses, with the place of
# the host or the address among their arguments.
_EVENTS = {"socket.connect": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


class _Closed(threading.local):
    depth = 0


_closed = _Closed()


@contextlib.contextmanager
def closed_network() -> Iterator[None]:
    """Fails what connects from this thread to another machine, with a `ConnectionError`.

    For code of others that fetches what it lacks without asking. Connections within this machine go
    on.

    >>> import socket
    >>> with closed_network():
    ...     socket.create_connection(("example.org", 80))
    Traceback (most recent call last):
    ...
    ConnectionError: the network is closed here; 'example.org' is not reached
    """
    _install()
    _closed.depth += 1
    try:
        yield
    finally:
        _closed.depth -= 1


@functools.cache
def _install() -> None:
    sys.addaudithook(_audit)  # for good: audit hooks cannot be taken away


def _audit(event: str, arguments: tuple) -> None:
    if not _closed.depth or event not in _EVENTS:
        return
    target = arguments[_EVENTS[event]]
    if event == "socket.connect" and not isinstance(target, tuple):
        return  # a socket of this machine, which has a path
    host = target[0] if isinstance(target, tuple) else target
    host = host.decode() if isinstance(host, bytes) else host
    if host and host not in ("localhost", "::1") and not host.startswith("127."):
        raise ConnectionError(f"the network is closed here; {host!r} is not reached")
