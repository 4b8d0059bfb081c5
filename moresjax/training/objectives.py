"""What a batch is trained for: `objective(model, batch, key) -> Loss`, all sums, no means.

Axis legend: B rows, S tokens, D hidden size, V vocabulary, P patches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moresjax.core.errors import UserError, choice_error
from moresjax.core.layout import Batch, TokenKind, loss_mask, valid_mask
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import registrar
from moresjax.core.types import AnyArray, pytree_dataclass
from moresjax.models.contrastive import caption_mask
from moresjax.sharding.mesh import constrain_batch_sharding

Objective = Callable[..., "Loss"]

# Summed loss, number of labels, and how many of them are the argmax.
Sums = tuple[Array, Array, Array]

OBJECTIVES: dict[str, Objective] = {}

# Tokens of a row whose logits are held at one time.
PIECE = 128


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """A decorator that makes a function available to `config.objective` under a name.

    The function takes `(model, batch, key)` and returns a `Loss`.

    Raises:
      UserError: The name belongs to another objective.
    """
    return registrar(OBJECTIVES, "objective", name)


def get_objective(name: str) -> Objective:
    """The objective of that name, which may be a plug-in's.

    Raises:
      UserError: For an unknown name.
    """
    load_plugins()
    if name not in OBJECTIVES:
        raise choice_error("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


@pytree_dataclass
class Loss:
    """Sums over a batch; the mean over its labels is exact however the batch is split."""

    total: Float[Array, ""]
    weight: Float[Array, ""]  # number of labels, or of pairs that belong together
    correct: Float[Array, ""]  # those of them that are the argmax
    tokens: Float[Array, ""]  # tokens that are not padding, or patches


@register_objective("next_token")
def next_token(model: Any, batch: Batch, key: PRNGKeyArray | None = None) -> Loss:
    """Cross-entropy of the answer tokens given everything before them."""
    hidden = model(batch, key=key).hidden
    mask = loss_mask(batch.layout)
    labels = jnp.roll(jnp.asarray(batch.tokens), -1, axis=1)
    sums = _over_labels(model.llm.logits, hidden, labels, mask)
    return Loss(*sums, valid_mask(batch.layout).sum(dtype=jnp.float32))


@register_objective("patch_classes")
def patch_classes(
    model: Any, batch: Mapping[str, AnyArray], key: PRNGKeyArray | None = None
) -> Loss:
    """Cross-entropy of every label set of every patch (vision pretraining).

    `classes` `[B, P, sets]` has a class for each patch, negative for none; P may be 1 for a label
    of the whole image, which all of its patches are given.

    Raises:
      UserError: There are neither as many labels as patches nor one.
    """
    labels = jnp.asarray(batch["classes"])
    logits = model(jnp.asarray(batch["pixels"]))
    patches = logits[0].shape[1]
    if labels.shape[1] not in (1, patches):
        raise UserError(
            f"an image has {labels.shape[1]} labels, but the vision encoder has {patches} patches"
        )
    labels = jnp.broadcast_to(labels, (len(labels), patches, labels.shape[2]))
    sets = [labels[..., i] for i in range(len(logits))]
    pairs = zip(logits, sets, strict=True)
    sums = [_cross_entropy(x, jnp.maximum(y, 0), y >= 0) for x, y in pairs]
    totals: Any = map(sum, zip(*sums, strict=True))
    total, weight, correct = totals
    return Loss(total, weight, correct, jnp.float32(labels[..., 0].size))


@register_objective("siglip")
def siglip(model: Any, batch: Batch, key: PRNGKeyArray | None = None) -> Loss:
    """SigLIP's loss: every pair of an image and a caption is told to be one of a row, or not.

    The sum over all pairs is divided by the number of rows (Zhai et al. 2023, equation 1). Rows
    with the same caption are no negatives of each other; rows without caption or image count
    nowhere. `Loss.correct` counts images whose own caption, or an equal one, has the highest logit.
    """
    logits = model(batch)
    tokens, kind = jnp.asarray(batch.tokens), jnp.asarray(batch.layout.kind)
    caption = caption_mask(batch)
    rows = caption.any(1) & (kind == TokenKind.IMAGE).any(1)
    words = jnp.where(caption, tokens, -1)
    same = (words[:, None, :] == words[None, :, :]).all(-1)
    own = jnp.eye(len(rows), dtype=bool)
    pairs = rows[:, None] & rows[None, :] & (own | ~same)
    losses = -jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
    best = jnp.where(rows[None, :], logits, -jnp.inf).argmax(1)
    correct = rows & jnp.take_along_axis(same, best[:, None], axis=1)[:, 0]
    counts = (rows, correct, valid_mask(batch.layout))
    return Loss(jnp.where(pairs, losses, 0.0).sum(), *(x.sum(dtype=jnp.float32) for x in counts))


def _over_labels(
    head: Callable,
    hidden: Float[Array, "B S D"],
    labels: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
) -> Sums:
    """`_cross_entropy` of the tokens that have a label.

    In every row they are moved to the front. Logits are made of `PIECE` tokens at a time, again in
    the backward pass, and of a piece that no row has labels in not at all.
    """
    length = mask.shape[1]
    if length <= PIECE:
        return _cross_entropy(head(hidden), labels, mask)
    order, pieces = jnp.argsort(~mask, axis=1, stable=True), -(-length // PIECE)

    def cut(x: Array) -> Array:
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, [(0, 0), (0, pieces * PIECE - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(len(x), pieces, PIECE, *x.shape[2:]), 1, 0)

    def piece(hidden: Array, labels: Array, mask: Array) -> Sums:
        return _cross_entropy(head(constrain_batch_sharding(hidden)), labels, mask)

    def nothing(hidden: Array, labels: Array, mask: Array) -> Sums:
        return jnp.zeros(()), jnp.zeros(()), jnp.zeros(())

    # Around the choice: else every piece keeps what one branch needs, the head's weights too.
    @jax.checkpoint
    def sums_of(part: tuple[Array, Array, Array]) -> Sums:
        return jax.lax.cond(part[2].any(), piece, nothing, *part)

    def add(sums: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, sums_of(part)), None

    zeros = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    return jax.lax.scan(add, zeros, (cut(hidden), cut(labels), cut(mask)))[0]


def _cross_entropy(logits: Array, labels: Array, mask: Array | bool) -> Sums:
    """Summed loss, number of labels, and how many of them are the argmax."""
    mask = jnp.broadcast_to(mask, labels.shape).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1) == labels) * mask
    return (losses * mask).sum(), mask.sum(), correct.sum()
