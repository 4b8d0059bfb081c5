"""One row: the tokens of a sequence, what each of them is, and the images it is about.

Axis legend: S tokens, N images, V visual tokens per image, Y, X pixels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from moresjax.core.layout import LAYOUT_FIELDS, TokenKind
from moresjax.core.types import Ids

# The arrays that every row has, with one entry per token.
FIELDS = ("tokens", *LAYOUT_FIELDS)
_PADDING = {"kind": int(TokenKind.PAD), "image": -1}

TokenInts = Int32[np.ndarray, " S"]


@runtime_checkable
class Pixels(Protocol):
    """Images `[N, Y, X, 3]` that become an array when `np.asarray` asks for it."""

    def __len__(self) -> int: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A sequence of tokens before it becomes part of a batch.

    >>> row = Row.text([5, 6, 7]).append([8])
    >>> len(row), row.position.tolist()
    (4, [0, 1, 2, 3])
    >>> row.pad(6).kind.tolist()
    [3, 3, 3, 4, 0, 0]

    Attributes:
      tokens: Token ids `[S]`; the id under a visual token is never read.
      kind: A `TokenKind` value for each token `[S]`.
      image: For a visual token its place among the row's visual tokens, else -1 `[S]`.
      position: The rotary position, which counts from 0 in every document `[S]`.
      document: The number of the packed document that a token belongs to `[S]`.
      branch: 0 for the trunk of a document, k for its k-th continuation `[S]`.
      pixels: The row's images `[N, Y, X, 3]`, possibly still to be opened; None without images, or
        while they have not been read.
      id: The name of the sample, for error messages.
      roi: Whether each visual token of the images lies in the region of interest `[N, V]`; None
        where nobody asks for it.
      marks: For each token the bits of the marks that it belongs to `[S]`, in the order of
        `Processor.marks`; None where nobody asks for them.
    """

    tokens: TokenInts
    kind: TokenInts
    image: TokenInts
    position: TokenInts
    document: TokenInts
    branch: TokenInts
    pixels: np.ndarray | Pixels | None = None
    id: str = ""
    roi: Bool[np.ndarray, "N V"] | None = None
    marks: TokenInts | None = None

    @classmethod
    def text(cls, ids: Ids, kind: TokenKind = TokenKind.QUESTION) -> "Row":
        """A row of one document that holds these token ids, all of one kind."""
        zeros = np.zeros(len(ids), np.int32)
        return cls(
            tokens=np.asarray(ids, np.int32),
            kind=zeros + int(kind),
            image=zeros - 1,
            position=np.arange(len(ids), dtype=np.int32),
            document=zeros,
            branch=zeros,
        )

    @classmethod
    def concat(cls, rows: Sequence["Row"], visual_tokens: int) -> "Row":
        """Several rows as the documents of one: none of them sees another.

        Args:
          rows: At least one row, each of a single document.
          visual_tokens: V, the number of visual tokens of one image.
        """
        names = _field_names(*rows)
        joined = {name: np.concatenate([row.field(name) for row in rows]) for name in names}
        counts = [len(row) for row in rows]
        joined["document"] = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        # The visual tokens of a row are those of all its documents, one after the other.
        before = np.cumsum([0, *(row.num_images for row in rows)])[:-1]
        shift = np.repeat(before * visual_tokens, counts).astype(np.int32)
        joined["image"] = np.where(joined["image"] >= 0, joined["image"] + shift, np.int32(-1))
        images = [np.asarray(row.pixels) for row in rows if row.pixels is not None]
        regions = [row.roi for row in rows if row.roi is not None]
        return cls(
            **joined,
            pixels=np.concatenate(images) if images else None,
            id=";".join(row.id for row in rows),
            roi=np.concatenate(regions) if regions else None,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, tokens: slice) -> "Row":
        """The row of some of the tokens; it keeps its images."""
        return self.replace(**{name: x[tokens] for name, x in self.fields.items()})

    @property
    def fields(self) -> dict[str, np.ndarray]:
        """The arrays with one entry per token, by name."""
        return {name: getattr(self, name) for name in _field_names(self)}

    def field(self, name: str) -> TokenInts:
        """An array with one entry per token; zeros for marks that the row does not have."""
        values = getattr(self, name)
        return np.zeros_like(self.tokens) if values is None else values

    @property
    def num_images(self) -> int:
        """How many images the row holds."""
        return 0 if self.pixels is None else len(self.pixels)

    def replace(self, **changes: Any) -> "Row":
        """The row with other values of some attributes."""
        return dataclasses.replace(self, **changes)

    def append(
        self,
        ids: Ids,
        kind: TokenKind = TokenKind.ANSWER,
        *,
        branch: int = 0,
        position: int | None = None,
    ) -> "Row":
        """The row with more text at its end, in the document of its last token.

        Args:
          ids: Token ids of the text.
          kind: What the new tokens are.
          branch: The branch they belong to.
          position: The position of the first of them; by default the one after the last token.
        """
        last = self[-1:]
        if position is None:
            position = int(last.position.sum()) + len(last)
        more = Row.text(ids, kind)
        more = more.replace(
            position=more.position + np.int32(position),
            document=more.document + last.document.sum(dtype=np.int32),
            branch=more.branch + np.int32(branch),
        )
        return self.replace(
            **{name: np.concatenate([x, more.field(name)]) for name, x in self.fields.items()}
        )

    def pad(self, length: int) -> "Row":
        """The row padded on its right to `length` tokens; its images stay as they are.

        Raises:
          ValueError: when the row is longer.
        """
        padded = {}
        for name, values in self.fields.items():
            padded[name] = np.full(length, _PADDING.get(name, 0), np.int32)
            padded[name][: len(self)] = values
        return self.replace(**padded)

    def common_prefix(self, other: "Row") -> int:
        """How many tokens at the start of both rows are the same in every field."""
        size = min(len(self), len(other))
        names = _field_names(self, other)
        same = [self.field(name)[:size] == other.field(name)[:size] for name in names]
        equal = np.all(same, axis=0)
        return size if equal.all() else int(np.argmin(equal))

    def to_dict(self) -> dict[str, np.ndarray]:
        """The row's arrays by name, with `pixels`, `roi` and `marks` only where it has them."""
        arrays = self.fields
        if self.roi is not None:
            arrays["roi"] = self.roi
        return arrays if self.pixels is None else arrays | {"pixels": np.asarray(self.pixels)}

    @property
    def region_key(self) -> bytes:
        """What tells rows about the same images apart whose regions differ."""
        return b"" if self.roi is None else self.roi.tobytes()


def _field_names(*rows: Row) -> tuple[str, ...]:
    """The arrays with one entry per token that any of the rows has."""
    return FIELDS if all(row.marks is None for row in rows) else (*FIELDS, "marks")


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stacks dicts of arrays along a new leading axis.

    Args:
      rows: Dicts with the same keys and shapes, such as `Row.to_dict` of equally long rows.
    """
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
