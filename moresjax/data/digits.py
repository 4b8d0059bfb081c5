"""The built-in world: scenes of real handwritten digits, their descriptions and questions.

Axis legend: Y, X pixels.

Source: scikit-learn's `load_digits` (1,797 real 8 x 8 digits of the UCI optical recognition set). A
scene is a 2 x 2 grid of digits, each enlarged to 16 x 16 pixels. Digit *instances* are split once
into train, val and test, so a test scene shows handwriting that no stage has seen.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moresjax.core.errors import UserError, choice_error
from moresjax.core.types import Tokenizer
from moresjax.data.samples import IMAGE_MARK, Sample, Turn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")
CELL = 16  # pixels
SIZE = 2 * CELL
SPLITS = {"train": 0.70, "val": 0.15, "test": 0.15}
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
FAMILIES = ("presence", "count", "position", "largest", "compare", "same", "smallest")
UNSEEN = "smallest"  # asked in visual instruction tuning only, never in the text stage


def _digits_file() -> Path:
    """The file of scikit-learn that `load_digits` reads; to import it takes seconds."""
    found = importlib.util.find_spec("sklearn")
    if not (found and found.origin):
        raise UserError("the digits are a file of scikit-learn: pip install scikit-learn")
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


@functools.cache
def load_instances() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Enlarged digits `[n, 16, 16]` uint8 and their labels per split; classes are balanced."""
    table = np.loadtxt(_digits_file(), delimiter=",")
    images, labels = table[:, :-1], table[:, -1].astype(int)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    resize = lambda x: Image.fromarray(x).resize((CELL, CELL), Image.Resampling.BILINEAR)  # noqa: E731
    images = np.stack([np.asarray(resize(x)) for x in images])
    rng = np.random.default_rng(0)
    chosen = {split: [] for split in SPLITS}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        edges = np.cumsum([round(share * len(order)) for share in SPLITS.values()])[:-1]
        for split, instances in zip(SPLITS, np.split(order, edges), strict=True):
            chosen[split].append(instances)
    index = {split: np.concatenate(instances) for split, instances in chosen.items()}
    return {split: (images[i], labels[i]) for split, i in index.items()}


def _instances(split: str) -> tuple[np.ndarray, np.ndarray]:
    if split not in SPLITS:
        raise choice_error("split", split, SPLITS)
    return load_instances()[split]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Digits of the four cells in the order of `CELLS`, and their image `[Y, X, 3]` uint8."""

    digits: tuple[int, ...]
    image: np.ndarray


def random_digits(rng: np.random.Generator) -> tuple[int, ...]:
    """Four digits.

    In half of the scenes one cell repeats another's digit (as another instance), so that "same" and
    "count" questions have both answers.
    """
    digits = rng.integers(0, 10, 4)
    if rng.random() < 0.5:
        source, target = rng.permutation(4)[:2]
        digits[target] = digits[source]
    return tuple(int(d) for d in digits)


def make_scene(rng: np.random.Generator, split: str, shift: int = 0) -> Scene:
    """A random scene of the split's handwriting; digits move by up to `shift` pixels.

    >>> make_scene(np.random.default_rng(0), "test").image.shape
    (32, 32, 3)

    Raises:
      UserError: The split is unknown.
    """
    digits = random_digits(rng)
    glyphs = _glyphs(split, shift)
    canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
    for cell, digit in enumerate(digits):
        pool = glyphs[digit]
        y, x = divmod(cell, 2)
        glyph = pool[rng.integers(len(pool))]
        canvas[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] = glyph
    return Scene(digits, canvas)


def exchange(scene: Scene, cell: int, digit: int, split: str, rng: np.random.Generator) -> Scene:
    """The same scene with another digit in a cell.

    >>> scene = make_scene(np.random.default_rng(0), "test")
    >>> new = exchange(scene, 3, 7, "test", np.random.default_rng(1))
    >>> new.digits[3], bool((new.image[:16] == scene.image[:16]).all())
    (7, True)
    """
    canvas, pool, (y, x) = scene.image.copy(), _glyphs(split, 0)[digit], divmod(cell, 2)
    glyph = pool[rng.integers(len(pool))]
    canvas[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] = glyph
    return Scene((*scene.digits[:cell], digit, *scene.digits[cell + 1 :]), canvas)


@functools.cache
def _glyphs(split: str, shift: int) -> list[np.ndarray]:
    """For every digit its instances `[n, 16, 16, 1]`, in all shifts of up to `shift` pixels."""
    images, labels = _instances(split)
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift)))
    moves = [(y, x) for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
    moved = np.stack([padded[:, y : y + CELL, x : x + CELL] for y, x in moves], axis=1)
    return [moved[labels == digit].reshape(-1, CELL, CELL, 1) for digit in range(10)]


def describe(digits: tuple[int, ...], rng: np.random.Generator) -> str:
    """The four cells in random order, so that every digit answers the cell just named."""
    return " ".join(f"{CELLS[c]} {WORDS[digits[c]]}" for c in rng.permutation(4))


def ask(family: str, digits: tuple[int, ...], rng: np.random.Generator) -> Turn:
    """A question of the family with its one-word answer."""
    if family == "presence":
        present = rng.random() < 0.5
        pool = [d for d in range(10) if (d in digits) == present]
        digit = pool[rng.integers(len(pool))]
        return Turn(f"is there a {WORDS[digit]} ?", "yes" if present else "no")
    if family == "count":
        # Half of the questions are about a digit that is there.
        digit = digits[rng.integers(4)] if rng.random() < 0.5 else int(rng.integers(10))
        return Turn(f"how many times {WORDS[digit]} ?", WORDS[digits.count(digit)])
    if family == "position":
        cell = rng.integers(4)
        return Turn(f"what is at {CELLS[cell]} ?", WORDS[digits[cell]])
    if family == "largest":
        return Turn("what is the largest ?", WORDS[max(digits)])
    if family == "smallest":
        return Turn("what is the smallest ?", WORDS[min(digits)])
    # Pairs are drawn so that both answers are about as frequent.
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    equal = [pair for pair in pairs if digits[pair[0]] == digits[pair[1]]]
    if family == "same" and equal and rng.random() < 0.7:
        pairs = equal
    if family == "compare":
        pairs = [pair for pair in pairs if pair not in equal] or pairs
    a, b = pairs[rng.integers(len(pairs))]
    if family == "compare":
        question = f"is {CELLS[a]} larger than {CELLS[b]} ?"
        return Turn(question, "yes" if digits[a] > digits[b] else "no")
    if family == "same":
        question = f"are {CELLS[a]} and {CELLS[b]} the same ?"
        return Turn(question, "yes" if digits[a] == digits[b] else "no")
    raise choice_error("question family", family, FAMILIES)


@dataclasses.dataclass(frozen=True)
class DigitsSource:
    """An endless-looking random-access source of samples; item i is a function of (seed, i).

    >>> source = DigitsSource("instruct", split="test", questions=2)
    >>> sample = source[0]
    >>> len(sample.turns), sample.images[0].shape
    (2, (32, 32, 3))

    Attributes:
      task: `text` (description, then questions; no image), `patches` (images with the digit and the
        cell of every patch), `caption` (image -> description), `instruct` (image, then questions).
      split: The split of the handwriting that scenes are made of.
      questions: The number of questions per scene, each a branch of its own.
      families: The question families to draw from; empty: those of the task.
      patch_size: The height and width of a patch in pixels, for `patches`.
      seed: Seeds the scenes.
      size: The number of scenes.
    """

    task: str
    split: str = "train"
    questions: int = 6
    families: tuple[str, ...] = ()
    patch_size: int = 8
    seed: int = 0
    size: int = 1_000_000

    def __post_init__(self) -> None:
        if self.task not in ("text", "patches", "caption", "instruct"):
            raise choice_error("digits task", self.task, ("text", "patches", "caption", "instruct"))
        _instances(self.split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample | dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        name = f"digits-{self.task}-{self.seed}-{index}"
        if self.task == "text":
            return self._text(name, random_digits(rng), rng)
        scene = make_scene(rng, self.split, shift=int(self.split == "train"))
        if self.task == "patches":
            classes = self._patch_classes(scene.digits)
            return {"id": name, "pixels": scene.image, "classes": classes}
        if self.task == "caption":
            return Sample(name, (Turn(None, describe(scene.digits, rng)),), (scene.image,))
        turns = self._turns(scene.digits, rng, self.families or FAMILIES)
        return Sample(name, turns, (scene.image,), context=IMAGE_MARK + "\n", independent=True)

    def _turns(
        self, digits: tuple[int, ...], rng: np.random.Generator, families: Sequence[str]
    ) -> tuple[Turn, ...]:
        chosen = rng.permutation(len(families))[: self.questions]
        return tuple(ask(families[int(f)], digits, rng) for f in chosen)

    def _text(self, name: str, digits: tuple[int, ...], rng: np.random.Generator) -> Sample:
        seen = [f for f in FAMILIES if f != UNSEEN]
        asked = self._turns(digits, rng, self.families or seen)
        turns = (Turn(None, describe(digits, rng)), *asked)
        context = describe(digits, rng) + "\n"
        return Sample(name, turns, context=context, independent=True)

    def _patch_classes(self, digits: tuple[int, ...]) -> np.ndarray:
        """The digit and the cell of every patch in raster order, `[P, 2]`."""
        per_cell = CELL // self.patch_size
        cells = np.arange(4).reshape(2, 2).repeat(per_cell, 0).repeat(per_cell, 1).ravel()
        return np.stack([np.asarray(digits)[cells], cells], axis=-1).astype(np.int32)


def vocabulary() -> list[str]:
    """Every word of the world, special tokens first."""
    words = (
        "is there a how many times what at the largest smallest larger than are and same ? yes no"
    )
    return [*SPECIAL, *words.split(), *WORDS, *CELLS]


def build_tokenizer() -> Tokenizer:
    """A word-level tokenizer of the world, of the class that `transformers` would load.

    >>> build_tokenizer().decode([1, 7, 8, 9])
    '<s> how many times'
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
