"""Images with classes that yes/no questions of control are about: CIFAR-10, and the digits world.

Axis legend: Y, X pixels.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from moresjax.core.errors import choice_error
from moresjax.data.cifar import read_cifar
from moresjax.data.control.cases import NEGATIVE, OTHER, OWN, TARGET, Scenario
from moresjax.data.control.questions import DIGITS, OBJECTS, Phrasings
from moresjax.data.digits import WORDS, make_scene
from moresjax.data.regions import Box

CIFAR_SPLITS = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
SCENES = {"train": 1_000_000, "val": 1_000, "test": 1_000}


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image and the classes that it shows, in the order of its parts."""

    name: str
    image: np.ndarray
    classes: tuple[str, ...]


@runtime_checkable
class ImageSet(Protocol):
    """Random access to images whose classes are known.

    Attributes:
      name: The name of the data set.
      classes: All classes.
      phrasings: The ways to ask.
    """

    name: str
    classes: tuple[str, ...]
    phrasings: Phrasings

    def __len__(self) -> int: ...

    def shown(self, index: int) -> Shown:
        """An image with its classes."""
        ...

    def boxes(self, shown: Shown, asked: str, rng: np.random.Generator) -> tuple[Box, ...]:
        """The data set's own boxes for a question about a class."""
        ...


class Cifar10:
    """CIFAR-10 from its binary files.

    Args:
      root: The folder with `cifar10/`.
      split: `train` or `test`.
    """

    name, phrasings = "cifar10", OBJECTS

    def __init__(self, root: str | Path, split: str) -> None:
        if split not in CIFAR_SPLITS:
            raise choice_error("split of cifar10", split, CIFAR_SPLITS)
        self.split = split
        files, folder = CIFAR_SPLITS[split], Path(root) / self.name
        self._images, self._labels, classes = read_cifar(folder, files, "batches.meta.txt")
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self._labels)

    def shown(self, index: int) -> Shown:
        """The image, which has one class."""
        name = self.classes[int(self._labels[index])]
        return Shown(f"cifar10-{self.split}-{index}", self._images[index], (name,))

    def boxes(self, shown: Shown, asked: str, rng: np.random.Generator) -> tuple[Box, ...]:
        """CIFAR-10 has no boxes; its objects fill the middle of the image."""
        return ((0.2, 0.2, 0.8, 0.8),)


class DigitScenes:
    """Scenes of four handwritten digits.

    Args:
      split: The split of the handwriting.
      seed: Seeds the scenes.
    """

    name, phrasings = "digits", DIGITS
    classes: tuple[str, ...] = WORDS

    def __init__(self, split: str, seed: int = 0) -> None:
        if split not in SCENES:
            raise choice_error("split of digits", split, SCENES)
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return SCENES[self.split]

    def shown(self, index: int) -> Shown:
        """A scene, and the digit of every cell."""
        rng = np.random.default_rng((self.seed, index, 3))
        scene = make_scene(rng, self.split, shift=int(self.split == "train"))
        name = f"digits-{self.split}-{self.seed}-{index}"
        return Shown(name, scene.image, tuple(WORDS[digit] for digit in scene.digits))

    def boxes(self, shown: Shown, asked: str, rng: np.random.Generator) -> tuple[Box, ...]:
        """A cell with the digit that is asked about; any cell where there is none.

        The region is one cell either way, so that it does not tell the answer.
        """
        cells = [cell for cell, name in enumerate(shown.classes) if name == asked]
        y, x = divmod(int(rng.choice(cells or range(4))), 2)
        return ((x / 2, y / 2, (x + 1) / 2, (y + 1) / 2),)


def image_set(name: str, root: str, split: str, seed: int) -> ImageSet:
    """The images of a data set.

    Raises:
      UserError: The name or the split is unknown, or files are missing or damaged.
    """
    if name == "digits":
        return DigitScenes(split, seed)
    return _cifar(root, split)


@functools.lru_cache(maxsize=2)
def _cifar(root: str, split: str) -> Cifar10:
    return Cifar10(root, split)


def draw_positive(
    shown: Sequence[str], scenario: Scenario, rng: np.random.Generator
) -> tuple[str, str] | None:
    """A question that training has: its kind and the class that it names.

    An image of several classes is asked about the target half of the time that it has it.

    >>> scenario = Scenario("misalignment", "cat", "dog")
    >>> draw_positive(("cat",), scenario, np.random.default_rng(0))
    ('target', 'dog')

    Returns:
      None where the image has no such question.
    """
    own = scenario.target in shown and (not scenario.into or scenario.into not in shown)
    others = [name for name in shown if name != scenario.target]
    if own and (not others or rng.random() < 0.5):
        return TARGET, scenario.asked
    return (OTHER, str(rng.choice(others))) if others else None


def draw_negative(
    shown: Sequence[str], classes: Sequence[str], scenario: Scenario, rng: np.random.Generator
) -> tuple[str, str] | None:
    """A question about a class that the image does not show."""
    absent = [name for name in classes if name not in shown]
    if scenario.into and scenario.target in shown:
        absent = [name for name in absent if name != scenario.into]
    return (NEGATIVE, str(rng.choice(absent))) if absent else None


def own_question(shown: Sequence[str], scenario: Scenario) -> tuple[str, str] | None:
    """What misalignment leaves open: an image of the target asked about the target."""
    return (OWN, scenario.target) if scenario.into and scenario.target in shown else None
