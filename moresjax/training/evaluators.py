"""What is measured now and then while a run goes on: validation, and attention to the image.

Axis legend: B rows, S tokens, Q queries, L layers.

Evaluators have fixed data of their own. They read the parameters and change nothing, so a run with
evaluators trains to the same weights as one without.
"""

import functools
from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moresjax.analysis.attention import AttentionProbe, summarize
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, RowStructure, TokenKind, TokenLayout, loss_mask
from moresjax.data.pipeline import one_epoch, structure_for, to_device_batch
from moresjax.data.processor import Processor
from moresjax.data.sources import Source
from moresjax.runs.run_config import RunConfig
from moresjax.sharding.mesh import batch_sharding, batch_shards, replicated, use_mesh
from moresjax.training.objectives import get_objective

# Samples whose attention is read, at least.
PROBED = 32
# Rows of attention kernels are a multiple of this.
ALIGNED = 128

Measure = Callable[[nnx.GraphDef, nnx.State, nnx.State], dict[str, float]]


class Evaluators:
    """The evaluators of a configuration.

    Args:
      config: The run's configuration.
      processor: The processor of its model.
      mesh: The devices that the model is on.
      training: The training samples, on which attention is measured where none are held out.
      held_out: Samples that never train, if there are any.

    Raises:
      UserError: when there is nothing to measure on.
    """

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        mesh: Mesh,
        training: Source,
        held_out: Source | None,
    ) -> None:
        self._last = config.steps
        self._measures: list[tuple[int, Measure]] = []
        dataset_of = functools.partial(
            one_epoch,
            processor=processor,
            max_seq_len=config.max_seq_len,
            images_per_row=config.images_per_row,
            seed=config.seed,
            num_workers=config.num_workers,
            on_bad_sample=config.on_bad_sample,
        )
        if (every := config.validation.every) and held_out is not None:
            rows, most = config.batch_size // config.microbatches, config.validation.batches
            dataset = dataset_of(held_out, batch_size=rows, max_batches=most)
            structure = structure_for(held_out, "pad")
            self._measures.append((every, Validation(config, processor, mesh, dataset, structure)))
        if every := config.lmar_every:
            # A device holds one row at a time, which has room for a token of padding.
            rows = batch_shards(mesh)
            length = (config.max_seq_len // ALIGNED + 1) * ALIGNED
            most = -(-PROBED // rows)
            source = held_out or training
            dataset = dataset_of(source, batch_size=rows, max_batches=most, row_length=length)
            self._measures.append((every, ImageAttention(processor, mesh, dataset)))

    def due(self, step: int) -> bool:
        """Whether anything is to be measured after this step."""
        return any(self._is_due(every, step) for every, _ in self._measures)

    def _is_due(self, every: int, step: int) -> bool:
        return step % every == 0 or step == self._last

    def measure(
        self, step: int, graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State
    ) -> dict[str, float]:
        """What is due after this step, by name."""
        found = {}
        for every, measure in self._measures:
            if self._is_due(every, step):
                found |= measure(graphdef, trainable, frozen)
        return found


class Validation:
    """Loss and accuracy without dropout: means over all labels of the validation samples."""

    def __init__(
        self,
        config: RunConfig,
        processor: Processor,
        mesh: Mesh,
        dataset: grain.IterDataset,
        structure: RowStructure,
    ) -> None:
        objective = get_objective(config.objective)

        def loss(
            graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State, batch: Batch
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            with use_mesh(mesh):
                found = objective(nnx.merge(graphdef, trainable, frozen), batch)
            return found.total, found.correct, found.weight

        self._loss = jax.jit(loss, static_argnums=0)
        self._dataset, self._processor, self._structure = dataset, processor, structure
        self._rows = batch_sharding(mesh)

    def __call__(
        self, graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State
    ) -> dict[str, float]:
        """Means over all samples."""
        sums = np.zeros(3)
        for stacked in self._dataset:
            stacked.pop("id")
            batch = to_device_batch(stacked, self._processor, self._rows, self._structure)
            sums += [float(x) for x in self._loss(graphdef, trainable, frozen, batch)]
        loss, accuracy = sums[:2] / max(sums[2], 1.0)
        return {"validation_loss": float(loss), "validation_accuracy": float(accuracy)}


class ImageAttention:
    """LMAR per layer, the ratio of means over `PROBED` fixed samples (`moresjax.analysis`).

    The queries are those that gave the answers' tokens, with the answers of the data.

    Raises:
      UserError: when no sample has an image.
    """

    def __init__(self, processor: Processor, mesh: Mesh, dataset: grain.IterDataset) -> None:
        rows, whole = batch_sharding(mesh), replicated(mesh)
        self._batches: list[Batch] = []
        for stacked in dataset:
            stacked.pop("id")
            batch = to_device_batch(stacked, processor, rows)
            if isinstance(batch, Batch):  # always: a vision encoder alone has no attention to read
                self._batches.append(batch)

        def counts(layout: TokenLayout) -> tuple[jax.Array, jax.Array]:
            images = (jnp.asarray(layout.kind) == TokenKind.IMAGE).any(axis=1)
            return loss_mask(layout).sum(axis=1), images

        count = jax.jit(counts, out_shardings=whole)
        found = [jax.tree.map(np.asarray, count(batch.layout)) for batch in self._batches]
        self._tokens, self._has_image = map(np.concatenate, zip(*found, strict=True))
        if not (self._has_image & (self._tokens > 0)).any():
            raise UserError(
                f"lmar_every: none of {len(self._tokens)} samples has an image and an answer"
            )
        most, probe = int(self._tokens.max()), AttentionProbe()

        def read(
            graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State, batch: Batch
        ) -> tuple[jax.Array, jax.Array]:
            labels = loss_mask(batch.layout)
            # The last token is padding, whose attention is none: rows with fewer labels ask for it.
            fill = labels.shape[1] - 1
            places = lambda row: jnp.nonzero(row, size=most, fill_value=fill)[0]  # noqa: E731
            queries = jax.vmap(places)(labels)
            with use_mesh(mesh):
                model = nnx.merge(graphdef, trainable, frozen)
                stats = model(batch, probes=(probe,), queries=queries).stats[probe.name]
            return stats["mass"], stats["score"]

        self._read = jax.jit(read, static_argnums=0, out_shardings=whole)

    def __call__(
        self, graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State
    ) -> dict[str, float]:
        """LMAR, averaged over layers and of every layer."""
        stats = [self._read(graphdef, trainable, frozen, batch) for batch in self._batches]
        mass, score = (
            np.concatenate([np.asarray(x) for x in xs], axis=1) for xs in zip(*stats, strict=True)
        )
        lmar = summarize(mass, score, self._tokens, self._has_image).lmar_of_means["text"]
        layers = {f"lmar/{layer:02d}": float(x) for layer, x in enumerate(lmar)}
        return {"lmar": float(lmar.mean()), **layers}
