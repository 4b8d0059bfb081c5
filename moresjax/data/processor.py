"""Samples to model inputs: tokens, layout and pixels, built piece by piece.

Axis legend: B rows, S tokens, N images per row, V visual tokens per image, Y, X pixels.

Ids and kinds come from the same tokenisation: the text between two images is tokenised once, and
every token takes the kind and branch of its last character. A label mask therefore cannot
disagree with the tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, RowStructure, TokenKind, TokenLayout, infer_structure
from moresjax.core.row import Row, stack
from moresjax.data.images import ImageInput, ImageProcessor, LazyPixels, image_keys
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.data.templates import Piece, Template


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
            return row.replace(pixels=self.pixels(sample))
        key = image_keys(sample.images)
        if key not in known:
            try:
                known[key] = LazyPixels(sample.images, lambda: self.pixels(sample))
            except UserError as error:
                raise UserError(f"sample {sample.id}: {error}") from None
        return row.replace(pixels=known[key])

    def pixels(self, sample: Sample) -> Float[np.ndarray, "N Y X 3"]:
        """The images of a sample that has some.

        Raises:
          UserError: for an image that cannot be read.
        """
        try:
            return np.stack([self.normalise(image) for image in sample.images])
        except UserError as error:
            raise UserError(f"sample {sample.id}: {error}") from None

    def normalise(self, image: ImageInput) -> Float[np.ndarray, "Y X 3"]:
        """The pixels of one image.

        Raises:
          UserError: The image cannot be read, or the model takes no images.
        """
        if self.image is None:
            raise UserError("this model takes no images")
        return self.image(image)

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
        arrays = {name: np.asarray(values, np.int32) for name, values in fields.items()}
        return Row(**arrays, document=np.zeros_like(arrays["tokens"]), id=sample.id)

    def count_images(self, row: Row) -> int:
        """How many images an unpadded row has, whether or not its pixels are there."""
        return int((row.image >= 0).sum()) // max(self.visual_tokens, 1)

    def check_fit(self, row: Row, max_seq_len: int, images_per_row: int) -> None:
        """Refuses a row that is too large; nothing is cut silently.

        Raises:
          UserError: when the row has more than `max_seq_len` tokens or `images_per_row` images.
        """
        if len(row) > max_seq_len:
            raise UserError(f"sample {row.id}: {len(row)} tokens do not fit into {max_seq_len}")
        if (found := self.count_images(row)) > images_per_row:
            raise UserError(f"sample {row.id}: {found} images, but rows hold {images_per_row}")

    def pad(self, row: Row, max_seq_len: int, images_per_row: int) -> Row:
        """The row right-padded to `max_seq_len` tokens and `images_per_row` images.

        A row without its pixels, which were read before, may be about any number of images.

        Raises:
          UserError: when it is longer.
        """
        self.check_fit(row, max_seq_len, len(row) if row.pixels is None else images_per_row)
        pixels = None
        if images_per_row:
            size = self.image.size
            pixels = np.zeros((images_per_row, size, size, 3), np.float32)
            if row.num_images:
                pixels[: row.num_images] = np.asarray(row.pixels)
        return row.pad(max_seq_len).replace(pixels=pixels)

    def join(self, rows: Sequence[Row]) -> Row:
        """Several rows as the documents of one: none of them sees another."""
        return Row.concat(rows, self.visual_tokens)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Stacks padded rows."""
        batch = self.to_batch(stack([row.to_dict() for row in rows]))
        return dataclasses.replace(batch, structure=infer_structure(batch.layout))

    def to_batch(
        self, stacked: Mapping[str, Any], structure: RowStructure = RowStructure.ANY
    ) -> Batch:
        """A batch of stacked rows, given as arrays `[B, ...]` by name."""
        layout = TokenLayout.stacked(stacked, self.visual_tokens)
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
