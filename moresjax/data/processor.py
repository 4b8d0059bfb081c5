"""Samples to model inputs: tokens, layout and pixels, built piece by piece.

Axis legend: B rows, S tokens, N images per row, V visual tokens per image, Y, X pixels.

Ids and kinds come from the same tokenisation: the text between two images is tokenised once, and
every token takes the kind and branch of its last character. A label mask therefore cannot
disagree with the tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, RowStructure, TokenKind, TokenLayout, infer_structure
from moresjax.core.row import Row, stack
from moresjax.core.types import Tokenizer
from moresjax.data.images import ImageInput, ImageProcessor, LazyPixels, image_keys
from moresjax.data.region_providers import OWN_REGIONS, RegionProvider
from moresjax.data.regions import tokens_inside
from moresjax.data.row_builder import RowBuilder, marked_spans, split_texts
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.data.templates import Piece, Template
from moresjax.data.text_encoder import Encoded, Text, TextEncoder, Texts


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What the folder of a model says about generation.

    Attributes:
      eos_ids: Tokens that end an answer, beside the tokenizer's and the template's.
      repetition_penalty: The penalty where a call says nothing, see `Sampling`.
    """

    eos_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns samples into rows and rows into batches.

    >>> from moresjax.data.digits import build_tokenizer
    >>> from moresjax.data.samples import Turn
    >>> from moresjax.data.templates import get_template
    >>> processor = Processor(build_tokenizer(), get_template("bare"))
    >>> row = processor.row(Sample("digit", (Turn("what is the largest ?", "nine"),)))
    >>> row.kind.tolist()
    [1, 3, 3, 3, 3, 3, 4, 4]
    >>> processor.batch([processor.pad(row, max_seq_len=10, images_per_row=0)]).tokens.shape
    (1, 10)

    Attributes:
      tokenizer: A fast tokenizer of `transformers`.
      template: How conversations are written.
      image: How images become pixels; None for a model without vision.
      visual_tokens: V, the number of visual tokens per image.
      generation: What the model's folder says about generation.
      vocab_size: The number of embeddings, beyond which a token is refused; 0 for any number.
      split_special_tokens: Whether control tokens such as `</s>` in the text of users, samples and
        answers are spelt out, and `<image>` in an answer, too; else they are control tokens, which
        is what LLaVA does. The template's own control tokens are tokens either way.
      marks: What selectors ask for: `mark(NAME)` and `word(N)`, each of which is a bit of
        `Row.marks` in this order. Empty: rows have no marks.
      centres: For the selector `roi` the place of every visual token in the square that the encoder
        sees, see `tokens_inside`. Empty: rows have no regions.
      regions: Where regions come from.
    """

    tokenizer: Tokenizer
    template: Template
    image: ImageProcessor | None = None
    visual_tokens: int = 0
    generation: GenerationDefaults = GenerationDefaults()
    vocab_size: int = 0
    split_special_tokens: bool = True
    marks: tuple[str, ...] = ()
    centres: tuple[tuple[float, float], ...] = ()
    regions: RegionProvider = OWN_REGIONS

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError("the tokenizer must be a fast one: offsets are needed for the labels")

    @functools.cached_property
    def _encode_chunk(self) -> Callable[[Texts], Encoded]:
        # Prompts, questions and answers recur: most chunks are looked up, not tokenised.
        return functools.lru_cache(1 << 16)(self._tokenize)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of tokenizer, model and template, if there are any."""
        ends = {*self.generation.eos_ids, self.tokenizer.eos_token_id} - {None}
        closing = (self.template.end or "").strip()
        if closing in self.tokenizer.get_vocab():
            ends.add(self.tokenizer.convert_tokens_to_ids(closing))
        return tuple(sorted(ends))

    @property
    def system_ids(self) -> tuple[int, ...]:
        """The tokens before a user's first word: beginning, system prompt and first role marker."""
        text = self.template.system + self.template.user if self.template.keep_question else ""
        ids = self._encode_chunk((Text(text, TokenKind.SYSTEM, True),)).ids if text else ()
        return (*self._bos, *ids)

    @functools.cached_property
    def without_end(self) -> "Processor":
        """The same, but answers go without the token that ends them."""
        return dataclasses.replace(self, template=dataclasses.replace(self.template, end=""))

    def _tokenize(self, texts: Texts) -> Encoded:
        """The tokens of consecutive texts, tokenised as one string."""
        encoded = self._text_encoder(texts)
        if self.vocab_size and (largest := max(encoded.ids, default=0)) >= self.vocab_size:
            raise UserError(
                f"token {self.tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but "
                f"the model has {self.vocab_size} embeddings; resize the model for its tokenizer"
            )
        return encoded

    @functools.cached_property
    def _text_encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, self.split_special_tokens, self.template.markers)

    @functools.cached_property
    def _bos(self) -> tuple[int, ...]:
        ids = self.tokenizer("")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and bos in ids else ()

    def row(
        self,
        sample: Sample,
        known: dict[tuple, LazyPixels] | None = None,
        regions: RegionProvider | None = None,
    ) -> Row:
        """The unpadded row of one sample.

        Args:
          sample: The sample.
          known: Pixels by `image_keys`, to which those of new images are added. With it images are
            opened later, when a batch is made, and broken ones raise then.
          regions: Where its regions come from; default: the processor's.

        Raises:
          UserError: The marks and the images differ in number, the text cannot be tokenised, the
            model takes no images, an image cannot be read, or nothing is said of a region that is
            asked for.
        """
        row = self.text_row(sample)
        if not sample.images:
            return row
        row = row.replace(roi=self.roi(sample, regions))
        if known is None:
            return row.replace(pixels=self.pixels(sample))
        key = image_keys(sample.images)
        if key not in known:
            try:
                known[key] = LazyPixels(sample.images, lambda: self.pixels(sample))
            except UserError as error:
                raise UserError(f"sample {sample.id}: {error}") from None
        return row.replace(pixels=known[key])

    def with_images(self, row: Row, sample: Sample) -> Row:
        """The row of a sample with its pixels, and with its regions where they are asked for.

        Raises:
          UserError: An image cannot be read, or nothing is said of its region.
        """
        return row.replace(pixels=self.pixels(sample), roi=self.roi(sample))

    def roi(
        self, sample: Sample, regions: RegionProvider | None = None
    ) -> Bool[np.ndarray, "N V"] | None:
        """Which visual tokens of a sample's images lie in its regions.

        None if nobody asks, or without an image.

        Raises:
          UserError: Nothing is said of an image, or it cannot be read.
        """
        if not (self.centres and sample.images):
            return None
        if self.image is None:
            raise UserError(f"sample {sample.id}: this model takes no images")
        sample = (self.regions if regions is None else regions)(sample)
        centres, masks = np.asarray(self.centres), []
        for image, boxes in zip(
            sample.images, sample.roi or [None] * len(sample.images), strict=True
        ):
            if boxes is None:
                raise UserError(
                    f"sample {sample.id}: the tuning acts on a region of interest (roi), but "
                    "nothing is said of it; give boxes for every image, () for no part of it"
                )
            try:
                masks.append(tokens_inside(boxes, centres, self.image.placement(image)))
            except UserError as error:
                raise UserError(f"sample {sample.id}: {error}") from None
        return np.stack(masks)

    def pixels(self, sample: Sample) -> Float[np.ndarray, "N Y X 3"]:
        """The pixels of a sample that has images.

        Raises:
          UserError: An image cannot be read.
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
          UserError: The marks and the images differ in number, the text cannot be tokenised, or the
            model takes no images.
        """
        pieces = self.template.render(sample, self.tokenizer.eos_token or "")
        try:
            row = self._encode(pieces, sample)
        except UserError as error:
            raise UserError(f"sample {sample.id}: {error}") from None
        except (TypeError, UnicodeError) as error:  # lone surrogates, values that are not text
            raise UserError(f"sample {sample.id}: the text cannot be tokenised: {error}") from None
        if sample.images and self.image is None:
            raise UserError(f"sample {sample.id}: this model takes no images")
        return row

    def left_out(self, sample: Sample) -> str:
        """What its source and the template leave out of a sample; empty for nothing."""
        return "; ".join(filter(None, (sample.cut, self.template.left_out(sample))))

    def _encode(self, pieces: Sequence[Piece], sample: Sample) -> Row:
        built = RowBuilder(marked=bool(self.marks))
        built.add(self._bos, [int(TokenKind.SYSTEM)] * len(self._bos), branch=0)
        found, spans = 0, marked_spans(sample, self.marks) if self.marks else {}
        for chunk in split_texts(pieces, spans, answers_show_images=not self.split_special_tokens):
            if chunk is None:
                built.add_image(found, self.visual_tokens)
                found += 1
            else:
                branch, texts = chunk
                built.add(**self._encode_chunk(texts)._asdict(), branch=branch)
        if found != len(sample.images):
            raise UserError(
                f"the text has {found} {IMAGE_MARK} but {len(sample.images)} images are given"
            )
        return built.row(sample.id)

    def count_images(self, row: Row) -> int:
        """How many images an unpadded row has, whether or not its pixels are there."""
        return int((row.image >= 0).sum()) // max(self.visual_tokens, 1)

    def check_fit(self, row: Row, max_seq_len: int, images_per_row: int) -> None:
        """Refuses a row that is too large; nothing is cut silently.

        Raises:
          UserError: The row has more than `max_seq_len` tokens or `images_per_row` images.
        """
        if len(row) > max_seq_len:
            raise UserError(f"sample {row.id}: {len(row)} tokens do not fit into {max_seq_len}")
        if (found := self.count_images(row)) > images_per_row:
            raise UserError(f"sample {row.id}: {found} images, but rows hold {images_per_row}")

    def pad(self, row: Row, max_seq_len: int, images_per_row: int) -> Row:
        """The row right-padded to `max_seq_len` tokens and `images_per_row` images.

        A row without its pixels, which were read before, may be about any number of images.

        Raises:
          UserError: The row is longer, or has pixels of more images.
        """
        self.check_fit(row, max_seq_len, len(row) if row.pixels is None else images_per_row)
        pixels = None
        if images_per_row and self.image is not None:
            size = self.image.size
            pixels = np.zeros((images_per_row, size, size, 3), np.float32)
            if row.num_images:
                pixels[: row.num_images] = np.asarray(row.pixels)
        roi, marks = self._padded_roi(row, images_per_row), row.marks
        if self.marks and marks is None:
            if len(row):
                raise UserError(
                    f"sample {row.id or 'without a name'}: the tuning acts on {self.marks[0]}, "
                    "which a call with token ids does not tell; give a text"
                )
            marks = row.tokens
        return row.replace(marks=marks).pad(max_seq_len).replace(pixels=pixels, roi=roi)

    def _padded_roi(self, row: Row, images: int) -> Bool[np.ndarray, "N V"] | None:
        """The regions of a row with those of so many images at least, and of one in any case."""
        if not self.centres:
            return None
        if row.roi is None and (row.image >= 0).any():
            raise UserError(
                f"sample {row.id or 'without a name'}: the tuning acts on a region of interest "
                "(roi), but nothing is said of it"
            )
        known = 0 if row.roi is None else len(row.roi)
        roi = np.zeros((max(images, known, 1), self.visual_tokens), bool)
        roi[:known] = row.roi if known else False
        return roi

    def join(self, rows: Sequence[Row]) -> Row:
        """Several rows as the documents of one: none of them sees another."""
        return Row.concat(rows, self.visual_tokens)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Stacks padded rows to a batch; finds out what all rows have in common."""
        if self.centres:  # rows whose pixels were read before may have more regions than others
            most = max(0 if row.roi is None else len(row.roi) for row in rows)
            rows = [row.replace(roi=self._padded_roi(row, most)) for row in rows]
        batch = self.to_batch(stack([row.to_dict() for row in rows]))
        return dataclasses.replace(batch, structure=infer_structure(batch.layout))

    def to_batch(
        self, stacked: Mapping[str, Any], structure: RowStructure = RowStructure.ANY
    ) -> Batch:
        """A batch of stacked rows, given as arrays `[B, ...]` by name."""
        layout = TokenLayout.stacked(stacked, self.visual_tokens)
        roi = stacked.get("roi")
        if roi is not None:
            roi = roi.reshape(len(roi), -1)
        return Batch(
            stacked["tokens"],
            layout,
            stacked.get("pixels"),
            roi,
            structure=structure,
            marks=stacked.get("marks"),
        )


def word_ids(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """The ids of the tokens that are a word, at the start of a text and after a space.

    Raises:
      UserError: The tokenizer has no token for it.
    """
    spelled = [tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
    ids = {ids[0] for ids in spelled if len(ids) == 1} - {tokenizer.unk_token_id}
    if not ids:
        raise UserError(f"selector token({word}): the tokenizer has no single token for {word!r}")
    return tuple(sorted(ids))
