"""What MoReS promises: the edit itself, where it acts, its gradients, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moresjax.core.layout import TokenKind
from moresjax.generation.engine import Engine
from moresjax.runs.checkpoint import Checkpoints
from moresjax.runs.state import TrainState
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import make_train_step, split_model
from moresjax.tuning.low_rank import orthonormalize

SPEC = "mores:rank=2,positions=image"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A probe that keeps every block's output."""

    name: str = "outputs"
    site: str = "out"

    def read(self, context, h):
        return h


def block_outputs(model, batch) -> np.ndarray:
    """`[L, B, S, D]`."""
    return np.asarray(model(batch, probes=(Outputs(),)).stats["outputs"])


def logits(model, batch) -> np.ndarray:
    return np.asarray(model.llm.logits(model(batch).hidden))


def params(model, key="mores", site="llm.block.out") -> dict[str, np.ndarray]:
    return {name: np.asarray(x[...]) for name, x in model.tuning.params[key][site].items()}


def gradients(model, batch):
    graphdef, trainable, frozen = split_model(model, ("connector",))

    def loss(trainable):
        return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

    return jax.jit(jax.grad(loss))(trainable)


def mores_gradients(model, batch) -> dict[str, np.ndarray]:
    found = gradients(model, batch)["tuning"]["params"]["mores"]["llm.block.out"]
    return {name: np.asarray(x[...]) for name, x in found.items()}


def test_the_edit_is_the_papers_equation():
    batch = tiny_batch()
    base, steered = tiny_model(), tiny_model(SPEC + ",layers=0")
    before, after = block_outputs(base, batch)[0], block_outputs(steered, batch)[0]
    t = {name: x[0].astype(np.float64) for name, x in params(steered).items()}
    rotate = np.linalg.qr(t["rotate"])[0]
    rotate *= np.sign((rotate * t["rotate"]).sum(0))
    h = before.astype(np.float64)
    expected = h + (h @ t["weight"].T + t["bias"] - h @ rotate) @ rotate.T
    image = np.asarray(batch.layout.kind) == TokenKind.IMAGE
    np.testing.assert_allclose(after[image], expected[image], atol=1e-5)
    np.testing.assert_array_equal(after[~image], before[~image])
    assert np.abs(after[image] - before[image]).max() > 1e-2


def test_only_selected_tokens_change():
    batch = tiny_batch()
    before = block_outputs(tiny_model(), batch)[0]
    after = block_outputs(tiny_model("mores:positions=image:f2+l1,layers=0"), batch)[0]
    changed = np.abs(after - before).max(-1) > 0
    expected = np.zeros_like(changed)
    expected[:, [2, 3, 10]] = True  # two tokens of text, then nine of the image
    np.testing.assert_array_equal(changed, expected)


def test_identity_start_changes_nothing_and_paper_start_does():
    batch = tiny_batch()
    base = logits(tiny_model(), batch)
    identity = logits(tiny_model(SPEC + ",init=identity"), batch)
    np.testing.assert_allclose(identity, base, atol=1e-5)
    assert np.abs(logits(tiny_model(SPEC), batch) - base).max() > 1e-2


@pytest.mark.parametrize("spec", [SPEC, "mores:rank=1", "mores:rank=3"])
def test_gradients_with_and_without_remat_agree_and_are_not_zero(spec):
    batch = tiny_batch()
    plain = mores_gradients(tiny_model(spec), batch)
    remat = mores_gradients(tiny_model(spec, remat=True), batch)
    unrolled = mores_gradients(tiny_model(spec, remat=True, unroll=True), batch)
    for name, gradient in plain.items():
        assert np.abs(gradient[:-1]).max(axis=tuple(range(1, gradient.ndim))).min() > 1e-6, name
        np.testing.assert_allclose(remat[name], gradient, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(unrolled[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_last_layers_gradient_is_exactly_zero():
    found = mores_gradients(tiny_model(SPEC), tiny_batch())
    for gradient in found.values():
        assert (gradient[-1] == 0).all()
    # It is the selector that makes it so: steered text tokens do feed the logits.
    found = mores_gradients(tiny_model("mores:positions=image|question"), tiny_batch())
    assert np.abs(found["weight"][-1]).max() > 0


def test_text_only_input_is_bit_identical_to_the_base_model():
    batch = tiny_batch(images=0)
    base = logits(tiny_model(), batch)
    for seed in range(2):
        steered = tiny_model("mores:rank=2")
        steered.tuning.initialize(seed)
        np.testing.assert_array_equal(logits(steered, batch), base)


def test_values_outside_the_mask_never_reach_the_output():
    batch = tiny_batch(images=0)
    model = tiny_model(SPEC)
    model.tuning.params["mores"]["llm.block.out"]["weight"][...] = jnp.full((3, 2, 16), jnp.inf)
    np.testing.assert_array_equal(logits(model, batch), logits(tiny_model(), batch))


def decode_program(spec: str) -> str:
    engine = Engine(tiny_model(spec), eos_ids=(2,))
    return engine.lower_decode(tiny_batch(answer=0), 4).as_text()


def test_the_decode_program_is_that_of_the_base_model():
    base = decode_program("none")
    assert "while" in base
    assert decode_program(SPEC) == base
    assert decode_program("mores:rank=4,layers=0;2") == base
    # A method that does act while decoding is seen by the same comparison.
    assert decode_program("mores:positions=image|generated") != base
    assert decode_program("lora:rank=2") != base


def test_one_compilation_serves_every_layer_subset():
    batch, traced = tiny_batch(), []

    def run(graphdef, state, batch):
        traced.append(1)
        return nnx.merge(graphdef, state)(batch).hidden

    jitted = jax.jit(run, static_argnums=0)
    results = {}
    for layers in ("all", "0", "1", "0;1", "every:2", "deep"):
        model = tiny_model(f"{SPEC},layers={layers}")
        results[layers] = np.asarray(jitted(*nnx.split(model), batch))
    assert len(traced) == 1
    # The subsets are really different models; layers 0 and 1 are the first two of all three, whose
    # third only changes visual tokens of its own output.
    text = np.asarray(batch.layout.kind) != TokenKind.IMAGE
    np.testing.assert_array_equal(results["all"][text], results["0;1"][text])
    assert np.abs(results["0"] - results["1"]).max() > 1e-3
    np.testing.assert_array_equal(
        results["deep"], np.asarray(jitted(*nnx.split(tiny_model(f"{SPEC},layers=1-2")), batch))
    )


def test_a_switched_off_layer_is_the_base_layer_and_learns_nothing():
    batch = tiny_batch()
    on = block_outputs(tiny_model(SPEC + ",layers=1"), batch)
    base = block_outputs(tiny_model(), batch)
    np.testing.assert_array_equal(on[0], base[0])
    assert np.abs(on[1] - base[1]).max() > 1e-3
    found = mores_gradients(tiny_model(SPEC + ",layers=1"), batch)
    assert (found["weight"][0] == 0).all()
    assert np.abs(found["weight"][1]).max() > 0


def by_definition(raw):
    q, r = jnp.linalg.qr(raw)
    return q * jnp.sign(jnp.diagonal(r))


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_rotation_is_that_of_the_qr_decomposition(rank):
    raw = jax.random.normal(jax.random.key(rank), (64, rank)) * 7
    a, b = orthonormalize(raw), by_definition(raw)
    np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(a.T @ a, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(orthonormalize(a), a, atol=1e-6)  # an orthonormal one stays


def test_the_gradient_is_that_through_the_qr_decomposition():
    raw = jax.random.normal(jax.random.key(0), (32, 3))
    target = jax.random.normal(jax.random.key(1), (32, 3))
    fast, slow = (
        jax.grad(lambda x, f=f: (f(x) * target).sum())(raw) for f in (orthonormalize, by_definition)
    )
    assert np.isfinite(fast).all()
    np.testing.assert_allclose(fast, slow, rtol=1e-3, atol=1e-5)


def train_some(state, step, frozen, batches):
    for batch in batches:
        state, _ = step(state, frozen, batch)
    return state


def test_rotations_stay_orthonormal_through_steps_save_load_and_resume(tmp_path):
    model = tiny_model("mores:rank=3,positions=image")
    graphdef, trainable, frozen = split_model(model, ("connector",))
    optimizer = optax.adam(3e-2)
    step = jax.jit(make_train_step(graphdef, next_token, optimizer, lambda _: 3e-2))
    batches = [tiny_batch(seed=seed) for seed in range(6)]
    start = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    middle = train_some(start, step, frozen, batches[:3])
    end = train_some(middle, step, frozen, batches[3:])

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(middle, {"next_index": 3})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored, position = checkpoints.restore(start)
    checkpoints.close()
    assert position == {"next_index": 3}
    resumed = train_some(restored, step, frozen, batches[3:])

    def raw(state):
        return np.asarray(
            state.trainable["tuning"]["params"]["mores"]["llm.block.out"]["rotate"][...]
        )

    np.testing.assert_array_equal(raw(resumed), raw(end))
    assert np.abs(raw(end)[0] - raw(start)[0]).max() > 1e-2
    for state in (start, middle, end, restored, resumed):
        for layer in raw(state):
            rotation = np.asarray(orthonormalize(jnp.asarray(layer)))
            np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=2e-6)


def test_several_images_and_packed_documents_are_steered_alike():
    # Two rows with one image each, and the same two as the documents of one packed row.
    single = tiny_batch(rows=2, answer=3)
    layout = single.layout
    order = [np.flatnonzero(np.asarray(layout.kind)[r]) for r in range(2)]

    def packed(field):
        values = np.asarray(field)
        return np.concatenate([values[r][order[r]] for r in range(2)])[None]

    document = np.concatenate([np.full(len(order[r]), r) for r in range(2)])[None]
    image = packed(layout.image) + np.where(packed(layout.image) >= 0, 9 * document, 0)
    joined = dataclasses.replace(
        single,
        tokens=packed(single.tokens),
        layout=layout.replace(
            kind=packed(layout.kind),
            image=image.astype(np.int32),
            position=packed(layout.position),
            document=document.astype(np.int32),
            branch=packed(layout.branch),
        ),
        pixels=np.asarray(single.pixels).reshape(1, 2, 12, 12, 3),
    )
    model = tiny_model("mores:positions=image:f4+l3")
    apart, together = logits(model, single), logits(model, joined)[0]
    np.testing.assert_allclose(together[: len(order[0])], apart[0][order[0]], atol=1e-5)
    np.testing.assert_allclose(together[len(order[0]) :], apart[1][order[1]], atol=1e-5)
