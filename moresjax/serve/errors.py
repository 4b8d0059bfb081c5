"""Errors in the form of OpenAI's API."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
      message: What is wrong and what to do, in one sentence.
      status: The status of HTTP.
      param: The field of the request that is wrong, if it is one.
      code: A word for programs.
      retry_after: In how many seconds it is worth trying again; None where it is not.
    """

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def kind(self) -> str:
        """The type of the error, as OpenAI's API calls it."""
        known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        if self.status >= 500:
            return "server_error"
        return known.get(self.status, "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}
