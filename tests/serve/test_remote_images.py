"""Images at addresses: of allowed public hosts only, and never more or longer than is allowed."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from moresjax.core.errors import UserError
from moresjax.serve import remote_images
from moresjax.serve.chat_request import read_messages
from moresjax.serve.errors import ApiError
from moresjax.serve.images import ImageLimits
from moresjax.serve.remote_images import RemoteLimits, check_host, fetch_image, is_public

HOST = "images.example"


class Handler(http.server.BaseHTTPRequestHandler):
    """A server of images of which some addresses are traps."""

    asked: list = []
    picture = b""
    released = threading.Event()

    def do_GET(self):
        self.asked.append((self.path, self.headers["Host"]))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
        elif self.path == "/drip":
            with contextlib.suppress(OSError):
                while not self.released.wait(0.02):
                    self.wfile.write(b"H")
            return
        elif self.path.startswith("/a.png") or self.path in ("/endless", "/slow"):
            self.send_response(200)
        else:
            self.send_response(404)
        self.end_headers()
        if self.path.startswith("/a.png"):
            self.wfile.write(self.picture)
        elif self.path == "/slow":
            self.wfile.write(b"x")
            self.released.wait(10)
        elif self.path == "/endless":
            while not self.released.is_set():
                try:
                    self.wfile.write(b"x" * 1000)
                except OSError:
                    return

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(picture):
    """The port of a server that is called `HOST`."""
    Handler.picture = picture
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    Handler.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def public(monkeypatch):
    """The name has the address of this machine, which counts as public."""
    real, looked = socket.getaddrinfo, []

    def found(host, *args, **more):
        looked.append(host)
        return real("127.0.0.1", *args, **more)

    monkeypatch.setattr(remote_images.socket, "getaddrinfo", found)
    monkeypatch.setattr(remote_images, "is_public", lambda address: address == "127.0.0.1")
    return looked


def limits(port, **more):
    return RemoteLimits((f"{HOST}:{port}",), **more)


def fetch(url, given, seconds=5.0):
    return fetch_image(url, given, time.monotonic() + seconds, "url")


def said(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "what ?"}, part]}]


def test_an_image_of_an_allowed_host_is_that_of_a_data_uri(address, public, picture):
    url = f"http://{HOST}:{address}/a.png?size=1"
    sample = read_messages(said(url), ImageLimits(remote=limits(address)))
    assert sample.images == (picture,)
    assert Handler.asked[-1] == ("/a.png?size=1", f"{HOST}:{address}")
    # Looked up once: the address that was checked is the one that is connected to.
    assert public == [HOST, "127.0.0.1"]


def test_nothing_is_fetched_by_default(address, public):
    before = len(Handler.asked)
    with pytest.raises(ApiError, match="this server fetches no addresses"):
        read_messages(said(f"http://{HOST}:{address}/a.png"), ImageLimits())
    assert (public, len(Handler.asked)) == ([], before)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/a.png",
        "http://other.example:{port}/a.png",
        "http://images.example.evil.example:{port}/a.png",
        "http://images.example/a.png",  # another port
        "http://user@images.example:{port}/a.png",
        "http://images.example:{port}@127.0.0.1/a.png",
        "http://images.example:{port}/a b\r\nX: y",
        "http://images.example:99999/a.png",
        "http://[::1/a.png",
        "file:///etc/passwd",
        "ftp://images.example/a.png",
        "//images.example/a.png",
        "",
    ],
)
def test_other_addresses_are_refused_before_anything_is_looked_up(address, public, url):
    before = len(Handler.asked)
    with pytest.raises(ApiError) as told:
        read_messages(said(url.format(port=address)), ImageLimits(remote=limits(address)))
    assert told.value.status == 400
    assert (public, len(Handler.asked)) == ([], before)


def test_a_host_with_an_address_of_this_network_is_refused(address, monkeypatch):
    """Also where one of several addresses is: a name is whatever its owner says."""
    before, infos = len(Handler.asked), []
    monkeypatch.setattr(remote_images.socket, "getaddrinfo", lambda *_, **__: infos)
    for found in (["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::1"], ["169.254.169.254"], []):
        infos[:] = [(None, None, None, "", (one, address)) for one in found]
        with pytest.raises(ApiError, match="has no public address"):
            fetch(f"http://{HOST}:{address}/a.png", limits(address))
    assert len(Handler.asked) == before


def test_which_addresses_are_public():
    for address in (
        *("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "::", "::1", "fe80::1%eth0"),
        *("fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1"),
        *("2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1"),
    ):
        assert not is_public(address), address
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"):
        assert is_public(address), address


def test_redirects_size_time_and_number_are_limited(address, public):
    base = f"http://{HOST}:{address}"
    before = len(Handler.asked)
    with pytest.raises(ApiError, match="elsewhere; give its own address"):
        fetch(f"{base}/moved", limits(address))
    assert len(Handler.asked) == before + 1
    with pytest.raises(ApiError, match="status 404"):
        fetch(f"{base}/nothing", limits(address))
    with pytest.raises(ApiError, match="more than 5000 bytes"):
        fetch(f"{base}/endless", limits(address, max_bytes=5000))
    for path, given, seconds in (
        ("slow", limits(address), 0.2),
        ("drip", limits(address), 0.2),
        ("endless", limits(address, max_bytes=1 << 40), 0.2),
        ("a.png", limits(address), 0.0),
    ):
        with pytest.raises(ApiError, match="takes too long"):
            fetch(f"{base}/{path}", given, seconds)
    for _ in range(remote_images.AT_ONCE):
        assert remote_images._fetching.acquire(blocking=False)
    try:
        with pytest.raises(ApiError) as told:
            fetch(f"{base}/a.png", limits(address))
        assert (told.value.status, told.value.retry_after) == (429, 1)
    finally:
        remote_images._fetching.release(remote_images.AT_ONCE)
    with pytest.raises(ApiError, match="gives no image"):  # no certificate
        fetch(f"https://{HOST}:{address}/a.png", limits(address))
    assert fetch(f"{base}/a.png", limits(address)) == Handler.picture


def test_hosts_of_the_option():
    assert check_host("IMAGES.example:81") == "images.example:81"
    for wrong in ("", "https://a.example", "a.example/x", "u@a.example", "*.example", "a:b", "a:"):
        with pytest.raises(UserError, match="--image-host takes NAME or NAME:PORT"):
            check_host(wrong)
