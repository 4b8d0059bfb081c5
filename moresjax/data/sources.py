"""The named sources of samples that `config.data` chooses from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import load_plugins
from moresjax.data.arrayrecord import ArrayRecordSource
from moresjax.data.digits import DigitsSource
from moresjax.data.llava import LlavaSource
from moresjax.data.samples import Sample
from moresjax.data.tfds import TfdsSource


@runtime_checkable
class Source(Protocol):
    """Random access to samples.

    A source may also have `sizes` `[n, 2]`, the words and images of every sample, which batching by
    length needs, `shares`, pairs of an index range and its weight, and `branches`, False where no
    sample has independent turns.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample | Mapping[str, Any]: ...


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": DigitsSource,
    "llava": LlavaSource,
    "arrayrecord": ArrayRecordSource,
    "tfds": TfdsSource,
}


C = TypeVar("C", bound=Callable[..., Source])


def source(name: str) -> Callable[[C], C]:
    """Registers a class of sources, a dataclass whose fields are the options, for `config.data`."""

    def register(kind: C) -> C:
        SOURCES[name] = kind
        return kind

    return register


def source_class(name: str) -> Callable[..., Source]:
    """The class of a named source, which may be a plug-in's.

    Raises:
      UserError: For an unknown name.
    """
    load_plugins()
    if name not in SOURCES:
        raise choice_error("data source", name, SOURCES)
    return SOURCES[name]


def make_source(name: str, **options) -> Source:
    """The named source.

    Raises:
      UserError: for an unknown name or option, or one that is missing.
    """
    kind = source_class(name)
    fields = dataclasses.fields(kind)
    for option in options:
        if option not in [field.name for field in fields]:
            raise choice_error(f"option of data source {name!r}", option, [f.name for f in fields])
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in options:
            raise UserError(f"data source {name!r} needs the option {field.name!r}")
    return kind(**options)


def sizes_of(source: Source) -> Int[np.ndarray, "n 2"]:
    """Words and images of every sample.

    Raises:
      UserError: when the source does not know them.
    """
    if not hasattr(source, "sizes"):
        known = [name for name, kind in SOURCES.items() if hasattr(kind, "sizes")]
        raise UserError(
            f"batching by length needs a source that knows its lengths ({', '.join(known)}), "
            f"not {type(source).__name__}"
        )
    return source.sizes
