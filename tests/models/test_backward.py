"""What a training step keeps between its forward and its backward pass, and what that changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moresjax.models.attention import attention, attention_probabilities
from moresjax.models.block import MLP, BlockConfig
from moresjax.models.initialize import initialize
from moresjax.training.objectives import PIECE, _over_labels
from moresjax.tuning.hooks import LayerHooks, TowerHooks

ROWS, HEADS, LENGTH, SIZE = 2, 4, 6, 8


def plain(q, k, v, mask, softcap=0.0):
    """Attention written out, differentiated step by step."""
    k, v = (jnp.repeat(x, HEADS // x.shape[1], axis=1) for x in (k, v))
    logits = jnp.einsum("bnth,bnsh->bnts", q, k) * SIZE**-0.5
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bnsh->bnth", weights, v)


def inputs(kv_heads=HEADS):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = lambda heads: (ROWS, heads, LENGTH, SIZE)  # noqa: E731
    q, k, v = (jax.random.normal(keys[i], shape(n)) for i, n in enumerate((HEADS, *[kv_heads] * 2)))
    return q, k, v, jax.random.normal(keys[3], shape(HEADS))


def kept(f, *arguments) -> list[tuple[int, ...]]:
    """Shapes of the arrays between the passes."""
    return [x.shape for x in jax.tree.leaves(jax.vjp(f, *arguments)[1]) if jnp.ndim(x)]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_has_the_gradients_of_its_definition(softcap, kv_heads, masked):
    *qkv, weights = inputs(kv_heads)
    mask = None
    if masked:
        mask = jnp.tril(jnp.ones((ROWS, LENGTH, LENGTH), bool)).at[0, 4:, :3].set(False)
        mask = mask.at[1, 2].set(False)  # a query that sees nothing

    def total(which):
        return lambda *qkv: (which(*qkv, mask, softcap) * weights).sum()

    value, found = jax.value_and_grad(total(attention), (0, 1, 2))(*qkv)
    expected, gradients = jax.value_and_grad(total(plain), (0, 1, 2))(*qkv)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_of_attention_the_probabilities_alone_are_kept():
    q, k, *_ = inputs()
    mask = jnp.tril(jnp.ones((ROWS, LENGTH, LENGTH), bool))
    shapes = kept(lambda q, k: attention_probabilities(q, k, mask), q, k)
    assert shapes.count((ROWS, HEADS, LENGTH, LENGTH)) == 1


@pytest.mark.parametrize("gated", [True, False])
def test_of_an_mlp_the_inputs_of_its_activation_alone_are_kept(gated):
    shape = {"hidden_size": 4, "intermediate_size": 12, "num_layers": 1, "num_heads": 1}
    mlp = initialize(MLP(BlockConfig(gated_mlp=gated, **shape)))
    hooks = LayerHooks(TowerHooks(), [], 0)
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, 4))
    # Differentiated by the input only: no product needs what comes out of the activation.
    assert kept(lambda x: mlp(x, hooks), x).count((ROWS, LENGTH, 12)) == 1 + gated


def test_no_piece_of_the_logits_keeps_the_heads_weights():
    length, features, vocabulary = 3 * PIECE, 4, 10
    hidden = jax.random.normal(jax.random.key(2), (ROWS, length, features))
    kernel = jax.random.normal(jax.random.key(3), (features, vocabulary))
    labels = jnp.arange(ROWS * length).reshape(ROWS, length) % vocabulary
    mask = jnp.arange(length) < jnp.array([[5], [PIECE + 1]])

    def loss(hidden, kernel):
        return _over_labels(lambda h: h @ kernel, hidden, labels, mask)[0]

    def whole(hidden, kernel):
        chances = jax.nn.log_softmax(hidden @ kernel)
        return -(jnp.take_along_axis(chances, labels[..., None], 2)[..., 0] * mask).sum()

    shapes = kept(loss, hidden, kernel)
    assert not [shape for shape in shapes if shape[-2:] == kernel.shape and len(shape) > 2]
    found = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    expected = jax.value_and_grad(whole, (0, 1))(hidden, kernel)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
