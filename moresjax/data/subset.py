"""Part of a source: training samples, and those that are held out to validate on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from moresjax.core.errors import UserError
from moresjax.data.samples import Sample
from moresjax.data.sources import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some samples of a source, in its order.

    Attributes:
      source: All samples.
      indices: The numbers of the chosen ones, rising.
    """

    source: Source
    indices: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample | Mapping[str, Any]:
        return self.source[int(self.indices[index])]

    @property
    def sizes(self) -> Int[np.ndarray, "n 2"]:
        """The words and images of every sample; an attribute only where the source has it."""
        return getattr(self.source, "sizes")[self.indices]  # noqa: B009 (an optional attribute)

    @property
    def turn_counts(self) -> Int[np.ndarray, "n k"]:
        """The turns of every sample; an attribute only where the source has it."""
        return getattr(self.source, "turn_counts")[self.indices]  # noqa: B009 (an optional attribute)

    @property
    def branches(self) -> bool:
        """Whether a sample may have independent turns."""
        return getattr(self.source, "branches", True)

    @property
    def filler(self) -> Mapping[str, Any] | None:
        """What stands for a skipped ready-made row."""
        return getattr(self.source, "filler", None)

    @property
    def mixture_weights(self) -> tuple[tuple[slice, float], ...]:
        """The source's index ranges and their weights, in numbers of the subset."""

        def inside(indices: slice) -> slice:
            start, stop = np.searchsorted(self.indices, [indices.start, indices.stop])
            return slice(int(start), int(stop))

        weights = getattr(self.source, "mixture_weights", ())
        return tuple((inside(indices), weight) for indices, weight in weights)


def train_val_split(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a source at random into training samples and a share that is held out.

    >>> from moresjax.data.sources import make_source
    >>> source = make_source("digits", task="text", size=100)
    >>> [len(part) for part in train_val_split(source, share=0.1, seed=0)]
    [90, 10]

    Args:
      source: All samples.
      share: The fraction of the samples that is held out.
      seed: Seeds the choice; with the same number of samples and share it is the same split.

    Returns:
      The training samples and the validation samples.

    Raises:
      UserError: Nothing is held out, or nothing is left of (a file of) the training samples.
    """
    total = len(source)
    count = round(share * total)
    held = np.zeros(total, bool)
    held[np.random.default_rng((seed, total)).permutation(total)[:count]] = True
    training, validation = (Subset(source, np.flatnonzero(x)) for x in (~held, held))
    ranges = [slice(0, len(training)), *(indices for indices, _ in training.mixture_weights)]
    if not count or any(indices.start == indices.stop for indices in ranges):
        raise UserError(
            f"validation.share {share} of {total} samples is {count}: samples must be left to "
            "validate on, and of every file to train on"
        )
    return training, validation
