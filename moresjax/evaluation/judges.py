"""LLM judges: anything that answers a prompt, with a name and settings to store with the score."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from moresjax.errors import UserError
from moresjax.generation.sampling import Sampling
from moresjax.model import Model


@runtime_checkable
class Judge(Protocol):
    """Answers a prompt in text.

    Attributes:
      name: stored with every score.
      settings: likewise.
    """

    name: str
    settings: Mapping[str, Any]

    def __call__(self, prompt: str, attempt: int) -> str:
        """The reply; `attempt` counts how often it could not be read before."""


class ModelJudge:
    """A moresjax model, greedy; a reply that could not be read is drawn anew."""

    def __init__(self, model: Model, name: str, max_new_tokens: int = 128):
        self._model, self.name = model, name
        self.settings = {"temperature": 0, "max_tokens": max_new_tokens}

    def __call__(self, prompt: str, attempt: int) -> str:
        # One temperature for all further attempts: each would be compiled anew.
        sampling = Sampling(temperature=0.5 if attempt else 0.0, seed=attempt)
        options = {"max_new_tokens": self.settings["max_tokens"], "sampling": sampling}
        return self._model.generate(prompt, **options)[0]


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint.

    Args:
      url: of the API, such as `http://localhost:8000/v1`.
      model: its name there.
      max_tokens: length limit of a reply.
      key_variable: environment variable that holds the API key, if one is needed.

    Raises:
      UserError: for a URL that is not http(s); from a call, when the endpoint does not answer.
    """

    def __init__(
        self, url: str, model: str, max_tokens: int = 512, key_variable: str = "OPENAI_API_KEY"
    ):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the judge's URL must begin with http:// or https://, got {url!r}")
        self._url, self._key, self.name = url.rstrip("/"), os.environ.get(key_variable, ""), model
        self.settings = {"temperature": 0, "max_tokens": max_tokens}

    def __call__(self, prompt: str, attempt: int) -> str:
        # What could not be read comes again at temperature 0: an attempt has to differ.
        settings = self.settings | {"temperature": 0.5 * attempt}
        message = {"role": "user", "content": prompt}
        body = json.dumps({"model": self.name, "messages": [message], **settings}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self._url}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"the judge {self.name} at {self._url} failed: {error}") from None
