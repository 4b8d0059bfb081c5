"""Who may use a server, and how much at a time."""

import hmac
import logging
import threading

import httpx
import pytest

from moresjax.generation.row_pool import PoolRequest, RowPool
from moresjax.serve.run import running
from moresjax.serve.server import Server, ServerConfig
from moresjax.testing import talking_model

ASK = {"model": "talker", "messages": [{"role": "user", "content": "two ?"}], "max_tokens": 1}


def test_other_hosts_and_pages_are_refused_and_headers_are_set(url):
    chat = f"{url}/v1/chat/completions"
    done = httpx.post(chat, json=ASK, headers={"Host": "evil.example"})
    assert done.status_code == 400
    assert "evil.example" in done.json()["error"]["message"]
    done = httpx.post(chat, json=ASK, headers={"Origin": "https://evil.example"})
    assert done.status_code == 403
    assert httpx.post(chat, json=ASK, headers={"Origin": url}).status_code == 200
    for origin in ("http://localhost:1", "http://127.0.0.1", "http://[", "null"):
        assert httpx.post(chat, json=ASK, headers={"Origin": origin}).status_code == 403
    for host in ("[", ""):
        done = httpx.post(chat, json=ASK, headers={"Host": host})
        assert done.status_code == 400
        assert "must be the name of this server" in done.text
    page = httpx.get(url)
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "access-control-allow-origin" not in page.headers
    for path in ("/../setup.py", "/..%2f..%2fsetup.py", "/nothing"):
        assert httpx.get(url + path).status_code == 404
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_what_is_no_json_and_counters(url):
    done = httpx.post(f"{url}/v1/chat/completions", content=b"{")
    assert (done.status_code, done.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.post(f"{url}/v1/chat/completions", json=[1]).status_code == 400
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert "moresjax_generation_tokens_total" in httpx.get(f"{url}/metrics").text


@pytest.fixture(scope="module")
def small():
    """A server with a key that takes little."""
    config = ServerConfig(rows=1, max_waiting=1, max_body=4096, api_key="geheim")
    server = Server(talking_model(), "talker", config)
    with running(server) as address:
        yield server, address


def test_a_key_is_wanted_compared_in_constant_time_and_never_told(small, caplog, monkeypatch):
    server, url = small
    caplog.set_level(logging.DEBUG)
    compared, compare = [], hmac.compare_digest
    same = lambda a, b: compared.append((a, b)) or compare(a, b)  # noqa: E731
    monkeypatch.setattr(hmac, "compare_digest", same)
    key = {"Authorization": "Bearer geheim"}
    for given in ({}, {"Authorization": "Bearer falsch"}, {"Authorization": "geheim"}):
        done = httpx.get(f"{url}/v1/models", headers=given)
        assert done.status_code == 401
        assert done.headers["www-authenticate"] == "Bearer"
        assert done.headers["content-security-policy"].startswith("default-src 'self'")
        assert "geheim" not in done.text
    assert compared == [(given, b"geheim") for given in (b"", b"falsch", b"")]
    assert httpx.get(f"{url}/v1/models", headers=key).status_code == 200
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    assert "geheim" not in repr(server.config)
    assert "geheim" not in caplog.text


def test_large_bodies_and_full_queues_are_refused(small):
    server, url = small
    key = {"Authorization": "Bearer geheim"}
    large = ASK | {"padding": "x" * 5000}
    assert httpx.post(f"{url}/v1/chat/completions", json=large, headers=key).status_code == 413

    def chunks():
        for _ in range(9):
            yield b" " * 1000

    done = httpx.post(f"{url}/v1/chat/completions", content=chunks(), headers=key)
    assert done.status_code == 413
    held, entered = threading.Event(), threading.Event()

    def job():
        entered.set()
        held.wait(10)

    future = server.scheduler.call(job)  # nothing is answered meanwhile
    entered.wait(10)
    row = server.model.prompt("two ?")
    ticket = server.scheduler.submit(PoolRequest(row, 1), lambda _: None)
    texts = {"model": "talker", "prompt": "two ?", "max_tokens": 1}
    asked = [("chat/completions", ASK), ("completions", texts)]
    answers = [
        httpx.post(f"{url}/v1/{path}", json=one | {"stream": stream}, headers=key)
        for path, one in asked
        for stream in (False, True)
    ]
    done = httpx.post(f"{url}/v1/completions", json=texts | {"n": 2}, headers=key)
    held.set()
    future.result(10)
    for one in answers:
        assert (one.status_code, one.headers["Retry-After"]) == (429, "1")
        assert one.json()["error"]["type"] == "rate_limit_error"
    assert done.status_code == 400  # it would never fit
    assert "ask for fewer" in done.json()["error"]["message"]
    server.scheduler.cancel(ticket)


def test_a_failed_step_costs_its_requests_only(small, monkeypatch):
    _, url = small
    key = {"Authorization": "Bearer geheim"}
    monkeypatch.setattr(RowPool, "step", lambda *_: 1 / 0)
    done = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=key, timeout=60)
    assert (done.status_code, done.json()["error"]["type"]) == (500, "server_error")
    monkeypatch.undo()
    done = httpx.post(f"{url}/v1/chat/completions", json=ASK, headers=key, timeout=60)
    assert done.status_code == 200
