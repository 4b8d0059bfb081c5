"""Judges that fail, are busy, are asked by several threads, and are not asked twice."""

import collections
import http.server
import json
import threading

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.judges import CachedJudge, EndpointJudge
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import write_results
from moresjax.evaluation.tasks import load_benchmark

GOOD = {"choices": [{"message": {"content": "Yes"}}]}


@pytest.fixture
def endpoint():
    """A server that answers with the statuses and bodies of a list, in turn."""
    replies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, reply = replies.pop(0)
            if status == 0:  # hangs up
                self.close_connection = True
                return
            data = json.dumps(reply).encode()
            self.send_response(abs(status))
            # A negative status promises more than comes.
            self.send_header("Content-Length", str(len(data) + 9 * (status < 0)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield replies, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_busy_or_broken_connection_is_tried_again(endpoint):
    replies, url = endpoint
    replies += [(503, {}), (0, None), (-200, GOOD), (429, {}), (200, GOOD)]
    slept = []
    assert EndpointJudge(url, "j", sleep=slept.append)("Is it?", 0) == "Yes"
    assert slept == [1, 2, 4, 8]
    replies += [(500, {})] * 3
    with pytest.raises(UserError, match=r"the judge j at .* failed: .*500"):
        EndpointJudge(url, "j", pauses=(1.0, 1.0), sleep=slept.append)("Is it?", 0)
    assert replies == []


@pytest.mark.parametrize(
    "reply",
    [
        (401, {}),
        (200, {"choices": None}),
        (200, {"choices": [{"message": {"content": None}}]}),
        (200, [GOOD]),
    ],
)
def test_a_refusal_is_told_at_once(endpoint, reply):
    replies, url = endpoint
    replies.append(reply)
    slept = []
    with pytest.raises(UserError, match=r"the judge j at .* failed"):
        EndpointJudge(url, "j", sleep=slept.append)("Is it?", 0)
    assert slept == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_does_not_follow_to_another_host(status, monkeypatch):
    """Two servers: the first sends to the second, which must hear nothing."""
    heard = []

    def server(reply):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                self.do_GET()

            def do_GET(self):
                reply(self)

            def log_message(self, *arguments):
                pass

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return made

    def listen(handler):
        heard.append(dict(handler.headers))
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(GOOD).encode())

    def redirect(handler):
        handler.send_response(status)
        handler.send_header("Location", f"http://localhost:{other.server_port}/v1?token=abc")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    other = server(listen)
    first = server(redirect)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    judge = EndpointJudge(f"http://127.0.0.1:{first.server_port}/v1", "j", pauses=())
    try:
        with pytest.raises(UserError, match="sends to http://localhost, which is not") as error:
            judge("Is it?", 0)
    finally:
        for each in (first, other):
            each.shutdown()
            each.server_close()
    assert heard == []
    assert "abc" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@localhost/v1",
        "https://secret@localhost/v1",
        "https://localhost/v1?key=secret",
        "https://localhost/v1#secret",
        "ftp://localhost/v1?key=secret",
    ],
)
def test_an_address_with_credentials_is_refused_without_repeating_them(url):
    with pytest.raises(UserError, match="the judge's URL must") as error:
        EndpointJudge(url, "j")
    assert "secret" not in str(error.value)


def test_a_server_that_is_gone_is_not_waited_for_in_every_question():
    slept = []
    judge = EndpointJudge("http://127.0.0.1:9", "j", pauses=(1.0, 2.0), sleep=slept.append)
    for _ in range(20):
        with pytest.raises(UserError, match="failed"):
            judge("Is it?", 0)
    assert slept == [1, 2] * 16


class Words:
    """Finds everything right, but fails for prompts with a word."""

    name, settings = "words", {"temperature": 0}

    def __init__(self, bad: str = "nothing"):
        self.bad, self.asked = bad, []

    def __call__(self, prompt: str, attempt: int) -> str:
        self.asked.append(prompt)
        if self.bad in prompt:
            raise ConnectionResetError("gone")
        return "Yes"


@pytest.fixture
def saved(tmp_path):
    """Three answers to VSR."""
    folder = tmp_path / "vsr" / "data" / "splits" / "zeroshot"
    folder.mkdir(parents=True)
    rows = [{"image": "1.jpg", "caption": f"Cat {word}.", "label": 1} for word in "abc"]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = [{"prediction": f"It is {number}."} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, answers)))
    return tmp_path


def scored(saved, judge, out=None):
    return rescore("vsr", saved / "a.jsonl", data_root=saved, limit=3, judge=judge, out=out)


def test_a_failed_judgement_leaves_the_others_and_is_asked_for_again(saved):
    out, judge = saved / "out", Words(bad="Cat b")
    result = scored(saved, judge, out)
    entry = result.scores["vsr"]
    assert entry["errors"] == {"1": "no judgement: gone"}
    assert (entry["score"], entry["missing"], entry["n"]) == (pytest.approx(2 / 3), 1, 3)
    assert [row["score"] for row in result.predictions] == [1, None, 1]
    assert len((out / "judge.jsonl").read_text().splitlines()) == 2
    with (out / "judge.jsonl").open("a") as file:
        file.write('{"judge": "wor')  # it was killed in the middle of a line
    again = Words()
    entry = scored(saved, again, out).scores["vsr"]
    assert len(again.asked) == 1
    assert "Cat b" in again.asked[0]
    assert (entry["score"], entry["missing"], "errors" in entry) == (1, 0, False)
    never = Words(bad="")
    assert scored(saved, never, out).scores["vsr"] == entry
    assert never.asked == []


def test_replies_are_of_a_judge_with_its_settings_and_attempt(tmp_path):
    judge = Words()
    CachedJudge(judge, tmp_path)("Is it?", 0)
    kept = CachedJudge(judge, tmp_path)
    assert [kept("Is it?", 0), kept("Is it?", 1), kept("Is it not?", 0)] == ["Yes"] * 3
    assert judge.asked == ["Is it?", "Is it?", "Is it not?"]
    other = Words()
    other.settings = {"temperature": 1}
    CachedJudge(other, tmp_path)("Is it?", 0)
    assert other.asked == ["Is it?"]


def test_where_every_judgement_fails_there_is_no_score(saved):
    result = scored(saved, Words(bad=""))
    entry = result.scores["vsr"]
    assert (entry["score"], entry["stderr"], list(entry["errors"])) == (None, None, list("012"))
    assert [row["score"] for row in result.predictions] == [None] * 3
    assert json.loads(write_results(result, saved / "out").read_text())["mean_accuracy"] is None


def test_a_judge_is_asked_by_several_threads_in_order(saved):
    together = threading.Barrier(3, timeout=60)
    seen = collections.Counter()

    class Slow(Words):
        parallel = 3

        def __call__(self, prompt: str, attempt: int) -> str:
            together.wait()
            seen[threading.get_ident()] += 1
            return "Yes" if "Cat b" in prompt else "No"

    (task,) = load_benchmark("vsr", data_root=saved, limit=3)
    score = task.scorer(task.examples, ["yes", "no", "maybe"], Slow())
    assert (list(score.per_example), score.errors) == ([0, 1, 0], {})
    assert list(seen.values()) == [1, 1, 1]
