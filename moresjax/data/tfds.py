"""Any data set of TensorFlow Datasets that has a `data_source` (no TensorFlow is used).

Questions and answers are texts with features in braces: `What is {object}?`, `{captions[text]}`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moresjax.core.errors import UserError
from moresjax.data.samples import IMAGE_MARK, Sample, Turn


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Samples of a prepared data set in a random-access format (ArrayRecord).

    Attributes:
      dataset: The name of the data set, such as `coco_captions` or `mnist:3.0.1`.
      answer: A text with features in braces. A class label is written as its name; of a list one
        element is drawn, by the sample's index.
      question: A text with features in braces.
      split: The name of a split or a slice of one, such as `train` or `train[:10%]`.
      data_dir: The folder where the data set was prepared; empty for the default of TFDS.
      image: The name of the feature with the image; empty for text alone.
      seed: Seeds the draws from lists.
    """

    dataset: str
    answer: str
    question: str = "Describe the image."
    split: str = "train"
    data_dir: str = ""
    image: str = "image"
    seed: int = 0
    branches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        features = self._features
        if self.image and self.image not in features:
            raise UserError(
                f"data set {self.dataset} has no feature {self.image!r}; it has "
                f"{', '.join(features)}"
            )
        if self.split.split("[")[0] not in self._builder.info.splits:
            raise UserError(
                f"data set {self.dataset} has no split {self.split!r}; it has "
                f"{', '.join(self._builder.info.splits)}"
            )
        if len(self):
            _ = self[0]  # a feature that is not there is noticed before anything starts

    @property
    def _features(self) -> Mapping[str, Any]:
        return self._builder.info.features

    @functools.cached_property
    def _builder(self) -> Any:  # the library's types do not say what its objects have
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.registered import DatasetNotFoundError

        try:
            return tfds.builder(self.dataset, data_dir=self.data_dir or None)
        except (DatasetNotFoundError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"data set {self.dataset!r} is not to be found: {reason}") from None

    @functools.cached_property
    def _reader(self) -> Any:
        try:
            return self._builder.as_data_source(split=self.split)
        except (NotImplementedError, OSError, ValueError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"data set {self.dataset!r} cannot be read as a data_source: {reason}"
            ) from None

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Sample:
        name = f"{self.dataset}/{self.split}/{index}"
        try:
            features = self._reader[index]
        except Exception as error:  # a damaged shard or image: the library raises many kinds
            raise UserError(f"sample {name} cannot be read: {error}") from None
        rng = np.random.default_rng((self.seed, index))
        described = {
            key: _readable(value, self._features[key], rng)
            for key, value in features.items()
            if key != self.image
        }
        try:
            question, answer = (text.format(**described) for text in (self.question, self.answer))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"sample {name}: question or answer names a feature that is not there: {error}; "
                f"there are {', '.join(described)}"
            ) from None
        if not self.image:
            return Sample(name, (Turn(question, answer),))
        image = np.asarray(features[self.image])
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        return Sample(name, (Turn(f"{IMAGE_MARK}\n{question}", answer),), (image,))


def _readable(value: Any, feature: Any, rng: np.random.Generator) -> Any:
    """The value of a feature in a form that a text can show."""
    if isinstance(value, Mapping):
        # The texts of one element belong together, so all lists of a group are drawn from alike.
        inner, state = getattr(feature, "feature", feature), rng.bit_generator.state
        shown = {}
        for key, member in value.items():
            rng.bit_generator.state = state
            shown[key] = _readable(member, inner[key], rng)
        return shown
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | np.ndarray) and np.ndim(value):
        if not len(value):
            return ""
        return _readable(value[rng.integers(len(value))], getattr(feature, "feature", feature), rng)
    if hasattr(feature, "int2str"):
        return feature.int2str(int(np.asarray(value)))
    return value
