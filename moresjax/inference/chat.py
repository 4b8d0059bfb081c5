"""A conversation that keeps its KV cache between turns and streams its answers.

Each turn writes the whole conversation with the template, as training does, and reads only what
the cache does not hold yet: the tokens after the first that differs from what was read or generated
before. What a turn gives is therefore what reading the whole conversation anew would give.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.json_files import write_json
from moresjax.core.row import Row
from moresjax.data.images import ImageInput, open_image
from moresjax.data.llava import to_record
from moresjax.data.region_providers import OWN_REGIONS, RegionProvider, region_provider
from moresjax.data.regions import Regions
from moresjax.data.samples import Mark, Sample, Turn
from moresjax.generation.engine import Engine
from moresjax.generation.lengths import bucket
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.state import DecodeState
from moresjax.generation.text import TextStream, check_stops, has_stop
from moresjax.inference.arguments import Roi
from moresjax.inference.model import Model
from moresjax.inference.prompt_inputs import PromptImages, asked_sample, check_images, mark_images
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Edit, WeightDelta
from moresjax.tuning.multi_adapter import adapter_ids
from moresjax.tuning.selectors import Selector, parse_selector

# Regions that mean the same tokens at every turn, and that no new question belongs to unless the
# decode model acts on it.
_PLAIN = ("system", "answer", "generated", "all")


class Chat:
    """A conversation about images with a model.

    >>> import numpy as np
    >>> from moresjax.testing import talking_model
    >>> chat = Chat(talking_model(), max_new_tokens=2)
    >>> answer = "".join(chat.ask("how many ?", np.zeros((12, 12, 3), np.uint8)))
    >>> answer == chat.turns[-1].answer
    True

    Args:
      model: The model that answers.
      max_new_tokens: An answer has at most this many tokens.
      sampling: How tokens are chosen; the draws of a turn have the seed `sampling.seed` plus the
        number of the turn.
      stop: An answer ends before the first of these strings.
      chunk: The number of tokens between two pieces of a streamed answer.
      adapter: The name of the loaded adapter that answers; None for the base model.
      system: The system prompt; None for the template's.

    Attributes:
      turns: The questions and answers so far.
      images: The images of these questions, in the order of their marks.
      tokens_read: How many prompt tokens the last turn had to read, padding excluded.

    Raises:
      UserError: A stop string is empty, the adapter is unknown, or the template has no place for a
        system prompt.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        chunk: int = 4,
        adapter: str | None = None,
        system: str | None = None,
    ) -> None:
        self._model, self._limit, self._sampling = model, max_new_tokens, sampling
        self._stops, self._chunk = check_stops(stop), chunk
        self._saved: set[Path] = set()
        self.system = system
        self.reset()
        self.adapter = adapter

    def reset(self) -> None:
        """Forgets the conversation."""
        self.turns: list[Turn] = []
        self.tokens_read = 0
        self.images: tuple[ImageInput, ...] = ()
        self._pixels: list[np.ndarray] = []
        self._regions: Regions = ()
        self._marks: tuple[Mark, ...] = ()
        self._made: tuple[Engine, int] | None = None  # the engine, as it was, that made the cache
        self._state: DecodeState | None = None
        self._held: Row | None = None  # tokens and layout of what the cache holds

    @property
    def system(self) -> str | None:
        """The system prompt; it may be set at any turn, and earlier answers stay as they are."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = self._model.prompts.system_prompt(text)

    @property
    def adapter(self) -> str | None:
        """The adapter that answers; it may be set at any turn, and earlier answers stay."""
        return self._adapters[0] if self._adapters else None

    @adapter.setter
    def adapter(self, name: str | None) -> None:
        names = None if name is None else [name]
        adapter_ids(self._model.mllm.tuning, names, 1)
        # What the cache holds was read with another adapter.
        self._adapters, self._state = names, None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters to choose from, beside the base model."""
        return self._model.adapters

    @property
    def takes_images(self) -> bool:
        """Whether questions may have images."""
        return self._model.prompts.processor.image is not None

    def save(self, file: str | Path) -> Path:
        """Writes the conversation as a LLaVA file of one record, whose image root is its folder.

        Images that lie elsewhere, or have no file, are copied into a folder beside it. Another file
        of that name is not overwritten.

        Raises:
          UserError: There is no answer yet, or the file cannot be written.
        """
        file = Path(file)
        if not self.turns:
            raise UserError("there is no answer to save yet")
        if file.exists() and file.resolve() not in self._saved:
            raise UserError(f"{file} exists already; save under another name")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            names = [_image_name(x, n, file) for n, x in enumerate(self.images)]
            said = self.turns, names, self.system, self._regions, self._marks
            record = to_record(file.stem, *said)
            write_json(file, [record], indent=1, ensure_ascii=False)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
        self._saved.add(file.resolve())
        return file

    def ask(
        self,
        question: str,
        images: PromptImages = (),
        *,
        roi: Roi = None,
        marks: Mapping[str, Any] | None = None,
    ) -> Generator[str, None, None]:
        """Answers piece by piece; the turn counts once the answer has been read to its end.

        Args:
          question: What the user says; `<image>` marks where an image goes, else images go first.
          images: One image or a list of images: paths, PIL images or uint8 arrays `[Y, X, 3]`.
          roi: The boxes of these images, or the name of a provider, as in `Model.generate`.
          marks: Pieces of the question by name, as in `Model.generate`.

        Raises:
          UserError: The question is empty, marks and images do not agree, or the conversation has
            become too long.
        """
        new = check_images(images, "the question")
        if not question.strip() and not new:
            raise UserError("the question is empty")
        prompts, service = self._model.prompts, self._model.service
        processor, name = prompts.processor, f"turn {len(self.turns) + 1}"
        regions = processor.regions if roi is None and processor.centres else OWN_REGIONS
        if isinstance(roi, str | RegionProvider):
            regions, roi = region_provider(roi) if isinstance(roi, str) else roi, None
        said = asked_sample(name, question, new, roi=roi, marks=marks)
        asks = regions.kind == "attention"
        said = said if asks else regions(said)  # kept, so that later turns have the same
        question = mark_images(question, new)
        sample = Sample(
            name,
            (*self.turns, Turn(question)),
            (*self.images, *new),
            system=self.system,
            roi=(*self._regions, *(said.roi or [None] * len(new))),
            marks=(*self._marks, *(replace(x, turn=len(self.turns)) for x in said.marks)),
        )
        row = processor.text_row(sample)
        service.check_context(row, self._limit)
        if (
            asks and new and prompts.asks_model(sample, regions)
        ):  # of these images; others have theirs
            looked = prompts.attended(sample, regions).roi or ()
            sample = replace(sample, roi=(*self._regions, *looked[len(self.images) :]))
        pixels = [*self._pixels]
        for image in new:
            assert processor.image is not None  # a model without images was refused with the text
            pixels.append(processor.image(image))
        if pixels:
            row = row.replace(pixels=np.stack(pixels), roi=processor.roi(sample, OWN_REGIONS))
        engine = service.engine()
        state = self._read(row, engine)
        self._made = (engine, engine.changes)
        stream = TextStream(prompts.spell, self._stops)
        while True:
            ids = np.asarray(state.tokens[0, : int(state.length[0])])
            done = bool(state.done[0]) or has_stop(prompts.spell(ids), self._stops)
            if piece := stream.push(ids, final=done):
                yield piece
            if done:
                break
            state = engine.advance(state, self._chunk)
        self._state, self._held = state, row.append(ids[:-1]).replace(pixels=None)
        self.images, self._pixels = sample.images, pixels
        self._regions, self._marks = sample.roi or (), sample.marks
        self.turns = [*self.turns, Turn(question, stream.text)]

    def _read(self, row: Row, engine: Engine) -> DecodeState:
        """Prefill of the conversation, as far as the cache does not hold it."""
        tokens = len(row)
        length = bucket(tokens)
        batch = self._model.service.batch([row], length, self._adapters)
        cache_length = bucket(engine.num_virtual_tokens + length + self._limit)
        # A cache that another engine made, or this one with another vector, is of another tuning.
        state = self._state if self._made == (engine, engine.changes) else None
        self._state = None  # whoever stops this turn leaves no cache behind
        if state is not None:
            cache_length = max(cache_length, state.cache_layout.shape[1])
        options = {
            "cache_length": cache_length,
            "sampling": self._sampling,
            "seeds": [(self._sampling.seed + len(self.turns)) % 2**32],
            "limits": [self._limit],
        }
        held = 0 if state is None else self._common(row)
        # The last token is read in any case: it gives the first new one.
        count = bucket(tokens - min(held, tokens - 1), 8)
        first = min(tokens - 1, held, length - count)
        if state is None or first <= 0 or (row.image[first:] >= 0).any():
            self.tokens_read = tokens
            return engine.prefill(batch, self._limit, **options)
        self.tokens_read = tokens - first
        return engine.append_prompt(batch, state.caches, first, count, self._limit, **options)

    def _common(self, row: Row) -> int:
        """How many tokens at the start of `row` the cache holds as they would be read anew."""
        if self._held is None or not keeps_cache(self._model.mllm.tuning):
            return 0
        return row.common_prefix(self._held)


def _image_name(image: ImageInput, number: int, file: Path) -> str:
    """The path of an image from a file's folder; it is copied there if it lies elsewhere."""
    folder = file.parent.resolve()
    path = Path(image).resolve() if isinstance(image, (str, Path)) else None
    if path is not None and path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    copies = folder / f"{file.stem}-images"
    copies.mkdir(exist_ok=True)
    if path is not None:
        copy = copies / f"{number}-{path.name}"
        shutil.copyfile(path, copy)
    else:
        copy = copies / f"{number}.png"
        open_image(image).save(copy)
    return copy.relative_to(folder).as_posix()


def keeps_cache(tuning: Tuning) -> bool:
    """Whether the cache of a conversation may be used again in its next turn.

    The methods must do to a token what they would still do to it later in the conversation, and do
    it to further text even in the decode model.
    """
    for _, method in tuning.methods:
        if isinstance(method, WeightDelta) and method.sees_tokens:
            return False
        if isinstance(method, Edit) and not _is_plain(parse_selector(method.positions)):
            return False
    return True


def _is_plain(selector: Selector) -> bool:
    """Whether it selects images, or all text that the decode model selects too."""
    return all(
        region == "image" or (part.whole and (region in _PLAIN or region.startswith("token(")))
        for region, part in selector.parts
    )
