"""The loss of a run on chosen samples, as a function of what trains alone.

Axis legend: M batches, B rows of a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moresjax.core.layout import Batch, RowStructure
from moresjax.core.types import pytree_dataclass
from moresjax.data.pipeline import one_epoch, structure_for, to_device_batch
from moresjax.data.processor import Processor
from moresjax.data.sources import Source
from moresjax.models.vision import image_batch
from moresjax.runs.run_config import RunConfig
from moresjax.sharding.mesh import BATCH_AXES, batch_sharding, batch_shards, use_mesh


@pytree_dataclass
class LossData:
    """What a loss is of.

    Attributes:
      frozen: The parameters that do not train.
      batches: All batches, with a leading axis M.
      features: What the vision encoder makes of their images, `[M, ...]`, or None: then it runs.
      weight: The number of labels in all batches.
    """

    frozen: nnx.State
    batches: Batch
    features: Array | None
    weight: Float[Array, ""]

    @property
    def parts(self) -> "Iterator[LossData]":
        """Each batch alone, whose losses add up to that of all.

        They do without kernels of attention, which have no second derivatives.
        """
        for number in range(self.batches.tokens.shape[0]):
            one = slice(number, number + 1)
            batches, features = jax.tree.map(lambda x: x[one], (self.batches, self.features))  # noqa: B023
            batches = dataclasses.replace(batches, structure=RowStructure.ANY)
            yield dataclasses.replace(self, batches=batches, features=features)


@dataclasses.dataclass(frozen=True)
class RunLoss:
    """`(trainable, data) -> loss`: the mean over all labels, without dropout.

    Losses of runs of one architecture and method are equal, so that they share programs.

    Attributes:
      graphdef: Definition of the model.
      objective: What it is trained for.
      mesh: The devices.
    """

    graphdef: nnx.GraphDef
    objective: Callable[..., Any]
    mesh: Mesh

    def __call__(self, trainable: nnx.State, data: LossData) -> Array:
        """The mean loss; of one of the data's parts its share of that."""
        total, _ = self.sums(trainable, data)
        return total / jnp.maximum(data.weight, 1.0)

    def sums(self, trainable: nnx.State, data: LossData) -> tuple[Array, Array]:
        """The summed loss and the number of labels."""

        def of_batch(one: tuple[Batch, Array | None]) -> tuple[Array, Array]:
            batch, features = one
            with use_mesh(self.mesh):
                model: Any = nnx.merge(self.graphdef, trainable, data.frozen)
                if features is not None:
                    model.vision = _KnownFeatures(features)
                loss = self.objective(model, batch)
            return loss.total, loss.weight

        total, weight = jax.lax.map(of_batch, (data.batches, data.features))
        return total.sum(), weight.sum()

    def data(self, trainable: nnx.State, frozen: nnx.State, batches: Batch) -> LossData:
        """What the loss is of; the images are read now where nothing before the connector trains.

        Args:
          trainable: The parameters that train.
          frozen: The others.
          batches: All batches, with a leading axis M.
        """
        data = LossData(frozen, batches, None, jnp.zeros(()))
        pixels = batches.pixels
        if pixels is not None and pixels.shape[2] and not trains_vision(trainable):
            place = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))
            read = jax.jit(self._read_images, out_shardings=place)
            features = read(trainable, data)
            empty = jnp.zeros((*pixels.shape[:3], 0, 0, 3), jnp.float32)
            batches = dataclasses.replace(batches, pixels=jax.device_put(empty, place))
            data = LossData(frozen, batches, features, jnp.zeros(()))
        weight = jax.jit(lambda *of: self.sums(*of)[1])(trainable, data)
        return dataclasses.replace(data, weight=weight)

    def _read_images(self, trainable: nnx.State, data: LossData) -> Array:
        """The features of all images `[M, ...]`."""

        def of_batch(batch: Batch) -> Array:
            with use_mesh(self.mesh):
                model: Any = nnx.merge(self.graphdef, trainable, data.frozen)
                hooks = model.tuning.hooks(batch).tower("vision")
                return model.vision(image_batch(jnp.asarray(batch.pixels)), hooks)

        return jax.lax.map(of_batch, data.batches)


class _KnownFeatures(nnx.Module):
    """A vision encoder that has seen its images."""

    def __init__(self, features: Array) -> None:
        self.features = nnx.Variable(features)

    def __call__(self, images: Array, hooks: Any) -> Array:
        return self.features[...]


def trains_vision(trainable: nnx.State) -> bool:
    """Whether anything before the connector trains."""
    paths = [path for path, _ in nnx.to_flat_state(trainable)]
    inside = [str(path[3]) for path in paths if path[0] == "tuning"]
    return any(p[0] == "vision" for p in paths) or any(s.startswith("vision.") for s in inside)


def all_batches(
    source: Source,
    processor: Processor,
    config: RunConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    max_seq_len: int,
    images_per_row: int,
) -> Batch:
    """All samples of a source in batches with a leading axis M.

    Args:
      source: The samples.
      processor: The processor of the model.
      config: The configuration of its run.
      mesh: The devices, over which rows are split.
      batch_size: B, rounded up to what the devices share.
      max_seq_len: Tokens per row.
      images_per_row: Images per row.
    """
    shards = batch_shards(mesh)
    dataset = one_epoch(
        source,
        processor,
        batch_size=-(-min(batch_size, len(source)) // shards) * shards,
        max_seq_len=max_seq_len,
        images_per_row=images_per_row,
        num_workers=config.num_workers,
        on_bad_sample=config.on_bad_sample,
    )
    structure, found = structure_for(source, "pad"), []
    for stacked in dataset:
        stacked.pop("id")
        found.append(to_device_batch(stacked, processor, batch_sharding(mesh), structure))
    place = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    stack = lambda *batches: jax.tree.map(lambda *x: jnp.stack(x), *batches)  # noqa: E731
    return jax.jit(stack, out_shardings=place)(*found)
