"""Images at addresses of hosts that whoever starts the server allows; of no others by default.

A server that opens addresses for its clients opens its own network to them. Hence a host has to be
on the list, its address has to be public and is the one that is connected to (a second look-up
might give another), redirects are refused, and size and time are limited. Proxies of the
environment are not used.
"""

import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from moresjax.core.errors import UserError
from moresjax.serve.errors import ApiError

AT_ONCE = 8  # more would hold the threads that read requests
CHUNK = 1 << 16  # bytes
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_fetching = threading.BoundedSemaphore(AT_ONCE)


@dataclasses.dataclass(frozen=True)
class RemoteLimits:
    """What may be fetched.

    Attributes:
      hosts: The hosts, each `NAME` or `NAME:PORT`; without a port those of http and https.
      max_bytes: The most bytes of an image file.
      seconds: The longest that the images of a request may take together.
    """

    hosts: tuple[str, ...] = ()
    max_bytes: int = 32 << 20
    seconds: float = 10.0


def check_host(host: str) -> str:
    """A host as `RemoteLimits` has it.

    >>> check_host("Images.Example.org:8443")
    'images.example.org:8443'

    Raises:
      UserError: It is no name with or without a port, such as an address with a path.
    """
    try:
        parts = urlsplit(f"//{host}")
        known = parts.hostname is not None and parts.netloc == host and not parts.username
        port = parts.port
    except ValueError:
        known, port = False, None
    if not known or "*" in host or host.endswith(":") or port == 0:
        raise UserError(f"--image-host takes NAME or NAME:PORT of a server of images, got {host!r}")
    return host.lower()


def fetch_image(url: str, limits: RemoteLimits, ends: float, param: str) -> bytes:
    """The file at an address of an allowed host.

    Args:
      url: The address.
      limits: What may be fetched.
      ends: When it has to be there, as `time.monotonic` tells it.
      param: The field of the request, for errors.

    Raises:
      ApiError: The address is not allowed, cannot be reached, or what is there is too much.
    """
    parts = _allowed(url, limits, param)
    if not _fetching.acquire(blocking=False):
        raise ApiError(f"{AT_ONCE} images are being fetched; try again later", 429, retry_after=1)
    try:
        return _read(parts, limits, ends, param)
    except (OSError, http.client.HTTPException) as error:
        reason = "it takes too long" if isinstance(error, TimeoutError) else str(error)
        raise ApiError(f"{parts.hostname} gives no image: {reason}", param=param) from None
    finally:
        _fetching.release()


def _allowed(url: str, limits: RemoteLimits, param: str) -> SplitResult:
    """The parts of an address whose host is on the list."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme)
        host = parts.hostname or ""
    except ValueError:
        raise ApiError("the address of an image is none", param=param) from None
    if parts.scheme not in PORTS or parts.username is not None or not host:
        raise ApiError(
            "an image must be a data URI, or an address http(s)://HOST/... without a user's name",
            param=param,
        )
    named = {f"{host}:{port}", *([host] if port == PORTS[parts.scheme] else [])}
    if not named & set(limits.hosts) or not url.isascii() or not url.isprintable() or " " in url:
        raise ApiError(
            f"this server fetches no images of {host[:80]}; those of {', '.join(limits.hosts)} "
            "it does, and data URIs of any",
            param=param,
        )
    return parts


def _read(parts: SplitResult, limits: RemoteLimits, ends: float, param: str) -> bytes:
    """What is at an address."""
    with _connected(parts, ends, param) as connection:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if 300 <= response.status < 400:
            raise ApiError(
                f"{parts.hostname} says that the image is elsewhere; give its own address",
                param=param,
            )
        if response.status != 200:
            raise ApiError(f"{parts.hostname} answers with status {response.status}", param=param)
        found = bytearray()
        while len(found) <= limits.max_bytes and (piece := response.read1(CHUNK)):
            found += piece
        _left(ends)  # what was cut off is not all of it
    if len(found) > limits.max_bytes:
        raise ApiError(
            f"the image of {parts.hostname} has more than {limits.max_bytes} bytes", param=param
        )
    return bytes(found)


def _left(ends: float) -> float:
    """Seconds that are left.

    Raises:
      TimeoutError: There are none.
    """
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextlib.contextmanager
def _connected(parts: SplitResult, ends: float, param: str) -> Iterator[http.client.HTTPConnection]:
    """A connection to the public address of a host, which is cut off when the time is over.

    A time limit for every piece that arrives would not do: a host may send them one by one.
    """
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = sorted({str(info[4][0]) for info in infos})
    if not addresses or not all(map(is_public, addresses)):
        raise ApiError(f"{host} has no public address", param=param)
    sock = socket.create_connection((addresses[0], port), timeout=_left(ends))
    with contextlib.ExitStack() as stack:
        stack.callback(sock.close)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            stack.callback(sock.close)
        cut = threading.Timer(_left(ends), _cut, [sock])
        cut.daemon = True
        cut.start()
        stack.callback(cut.cancel)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        try:
            yield connection
        except (OSError, http.client.HTTPException):
            _left(ends)  # it may be that the connection was cut off
            raise


def _cut(sock: socket.socket) -> None:
    """Ends a connection that another thread waits for."""
    with contextlib.suppress(OSError):  # it has ended
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def is_public(address: str) -> bool:
    """Whether an address is of the internet, and no other that is written in it is not.

    >>> [is_public(address) for address in ("8.8.8.8", "10.0.0.1", "::ffff:127.0.0.1")]
    [True, False, False]
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or found.teredo or found in NAT64
        if inner:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved
