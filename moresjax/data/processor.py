"""Samples to model inputs: tokens, layout and pixels, built piece by piece.

Axis legend: B rows, S tokens, N images per row, V visual tokens per image, Y, X pixels.

Ids and kinds come from the same tokenisation: the text between two images is tokenised once, and
every token takes the kind and branch of its last character. A label mask therefore cannot
disagree with the tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, RowStructure, TokenKind, TokenLayout, infer_structure
from moresjax.data.images import ImageProcessor, LazyPixels, image_keys
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.data.templates import Piece, Template

# Arrays by field; `id` names the sample. Pixels may be `LazyPixels`.
Row = dict[str, np.ndarray | str]
FIELDS = ("kind", "image", "position", "document", "branch")
_FILL = {"kind": int(TokenKind.PAD), "image": -1}


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns samples into rows and rows into batches.

    Attributes:
      tokenizer: a fast tokenizer of `transformers`.
      template: how conversations are written.
      image: how images become pixels; None for a model without vision.
      visual_tokens: V, visual tokens per image.
    """

    tokenizer: object
    template: Template
    image: ImageProcessor | None = None
    visual_tokens: int = 0

    def __post_init__(self):
        if not self.tokenizer.is_fast:
            raise UserError("the tokenizer must be a fast one: offsets are needed for the labels")
        # Prompts, questions and answers recur: most chunks are looked up, not tokenised.
        object.__setattr__(self, "_chunk", functools.lru_cache(1 << 16)(self._tokenize))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's end token and the template's own, if any."""
        ends = {self.tokenizer.eos_token_id}
        closing = (self.template.end or "").strip()
        if closing in self.tokenizer.get_vocab():
            ends.add(self.tokenizer.convert_tokens_to_ids(closing))
        return tuple(sorted(ends))

    @functools.cached_property
    def without_end(self) -> "Processor":
        """The same, but answers go without the token that ends them."""
        return dataclasses.replace(self, template=dataclasses.replace(self.template, end=""))

    def _tokenize(
        self, chunk: tuple[tuple[str, TokenKind], ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids and kinds of consecutive texts, tokenised as one string."""
        joined = "".join(text for text, _ in chunk)
        encoded = self.tokenizer.backend_tokenizer.encode(joined, add_special_tokens=False)
        borders = np.cumsum([len(text) for text, _ in chunk])
        last = [max(end - 1, start) for start, end in encoded.offsets]
        pieces = np.searchsorted(borders, last, side="right")
        return tuple(encoded.ids), tuple(int(chunk[i][1]) for i in pieces)

    @functools.cached_property
    def _bos(self) -> tuple[int, ...]:
        ids = self.tokenizer("")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and bos in ids else ()

    def row(self, sample: Sample, known: dict[tuple, LazyPixels] | None = None) -> Row:
        """Unpadded token ids, layout fields and pixels of one sample.

        Args:
          sample: the sample.
          known: pixels by `image_keys`, to which those of new images are added. With it images are
            opened later, when a batch is made, and broken ones raise then.

        Raises:
          UserError: as `text_row`, and for an image that cannot be read.
        """
        row = self.text_row(sample)
        if not sample.images:
            return row
        if known is None:
            return row | {"pixels": self.pixels(sample)}
        key = image_keys(sample.images)
        if key not in known:
            try:
                known[key] = LazyPixels(sample.images, lambda: self.pixels(sample))
            except UserError as error:
                raise UserError(f"sample {sample.id}: {error}") from None
        return row | {"pixels": known[key]}

    def pixels(self, sample: Sample) -> Float[np.ndarray, "N Y X 3"]:
        """The images of a sample that has some.

        Raises:
          UserError: for an image that cannot be read.
        """
        try:
            return np.stack([self.image(image) for image in sample.images])
        except UserError as error:
            raise UserError(f"sample {sample.id}: {error}") from None

    def text_row(self, sample: Sample) -> Row:
        """The row of a sample without its pixels; images are not opened.

        Raises:
          UserError: when the number of `<image>` marks and images differ, the text cannot be
            tokenised, or the model takes no images.
        """
        pieces = self.template.render(sample, self.tokenizer.eos_token or "")
        try:
            row = self._encode(pieces, sample)
        except (TypeError, UnicodeError) as error:  # lone surrogates, values that are not text
            raise UserError(f"sample {sample.id}: the text cannot be tokenised: {error}") from None
        if sample.images and self.image is None:
            raise UserError(f"sample {sample.id}: this model takes no images")
        return row

    def _encode(self, pieces: Sequence[Piece], sample: Sample) -> Row:
        fields = {name: [] for name in ("tokens", "kind", "image", "position", "branch")}
        trunk = current = position = 0  # end of the trunk, branch and position of the next token

        def add(ids, kinds, images, branch):
            nonlocal trunk, current, position
            if branch != current:  # every branch goes on from the trunk's end
                current, position = branch, trunk
            fields["tokens"] += ids
            fields["kind"] += kinds
            fields["image"] += images
            fields["branch"] += [branch] * len(ids)
            fields["position"] += range(position, position + len(ids))
            position += len(ids)
            if branch == 0:
                trunk = position

        def none(ids):
            return [-1] * len(ids)

        add(self._bos, [int(TokenKind.SYSTEM)] * len(self._bos), none(self._bos), 0)
        found = 0
        for chunk in _chunks(pieces):
            if chunk is None:
                visual = range(found * self.visual_tokens, (found + 1) * self.visual_tokens)
                found += 1
                add([0] * len(visual), [int(TokenKind.IMAGE)] * len(visual), visual, 0)
            else:
                branch, parts = chunk
                ids, kinds = self._chunk(parts)
                add(ids, kinds, none(ids), branch)
        if found != len(sample.images):
            raise UserError(
                f"sample {sample.id}: the text has {found} {IMAGE_MARK} but "
                f"{len(sample.images)} images are given"
            )
        row = {name: np.asarray(values, np.int32) for name, values in fields.items()}
        return row | {"document": np.zeros(len(row["tokens"]), np.int32)}

    def count_images(self, row: Row) -> int:
        """How many images an unpadded row has, whether or not its pixels are there."""
        return int((row["image"] >= 0).sum()) // max(self.visual_tokens, 1)

    def check_fit(self, row: Row, length: int, images: int, name: str) -> None:
        """Nothing is cut silently.

        Raises:
          UserError: when the row has more than `length` tokens or more than `images` images.
        """
        if (tokens := len(row["tokens"])) > length:
            raise UserError(f"sample {name}: {tokens} tokens do not fit into {length}")
        if (found := self.count_images(row)) > images:
            raise UserError(f"sample {name}: {found} images, but rows hold {images}")

    def pad(self, row: Row, length: int, images: int, name: str = "") -> Row:
        """The row right-padded to `length` tokens and `images` images. A row without its pixels,
        which were read before, may have any number.

        Raises:
          UserError: when it is longer.
        """
        self.check_fit(row, length, images if "pixels" in row else len(row["tokens"]), name)
        tokens = len(row["tokens"])
        padded = {}
        for key in ("tokens", *FIELDS):
            padded[key] = np.full(length, _FILL.get(key, 0), np.int32)
            padded[key][:tokens] = row[key]
        if images:
            pixels = row.get("pixels", ())
            size = self.image.size
            padded["pixels"] = np.zeros((images, size, size, 3), np.float32)
            padded["pixels"][: len(pixels)] = pixels if len(pixels) else 0
        return padded

    def join(self, rows: Sequence[Row]) -> Row:
        """Several rows as the documents of one: none of them sees another."""
        joined = {name: np.concatenate([row[name] for row in rows]) for name in ("tokens", *FIELDS)}
        images = [row["pixels"] for row in rows if "pixels" in row]
        if images:
            joined["pixels"] = np.concatenate(images)
        counts = [len(row["tokens"]) for row in rows]
        joined["document"] = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        # The visual features of a row are those of all its documents, one after the other.
        before = np.cumsum([0, *(len(row.get("pixels", ())) for row in rows)])[:-1]
        shift = np.repeat(before * self.visual_tokens, counts).astype(np.int32)
        joined["image"] = np.where(joined["image"] >= 0, joined["image"] + shift, -1)
        return joined

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Stacks padded rows."""
        stacked = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        batch = self.to_batch(stacked)
        return dataclasses.replace(batch, structure=infer_structure(batch.layout))

    def to_batch(self, stacked: Row, structure: RowStructure = RowStructure.ANY) -> Batch:
        layout = TokenLayout(**{f: stacked[f] for f in FIELDS}, visual_tokens=self.visual_tokens)
        return Batch(stacked["tokens"], layout, stacked.get("pixels"), structure=structure)


def word_ids(tokenizer, word: str) -> tuple[int, ...]:
    """Ids of the tokens that are a word, at the start of a text and after a space.

    Raises:
      UserError: when the tokenizer has no token for it.
    """
    spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
    ids = {ids[0] for ids in spelled if len(ids) == 1} - {tokenizer.unk_token_id}
    if not ids:
        raise UserError(f"selector token({word}): the tokenizer has no single token for {word!r}")
    return tuple(sorted(ids))


def _chunks(pieces: Sequence[Piece]):
    """Runs of text without an image as (branch, parts), with None for every image between them.

    A chunk also ends where the branch changes, so that a question is tokenised the same whether it
    is asked alone or beside others.
    """
    branch, parts = 0, []
    for piece in pieces:
        for number, text in enumerate(piece.text.split(IMAGE_MARK)):
            if parts and (number or branch != piece.branch):
                yield branch, tuple(parts)
                parts = []
            if number:
                yield None
            branch = piece.branch
            if text:
                parts.append((text, piece.kind))
    if parts:
        yield branch, tuple(parts)
