"""The named sources of samples that `config.data` chooses from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import registrar
from moresjax.data.arrayrecord import ArrayRecordSource
from moresjax.data.control.rephrase import RephrasingSource
from moresjax.data.control.source import ControlSource
from moresjax.data.digits import DigitsSource
from moresjax.data.labels import LabelsSource
from moresjax.data.llava import LlavaSource
from moresjax.data.samples import Sample
from moresjax.data.tfds import TfdsSource


@runtime_checkable
class Source(Protocol):
    """Random access to samples.

    A source may also have these attributes:
      sizes: The words and images of every sample `[n, 2]`; batching by length needs them.
      turn_counts: The turns before the first question of every sample, and its questions `[n, 2]`;
        training then says at its start how many samples are cut.
      mixture_weights: Pairs of an index range and its weight, where ranges are not read in
        proportion to their lengths.
      branches: False where no sample has independent turns; faster attention kernels may run then.
      filler: Of a source of ready-made rows, the row without pixels that stands for a skipped one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample | Mapping[str, Any]: ...


SourceClass = TypeVar("SourceClass", bound=Callable[..., Source])

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": DigitsSource,
    "llava": LlavaSource,
    "labels": LabelsSource,
    "arrayrecord": ArrayRecordSource,
    "tfds": TfdsSource,
    "control": ControlSource,
    "rephrasing": RephrasingSource,
}


def register_source(name: str) -> Callable[[SourceClass], SourceClass]:
    """A decorator that makes a source available to `config.data` under a name.

    The source is a dataclass: its fields are the options in `config.data`.

    >>> from moresjax.data.samples import Turn
    >>> @register_source("squares")
    ... @dataclasses.dataclass(frozen=True)
    ... class Squares:
    ...     count: int = 10
    ...
    ...     def __len__(self):
    ...         return self.count
    ...
    ...     def __getitem__(self, index):
    ...         return Sample(f"square-{index}", (Turn(f"{index} squared ?", str(index**2)),))
    >>> make_source("squares", count=5)[4].turns[0].answer
    '16'

    Args:
      name: The value of `config.data.name` that chooses the source.

    Raises:
      UserError: The name belongs to another source.
    """
    return registrar(SOURCES, "data source", name)


def source_class(name: str) -> Callable[..., Source]:
    """The class of the source of that name, which may be a plug-in's.

    Raises:
      UserError: The name is unknown.
    """
    load_plugins()
    if name not in SOURCES:
        raise choice_error("data source", name, SOURCES)
    return SOURCES[name]


def make_source(name: str, **options: Any) -> Source:
    """The source of that name, which may be a plug-in's.

    >>> source = make_source("digits", task="instruct", questions=2)
    >>> len(source[0].turns)
    2

    Args:
      name: A name in `SOURCES`.
      options: The fields of the source's class.

    Raises:
      UserError: The name or an option is unknown, or an option is missing.
    """
    source = source_class(name)
    # pyright cannot know that the class is a dataclass.
    fields = {f.name: f for f in dataclasses.fields(source)}  # pyright: ignore[reportArgumentType]
    for option in options:
        if option not in fields:
            raise choice_error(f"option of data source {name!r}", option, fields)
    for field in fields.values():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in options:
            raise UserError(f"data source {name!r} needs the option {field.name!r}")
    return source(**options)


def sizes_of(source: Source) -> Int[np.ndarray, "n 2"]:
    """The words and images of every sample.

    Raises:
      UserError: The source does not know them.
    """
    sizes = getattr(source, "sizes", None)
    if sizes is None:
        known = [name for name, kind in SOURCES.items() if hasattr(kind, "sizes")]
        raise UserError(
            f"batching by length needs a source that knows its lengths ({', '.join(known)}), "
            f"not {type(source).__name__}"
        )
    return sizes
