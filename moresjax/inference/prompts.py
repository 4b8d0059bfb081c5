"""Prompts and images to rows of tokens, and generated tokens back to text.

Axis legend: B rows, S tokens, G new tokens, Y, X pixels.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind
from moresjax.core.row import Row
from moresjax.core.types import AnyArray, Ids
from moresjax.data.images import ImageInput, LazyPixels
from moresjax.data.processor import Processor
from moresjax.data.region_providers import OWN_REGIONS, RegionProvider, region_provider
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.data.templates import template_name
from moresjax.generation.state import Generation
from moresjax.generation.text import check_stops, cut_at_stop, has_stop
from moresjax.inference.prompt_inputs import PromptImages, asked_sample, check_images

StopReason = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a prompt was answered with, in full.

    Attributes:
      text: The answer as `Model.generate` returns it, without special tokens and stop string.
      tokens: The new token ids `[G]`, up to the end token or the last token of the stop string.
      logprobs: Natural log-probabilities of these tokens under the model `[G]`, before any
        sampling setting; None unless they were asked for.
      stop_reason: `eos` after an end token, `stop` after a stop string, `length` when
        `max_new_tokens` were used up.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray | None
    stop_reason: StopReason

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON; without `logprobs` when there are none."""
        known = {"text": self.text, "tokens": self.tokens.tolist(), "stop_reason": self.stop_reason}
        return known if self.logprobs is None else known | {"logprobs": self.logprobs.tolist()}


@dataclasses.dataclass
class PromptEncoder:
    """Turns what users say into rows of tokens, and new tokens into text.

    Attributes:
      saved_processor: Tokenizer, template and image processor; None for a model without tokenizer,
        with which only token ids can be used.
      attend: Gives a prompt the regions that the model attends to, for `roi=attention(...)`.
    """

    saved_processor: Processor | None
    attend: Callable[[Sample, RegionProvider], Sample] | None = None

    @property
    def processor(self) -> Processor:
        """Tokenizer, template and image processor.

        Raises:
          UserError: when the model was loaded without a tokenizer.
        """
        if self.saved_processor is None:
            raise UserError("this model was loaded without a tokenizer; text cannot be used")
        return self.saved_processor

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `transformers`.

        Raises:
          UserError: The model was loaded without one.
        """
        return self.processor.tokenizer

    def row(
        self,
        text: str,
        images: PromptImages = (),
        name: str = "prompt",
        known: dict[tuple, LazyPixels] | None = None,
        system: str | None = None,
        roi: Any = None,
        marks: Any = None,
        regions: RegionProvider | None = None,
    ) -> Row:
        """The unpadded row of a one-turn prompt. Images without an `<image>` mark go first.

        Args:
          text: What the user says.
          images: One image or a list of images.
          name: What error messages call the prompt.
          known: Pixels of earlier prompts, see `Processor.row`. An image that several prompts are
            about is then read by the model once.
          system: The system prompt; default: the template's.
          roi: The boxes of the images, see `find_regions`, or a provider or its name.
          marks: Pieces of the text by name, see `find_marks`.
          regions: Where regions come from; default: the processor's.

        Raises:
          UserError: when marks and images do not agree, an image is missing or broken, the template
            has no place for a system prompt, or a box or mark is none.
        """
        own = check_images(images, name)
        if not text.strip() and not own:
            raise UserError("the prompt is empty")
        if isinstance(roi, str):
            roi = region_provider(roi)
        if isinstance(roi, RegionProvider):
            regions, roi = roi, None
        sample = asked_sample(name, text, own, self.system_prompt(system), roi, marks)
        return self.sample_row(sample, known, regions)

    def sample_row(
        self,
        sample: Sample,
        known: dict[tuple, LazyPixels] | None = None,
        regions: RegionProvider | None = None,
    ) -> Row:
        """The unpadded row of a prompt that is a sample; see `Processor.row`."""
        if self.asks_model(sample, regions):
            sample, regions = self.attended(sample, regions), OWN_REGIONS
        return self.processor.row(sample, known, regions)

    def asks_model(self, sample: Sample, regions: RegionProvider | None = None) -> bool:
        """Whether the regions of a prompt are where the model looks, which it has to be asked.

        Args:
          sample: The prompt.
          regions: Where its regions come from; default: the processor's.
        """
        regions = self.processor.regions if regions is None else regions
        asks = regions.kind == "attention" and self.processor.centres and sample.images
        return bool(asks and self.attend is not None)

    def attended(self, sample: Sample, regions: RegionProvider | None = None) -> Sample:
        """A prompt with the regions that the model attends to, see `asks_model`; runs the model."""
        assert self.attend is not None  # `asks_model` says so
        return self.attend(sample, self.processor.regions if regions is None else regions)

    def asked(
        self, text: str, images: PromptImages = (), *, roi: Any = None, marks: Any = None
    ) -> Row:
        """The unpadded row of a prompt with what a call says of it, as `Model.generate` reads it.

        Args:
          text: What the user says.
          images: One image or a list of images.
          roi: The regions of this prompt, which hold whatever the processor is told to do.
          marks: Pieces of the text by name.

        Raises:
          UserError: As `row`.
        """
        regions = None if roi is None else OWN_REGIONS
        return self.row(text, images, roi=roi, marks=marks, regions=regions)

    def rows(
        self,
        prompts: Sequence[str],
        images: Sequence[tuple[ImageInput, ...]],
        system: str | None = None,
        regions: Sequence[Any] | None = None,
        marks: Sequence[Any] | None = None,
    ) -> list[Row]:
        """A row for every prompt, with its own regions and marks; equal images are opened once."""
        known: dict[tuple, LazyPixels] = {}
        nothing = [None] * len(prompts)
        whole = zip(prompts, images, regions or nothing, marks or nothing, strict=True)
        return [
            # What a call says itself holds, whatever the processor is told to do.
            self.row(
                text,
                own,
                f"prompt {n}",
                known,
                system,
                roi,
                named,
                None if roi is None else OWN_REGIONS,
            )
            for n, (text, own, roi, named) in enumerate(whole)
        ]

    def system_prompt(self, text: str | None) -> str | None:
        """The text as a system prompt; None for the template's own.

        Raises:
          UserError: It is blank, has an image, or the template has no place for it.
        """
        if text is None:
            return None
        if not isinstance(text, str) or not text.strip() or IMAGE_MARK in text:
            raise UserError(f"a system prompt must be a text without {IMAGE_MARK}, got {text!r}")
        template = self.processor.template
        if template.around_system is None:
            raise UserError(
                f"template {template_name(template)} has no place for a system prompt; leave it "
                "out, or choose another template"
            )
        return text

    def with_answer(
        self,
        row: Row,
        text: str,
        images: PromptImages,
        answer: str,
        system: str | None = None,
        marks: Any = None,
    ) -> tuple[Row, np.ndarray]:
        """A prompt's row and the token ids of an answer to it, tokenised together.

        Args:
          row: The row that `row` made of the prompt; its pixels are used again.
          text: The prompt.
          images: One image or a list of images.
          answer: The answer, without the token that ends it.
          system: The system prompt that the row has; default: the template's.
          marks: Pieces of the text by name, as the row has them.

        Raises:
          UserError: for an empty answer.
        """
        if not answer.strip():
            raise UserError(f"an answer to score is empty: {text!r}")
        own = check_images(images)
        sample = asked_sample(row.id, text, own, system, None, marks, answer)
        whole = self.processor.without_end.text_row(sample)
        head = int(np.argmax(whole.kind == TokenKind.ANSWER))
        return whole[:head].replace(pixels=row.pixels, roi=row.roi), whole.tokens[head:]

    def batch(self, rows: Sequence[Row], length: int) -> Batch:
        """Rows as one batch, right-padded to `length` tokens."""
        processor = self.processor
        images = max(row.num_images for row in rows)
        padded = {}  # a row that fills places of the batch occurs several times
        for row in rows:
            if id(row) not in padded:
                padded[id(row)] = processor.pad(row, length, images)
        return processor.batch([padded[id(row)] for row in rows])

    def decode(self, generation: Generation) -> list[str]:
        """Texts of all rows of a generation, without special tokens."""
        tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.length)
        return [self.text(row[:n]) for row, n in zip(tokens, lengths, strict=True)]

    def text(self, ids: Ids, stop: str | Sequence[str] = ()) -> str:
        """New tokens as text, before the first stop string and without special tokens."""
        return cut_at_stop(self.spell(ids), check_stops(stop)).strip()

    def spell(self, ids: Ids) -> str:
        """New tokens as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def token_texts(self, row: Row) -> list[str]:
        """The tokens of a row as text, one by one; `<image>` for visual ones."""
        pairs = zip(row.tokens, row.image >= 0, strict=True)
        return [IMAGE_MARK if visual else self.tokenizer.decode([token]) for token, visual in pairs]

    def answer(
        self, ids: Ids, logprobs: AnyArray | None = None, stop: str | Sequence[str] = ()
    ) -> Answer:
        """New tokens as an `Answer`.

        Args:
          ids: The new tokens, the end token included.
          logprobs: Their log-probabilities, if there are any.
          stop: Stop strings; tokens after the first of them are left out.
        """
        stops, tokens = check_stops(stop), np.asarray(ids, np.int32)
        text = self.text(tokens, stops)
        reason: StopReason = "length"
        if has_stop(self.spell(tokens), stops):
            reason, sizes = "stop", range(1, len(tokens) + 1)
            ended = bisect.bisect_left(
                sizes, True, key=lambda size: has_stop(self.spell(tokens[:size]), stops)
            )
            tokens = tokens[: sizes[ended]]
        elif len(tokens) and int(tokens[-1]) in self.processor.eos_ids:
            reason = "eos"
        chosen = None if logprobs is None else np.asarray(logprobs)[: len(tokens)]
        return Answer(text, tokens, chosen, reason)
