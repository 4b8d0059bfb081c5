"""What a batch is trained for: `objective(model, batch, key) -> Loss`, all sums, no means.

Axis legend: B rows, S tokens, V vocabulary, P patches.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from moresjax.layout import loss_mask, valid_mask
from moresjax.types import pytree_dataclass


@pytree_dataclass
class Loss:
    """Sums over a batch; the mean over its labels is exact however the batch is split."""

    total: Float[Array, ""]
    weight: Float[Array, ""]  # number of labels
    correct: Float[Array, ""]  # labels that are the argmax
    tokens: Float[Array, ""]  # tokens that are not padding, or patches


def next_token(model, batch, key=None) -> Loss:
    """Cross-entropy of the answer tokens given everything before them."""
    hidden = model(batch, key=key).hidden
    mask = loss_mask(batch.layout)
    labels = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)
    sums = _cross_entropy(model.llm.logits(hidden), labels, mask)
    return Loss(*sums, valid_mask(batch.layout).sum(dtype=jnp.float32))


def patch_classes(model, batch, key=None) -> Loss:
    """Cross-entropy of every label set of every patch (vision pretraining)."""
    labels = jnp.asarray(batch["classes"])
    logits = model(jnp.asarray(batch["pixels"]))
    sums = [_cross_entropy(x, labels[..., i], True) for i, x in enumerate(logits)]
    return Loss(*map(sum, zip(*sums, strict=True)), jnp.float32(labels[..., 0].size))


def _cross_entropy(logits, labels, mask) -> tuple[Array, Array, Array]:
    """Summed loss, number of labels, and how many of them are the argmax."""
    mask = jnp.broadcast_to(mask, labels.shape).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1) == labels) * mask
    return (losses * mask).sum(), mask.sum(), correct.sum()


OBJECTIVES: dict[str, Callable] = {"next_token": next_token, "patch_classes": patch_classes}
