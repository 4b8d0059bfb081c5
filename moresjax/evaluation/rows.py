"""What the rows of an evaluation's logs hold, and what its `results.json` does.

Rows may have other keys besides; they are kept. Those of versions 0.1 and 0.2 lack some.
"""

from typing import Annotated, Any, Required, TypedDict

import msgspec

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


class TaskEntry(TypedDict, total=False):
    """What `results.json` says of a task, as far as a report shows it."""

    benchmark: Required[str]
    split: str | None
    score: Required[Number | None]
    n: Required[Count]
    prompt_hash: Required[str]
    fraction: bool
    interval95: Annotated[list[Number], msgspec.Meta(min_length=2, max_length=2)] | None


class ReportedResults(TypedDict, total=False):
    """`results.json`, as far as a report shows it."""

    model: str | None
    fingerprint: str
    split: str | None
    processor: dict[str, Any]
    scores: Required[dict[str, TaskEntry]]
    attention: dict[str, Any]


class AttentionEntry(TypedDict, total=False):
    """What `attention.json` says of a model."""

    model: str | None
    template: str | None
    fingerprint: str
    share: Required[list[Any]]
    groups: Required[list[str]]
    samples: Required[Count]
    lmar_of_means: Required[dict[str, list[Any]]]
    share_by_head: list[Any] | None
    tasks: dict[str, dict[str, Any]]


class Results(TypedDict, total=False):
    """`results.json`."""

    fingerprint: str
    processor: dict[str, Any]
    decoding: str
    scores: dict[str, dict[str, Any]]
    attention: dict[str, Any]
    not_run: dict[str, Any]
