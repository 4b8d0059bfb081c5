"""What the rows of an evaluation's logs hold, and what its `results.json` does.

Rows may have other keys besides; they are kept. Those of versions 0.1 and 0.2 lack some.
"""

from typing import Any, Required, TypedDict

from moresjax.core.reading import Count

Number = int | float


class PredictionRow(TypedDict, total=False):
    """A row of `predictions.jsonl`."""

    task: Required[str]
    id: Required[str]
    prompt: str
    prediction: Required[str]
    images: list[str] | None
    max_new_tokens: Count | None
    model: str
    processor: str
    weights: str
    decoding: str


class AttentionRow(TypedDict, total=False):
    """A row of `attention.jsonl`."""

    task: Required[str]
    id: Required[str]
    prompt: Required[str]
    has_image: Required[bool]
    tokens: Required[list[Count]]
    score: Required[list[Any]]
    visual_share: Number | None
    mass_shape: Required[list[Count]]
    mass: Required[str]


class JudgeRow(TypedDict):
    """A row of `judge.jsonl`."""

    judge: str
    settings: dict[str, Any]
    prompt_hash: str
    attempt: Count
    reply: str


class SteeringRow(TypedDict, total=False):
    """A row of the answers of `analyze steer`."""

    task: Required[str]
    id: Required[str]
    prompt: Required[str]
    trial: Required[str]
    prediction: Required[str]
    made: str | None
    max_new_tokens: Count | None


class ControlRow(TypedDict):
    """A row of the answers of `analyze control`."""

    key: str
    prediction: str


class LandscapeRow(TypedDict):
    """A row of the points of `analyze landscape`."""

    model: str
    pair: int
    first: int
    losses: list[Any]


class Results(TypedDict, total=False):
    """`results.json`."""

    fingerprint: str
    processor: dict[str, Any]
    decoding: str
    scores: dict[str, dict[str, Any]]
    attention: dict[str, Any]
    not_run: dict[str, Any]
