"""One pass over prompts that reads and writes activations at named sites.

Axis legend: L layers, B rows, S tokens, D features, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.capture import OutputProbe, check_site, site_layers
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.types import Numbers
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.sharding.mesh import use_mesh
from moresjax.tuning.base import Params
from moresjax.tuning.hooks import AttachedWrite
from moresjax.tuning.sites import num_layers

Write = Numbers | Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Activations:
    """What a pass over prompts gives.

    Attributes:
      logits: Next-token logits of every token, in fp32.
      tokens: The tokens; rows are padded on the right, and what stands under a visual token means
        nothing.
      lengths: The number of tokens of each row.
      states: The activations at the sites that were read: `[L, B, S, D]` inside the LLM's blocks,
        `[B, S, D]` outside; with a row for each image at `vision.block.out`, and the features of
        all images of a row at `connector.out`.
    """

    logits: Float[np.ndarray, "B S V"]
    tokens: Int[np.ndarray, "B S"]
    lengths: Int[np.ndarray, " B"]
    states: dict[str, Float[np.ndarray, "..."]]


# What is written at a site: a function, or the name of an array that the program is given.
Job = tuple[str, int, Callable[[Array], Array] | None]


def run_batch(
    mllm: MLLM,
    batch: Batch,
    read: Sequence[str],
    edits: Mapping[Any, Write],
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Float[Array, "B S V"], dict[str, Float[Array, "..."]]]:
    """Logits and activations of a batch; see `Model.run`.

    Raises:
      UserError: The model has no such site or layer, or an array has another shape.
    """
    for site in read:
        check_site(site, mllm.config)
    jobs, arrays = [], []
    for place, write in edits.items():
        site, layer = (place, -1) if isinstance(place, str) else place
        site_layers(site, None if layer < 0 else layer, mllm.config)
        jobs.append((site, layer, write if callable(write) else None))
        arrays.append(None if callable(write) else jnp.asarray(write, jnp.float32))
    graphdef, state = nnx.split(mllm)
    with use_mesh(mesh):
        return _run(graphdef, tuple(read), tuple(jobs), state, batch, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    graphdef: nnx.GraphDef,
    read: tuple[str, ...],
    jobs: tuple[Job, ...],
    state: nnx.State,
    batch: Batch,
    arrays: list[Array | None],
) -> tuple[Float[Array, "B S V"], dict[str, Float[Array, "..."]]]:
    model = nnx.merge(graphdef, state)
    probes = tuple(OutputProbe(site) for site in read)
    extra = model.tuning.num_extra_tokens
    writes = [
        (job[0], _write(job, array, model.config, extra))
        for job, array in zip(jobs, arrays, strict=True)
    ]
    out = model(batch, probes=probes, writes=writes)
    found = {}
    for probe in probes:
        h = out.stats[probe.name]
        h = h if num_layers(probe.site, model.config) else h[0]
        found[probe.site] = h[..., extra:, :] if probe.site.startswith("llm.") else h
    return model.llm.logits(out.hidden), found


def _fits(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether an array of a shape can be broadcast to activations."""
    pairs = zip(shape[::-1], own[::-1], strict=False)
    return len(shape) <= len(own) and all(a in (1, b) for a, b in pairs)


def _write(job: Job, array: Array | None, config: MLLMConfig, extra: int) -> AttachedWrite:
    """What is written at a site in one layer, or in all of them."""
    site, layer, function = job
    first = extra if site.startswith("llm.") else 0  # virtual tokens stay what they are
    layers = num_layers(site, config)
    chosen = jnp.arange(layers) == layer if layers and layer >= 0 else jnp.ones(layers or (), bool)

    def write(params: Params, h: Array) -> Array:
        own = h[:, first:]
        if function is not None:
            new = jnp.asarray(function(own))
        else:
            assert array is not None  # else there is a function
            if not _fits(array.shape, own.shape):
                raise UserError(
                    f"an array at {site} has shape {array.shape}, the activations {own.shape}"
                )
            new = jnp.where(jnp.isnan(array), own, array)
        if new.shape != own.shape:
            raise UserError(
                f"an edit at {site} gives shape {new.shape}, the activations have {own.shape}"
            )
        new = jnp.where(params["on"], new, own).astype(h.dtype)
        return jnp.concatenate([h[:, :first], new], axis=1)

    return AttachedWrite(write, {"on": chosen})
