"""The body of `/v1/chat/completions`: what is asked, by whom, and how it is to be answered."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.generation.sampling import Sampling
from moresjax.inference.prompt_inputs import mark_images
from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields
from moresjax.serve.images import ImageLimits, ImagePart, read_images
from moresjax.serve.scheduler import Together

MAX_CHOICES = 16
MAX_LISTED = 20
MAX_TOGETHER = 8  # requests that wait for each other
LONGEST_NAME = 128


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a prompt is to be answered.

    Attributes:
      max_tokens: The most new tokens; None for the server's default.
      sampling: How tokens are chosen, with the seed of the first choice.
      stop: An answer ends before the first of these.
      count: How many answers are wanted.
      stream: Whether they are sent while they are written.
      with_usage: Whether a stream ends with the numbers of tokens.
    """

    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    count: int
    stream: bool
    with_usage: bool


def read_decoding(fields: Fields) -> Decoding:
    """How the prompts of a request are to be answered; greedily where it says nothing.

    Raises:
      ApiError: A field is out of range.
    """
    limit = fields.whole("max_tokens", 0, 1, 1 << 30)
    limit = fields.whole("max_completion_tokens", limit, 1, 1 << 30)
    seed = fields.whole("seed", secrets.randbits(32), -(1 << 63), 1 << 63)
    sampling = Sampling(
        temperature=fields.number("temperature", 0.0, 0.0, 100.0),
        top_k=max(fields.whole("top_k", 0, -1, 1 << 30), 0),
        top_p=max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-6),
        seed=seed % 2**32,
    )
    options = fields.get("stream_options")
    usage = options is not None and Fields(options, "stream_options").flag("include_usage")
    return Decoding(
        max_tokens=limit or None,
        sampling=sampling,
        stop=fields.texts("stop"),
        count=fields.whole("n", 1, 1, MAX_CHOICES),
        stream=fields.flag("stream"),
        with_usage=usage,
    )


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A conversation to go on with.

    Attributes:
      model: The name of the model that is asked for.
      sample: The conversation.
      decoding: How it is to be answered.
      logprobs: Whether log-probabilities are wanted.
      top_logprobs: How many likely tokens are wanted at each.
      adapter: The adapter that answers; None where the model's name says it.
      attention: Whether attention on the image is wanted.
      steer: The field of steering vectors, unread.
      together: The requests of the client that are to be in one batch with this one.
    """

    model: str
    sample: Sample
    decoding: Decoding
    logprobs: bool
    top_logprobs: int
    adapter: str | None
    attention: bool
    steer: Any = None
    together: Together | None = None


def read_chat(body: Any, limits: ImageLimits) -> ChatRequest:
    """The body of a request; fields that it does not know are ignored.

    Raises:
      ApiError: A field is missing or wrong.
    """
    fields = Fields(body)
    logprobs = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, 0, MAX_LISTED)
    if top and not logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    return ChatRequest(
        model=read_model(fields),
        sample=read_messages(fields.get("messages"), limits),
        decoding=read_decoding(fields),
        logprobs=logprobs,
        top_logprobs=top,
        adapter=fields.text("adapter"),
        attention=fields.flag("attention"),
        steer=fields.get("steer"),
        together=_read_together(fields.get("together")),
    )


def _read_together(given: Any) -> Together | None:
    """The field `together` of a request."""
    if given is None:
        return None
    fields = Fields(given, "together")
    name = fields.text("id")
    if not name or len(name) > LONGEST_NAME:
        raise fields.wrong("id", f"a text of at most {LONGEST_NAME} letters")
    return Together(name, fields.whole("count", 1, 1, MAX_TOGETHER))


def read_model(fields: Fields) -> str:
    """The name of the model that a request asks for.

    Raises:
      ApiError: There is none.
    """
    name = fields.text("model")
    if not name:
        raise ApiError("the request must name a model; /v1/models lists them", param="model")
    return name


def read_messages(messages: Any, limits: ImageLimits) -> Sample:
    """The conversation of `messages`, which ends with a user's.

    Raises:
      ApiError: The messages are no conversation, or an image cannot be read.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list with at least one message", param="messages")
    system: list[str] = []
    questions: list[list[str]] = []
    answers: list[list[str]] = []
    images: list[ImagePart] = []
    for number, message in enumerate(messages):
        path = f"messages[{number}]"
        fields = Fields(message, path)
        role = fields.text("role")
        text, own = _read_content(fields.get("content"), f"{path}.content")
        if role in ("system", "developer", "assistant") and own:
            raise ApiError(f"{path}: only a user's message may have images", param=path)
        if role in ("system", "developer"):
            system.append(text)
        elif role == "user":
            images += own
            if len(images) > limits.max_images:
                raise ApiError(f"a request may have at most {limits.max_images} images", param=path)
            if len(answers) == len(questions):  # the last question has its answer
                questions.append([])
            questions[-1].append(mark_images(text, own))
        elif role == "assistant":
            if not questions:
                raise ApiError(f"{path}: the conversation begins with an answer", param=path)
            if len(answers) < len(questions):
                answers.append([])
            answers[-1].append(text)
        else:
            raise fields.wrong("role", "system, developer, user or assistant")
    if len(answers) == len(questions):
        raise ApiError("the last message must be a user's", param="messages")
    turns = zip(questions, [*answers, None], strict=True)
    return Sample(
        "the request",
        tuple(Turn("\n".join(q), None if a is None else "\n".join(a)) for q, a in turns),
        read_images(images, limits),
        system="\n".join(system) or None,
    )


def _read_content(content: Any, path: str) -> tuple[str, Sequence[ImagePart]]:
    """Text and images of a message's content; the images are not read yet.

    Images go before the text, as `moresjax generate` puts them; images between texts stay there.
    """
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ApiError(f"{path} must be a text or a list of parts", param=path)
    texts: list[str | None] = []  # None stands for an image
    images: list[ImagePart] = []
    for number, part in enumerate(content):
        fields = Fields(part, f"{path}[{number}]")
        kind = fields.text("type")
        if kind == "text":
            texts.append(fields.text("text") or "")
        elif kind == "image_url":
            images.append((part, f"{path}[{number}]"))
            texts.append(None)
        else:
            raise fields.wrong("type", "text or image_url")
    words = [text for text in texts if text is not None]
    places = [n for n, text in enumerate(texts) if text is None]
    together = not places or places[-1] - places[0] == len(places) - 1
    if together or any(IMAGE_MARK in text for text in words):
        return "\n".join(words), images
    return "\n".join(IMAGE_MARK if text is None else text for text in texts), images
