"""LLM judges: anything that replies to a prompt, with a name and settings for the results."""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moresjax.core.errors import UserError
from moresjax.core.json_files import append_log, read_log, write_log
from moresjax.evaluation.rows import JudgeRow
from moresjax.generation.sampling import Sampling
from moresjax.inference.model import Model

REPLIES = "judge.jsonl"
# What a reply of another form raises.
_MALFORMED = (ValueError, KeyError, IndexError, TypeError)
_REDIRECTIONS = (301, 302, 303, 307, 308)
_GONE = 16  # After so many failures in a row an endpoint is not waited for any more.


@runtime_checkable
class Judge(Protocol):
    """Replies to a prompt; what it raises leaves that prediction without a judgement.

    Any object of this form will do. With an attribute `parallel`, that many threads ask it at a
    time.

    >>> class Contrary:
    ...     name, settings = "contrary", {}
    ...     def __call__(self, prompt, attempt):
    ...         return "No"
    >>> isinstance(Contrary(), Judge)
    True

    Attributes:
      name: The judge's name, which is stored with every score.
      settings: What its replies depend on, which is stored with every score too.
    """

    @property
    def name(self) -> str:
        """The judge's name."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the replies depend on."""
        ...

    def __call__(self, prompt: str, attempt: int) -> str:
        """The reply to a prompt.

        Args:
          prompt: What the judge is asked.
          attempt: How often a reply to this prompt could not be read before.
        """
        ...


class ModelJudge:
    """A moresjax model as judge: greedy, but a reply that could not be read is drawn anew.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model("none")
    >>> judge = ModelJudge(model, "tiny", max_new_tokens=2)
    >>> type(judge("is there a two ?", attempt=0))
    <class 'str'>

    Args:
      model: The model.
      name: What results call it.
      max_new_tokens: The length limit of a reply.
    """

    def __init__(self, model: Model, name: str, max_new_tokens: int = 128) -> None:
        self._model, self.name = model, name
        self.settings: Mapping[str, Any] = {
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "fingerprint": model.fingerprint,
        }
        if (dtype := model.config.llm.dtype) != "float32":
            self.settings = {**self.settings, "dtype": dtype}

    def __call__(self, prompt: str, attempt: int) -> str:
        """The model's reply to a prompt."""
        # One temperature for all further attempts: each would be compiled anew.
        sampling = Sampling(temperature=0.5 if attempt else 0.0, seed=attempt)
        options = {"max_new_tokens": self.settings["max_tokens"], "sampling": sampling}
        return self._model.generate(prompt, **options)


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint.

    >>> judge = EndpointJudge("http://localhost:8000/v1", "vicuna-13b")
    >>> judge.name, judge.settings
    ('vicuna-13b', {'temperature': 0, 'max_tokens': 512})

    Args:
      url: The address of the API, such as `http://localhost:8000/v1`.
      model: The model's name there.
      max_tokens: The length limit of a reply.
      key_variable: The environment variable that holds the API key, if one is needed.
      parallel: The number of requests at a time.
      pauses: Seconds to wait before each further request to a server that is busy or not reached.
      sleep: The function that waits some seconds.

    Raises:
      UserError: The URL is not http(s), or holds a password or a query; or `parallel` is below 1. A
        call raises it too, when the endpoint does not answer or sends elsewhere.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int = 512,
        key_variable: str = "OPENAI_API_KEY",
        *,
        parallel: int = 8,
        pauses: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        _check_url(url, key_variable)
        self._url, self._key, self.name = url.rstrip("/"), os.environ.get(key_variable, ""), model
        self.settings: Mapping[str, Any] = {"temperature": 0, "max_tokens": max_tokens}
        if parallel < 1:
            raise UserError(f"parallel must be at least 1, got {parallel}")
        self.parallel, self._pauses, self._sleep = parallel, tuple(pauses), sleep
        self._failed = 0  # judgements in a row

    def __call__(self, prompt: str, attempt: int) -> str:
        """The endpoint's reply to a prompt."""
        # What could not be read comes again at temperature 0: an attempt has to differ.
        settings = {**self.settings, "temperature": 0.5 * attempt}
        message = {"role": "user", "content": prompt}
        body = json.dumps({"model": self.name, "messages": [message], **settings}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}/chat/completions", body, headers)
        try:
            text = self._reply(request)
        except (OSError, http.client.HTTPException, *_MALFORMED) as error:
            self._failed += 1
            raise UserError(f"the judge {self.name} at {self._url} {_reason(error)}") from None
        self._failed = 0
        return text

    def _reply(self, request: urllib.request.Request) -> str:
        # A server that is gone is not waited for in every question.
        for pause in self._pauses if self._failed < _GONE else ():
            try:
                return _open(request)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and not _is_busy(error):
                    raise
                self._sleep(pause)
        return _open(request)


def _check_url(url: str, key_variable: str) -> None:
    """Refuses what is no plain address: it is told in messages, which land in results."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"the judge's URL must begin with http:// or https://, not with {parts.scheme or '?'}:"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            "the judge's URL must be a plain address without user, password, query and fragment; "
            f"its key belongs into the environment variable {key_variable}"
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key must not go to another host, and what is asked would be lost on the way anyway."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """Leaves the redirection as the error that the server's reply is then."""
        return None


_OPENER = urllib.request.build_opener(_NoRedirects())


class CachedJudge:
    """A judge whose replies are kept in a file while they come, and not asked for again.

    >>> import tempfile
    >>> class Contrary:
    ...     name, settings = "contrary", {}
    ...     def __call__(self, prompt, attempt):
    ...         return "No"
    >>> judge = CachedJudge(Contrary(), tempfile.mkdtemp())
    >>> judge("Is snow white?", attempt=0)
    'No'

    Args:
      judge: The judge that is asked what is not known yet.
      out: The directory of `judge.jsonl`.
    """

    def __init__(self, judge: Judge, out: str | Path) -> None:
        self._judge, self.name, self.settings = judge, judge.name, judge.settings
        self.parallel = getattr(judge, "parallel", 1)
        self._path, self._lock = Path(out) / REPLIES, threading.Lock()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_log(self._path, JudgeRow)
        self._known = {_key(row): row["reply"] for row in rows}
        if rows:
            write_log(self._path, rows)  # without a line that was left unfinished

    def __call__(self, prompt: str, attempt: int) -> str:
        """The known reply to a prompt, else the judge's.

        Raises:
          UserError: The judge's reply is not a text.
        """
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        row = {"judge": self.name, "settings": dict(self.settings)}
        row |= {"prompt_hash": digest, "attempt": attempt}
        if (key := _key(row)) not in self._known:
            row["reply"] = reply = self._judge(prompt, attempt)
            if not isinstance(reply, str):
                raise UserError(f"the judge {self.name} replied without a text")
            with self._lock:
                append_log(self._path, row)
                self._known[key] = reply
        return self._known[key]


def _key(row: Mapping) -> str:
    return json.dumps({name: x for name, x in row.items() if name != "reply"}, sort_keys=True)


def _open(request: urllib.request.Request) -> str:
    with _OPENER.open(request, timeout=120) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("a reply without text")
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError) and error.code in _REDIRECTIONS:
        target = urllib.parse.urlsplit(error.headers.get("Location", ""))
        place = f"{target.scheme}://{target.hostname}" if target.hostname else "another path"
        return f"sends to {place}, which is not followed; give the address that answers"
    return f"failed: {error!r}"


def _is_busy(error: urllib.error.HTTPError) -> bool:
    return error.code == 429 or error.code >= 500
