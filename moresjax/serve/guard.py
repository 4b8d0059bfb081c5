"""What every request has to pass before it is read: its host, origin, key and size.

A page of another site must not reach a server on this machine: browsers tell the name that they
were given (`Host`, which a rebound DNS name cannot fake) and the page that asks (`Origin`).
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from moresjax.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
POLICY = (
    "default-src 'self'; img-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


class Guard:
    """Refuses requests that come from elsewhere, have no key or are too large.

    Args:
      app: The application behind it.
      hosts: The names that the server may be called by, beside `LOCAL_HOSTS`.
      api_key: The key that requests to `/v1` and `/metrics` have to bring; None for no key.
      max_body: The most bytes of a request.
    """

    def __init__(
        self, app: App, hosts: tuple[str, ...], api_key: str | None, max_body: int
    ) -> None:
        self._app, self._max_body = app, max_body
        self._hosts = {host.lower() for host in (*LOCAL_HOSTS, *hosts)}
        self._allowed = self._hosts - {*LOCAL_HOSTS}
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            await self._app(scope, self._limited(receive), send_guarded)
        except ApiError as error:
            await error_response(error)(scope, receive, send_guarded)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        address = headers.get(b"host", b"").decode("latin-1")
        host = _parts(f"//{address}")[0]
        if host not in self._hosts:
            raise ApiError(
                f"this server is not called {address}; start it with --allow-host {host} if it is"
                if host
                else f"the header Host must be the name of this server, got {address!r}",
                param="Host",
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        page, place = _parts(origin)
        # Other ports of this machine belong to others; a proxy in front of an allowed name may
        # change the header Host.
        if origin and place != address.lower() and page not in self._allowed:
            raise ApiError(f"pages of {origin} may not use this server", status=403)
        # Files of the page and the sign of life need no key.
        guarded = path.startswith("/v1/") or path == "/metrics"
        if self._key is not None and guarded:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(given.strip(), self._key)
            if scheme.lower() != b"bearer" or not same:
                raise ApiError(
                    "this server wants its key: Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large

    @property
    def _too_large(self) -> ApiError:
        return ApiError(f"the request has more than {self._max_body} bytes", status=413)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts the bytes of a request."""
        total = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_body:
                raise self._too_large
            return message

        return counted


def _parts(address: str) -> tuple[str | None, str]:
    """The host of an address and the host with its port; None and "" where it has none."""
    try:
        parts = urlsplit(address)
        return parts.hostname, parts.netloc.lower()
    except ValueError:  # such as an IPv6 address that does not end
        return None, ""


def error_response(error: ApiError) -> JSONResponse:
    """The response that tells an error."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)
