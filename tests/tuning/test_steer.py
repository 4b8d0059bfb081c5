"""Steering: its modes, gates and norms against numpy, and the values that a model is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moresjax.core.errors import UserError
from moresjax.testing.models import talking_model, tiny_config
from moresjax.tuning.attach import Tuning
from moresjax.tuning.methods.steer import Steer
from moresjax.tuning.multi_adapter import stack_adapters
from moresjax.tuning.spec import parse_spec

D = 16
RNG = np.random.default_rng(0)
H = RNG.standard_normal((2, 5, D)).astype(np.float32)
VECTOR, CONDITION = RNG.standard_normal((2, D)).astype(np.float32)
UNIT = VECTOR / np.linalg.norm(VECTOR)
ALONG = (H @ UNIT)[..., None] * UNIT
FORMULAS = {
    "add": lambda alpha: H + alpha * VECTOR,
    "project": lambda alpha: H - alpha * ALONG,
    "clamp": lambda alpha: H - ALONG + alpha * VECTOR,
}


def steered(h=H, **fields) -> np.ndarray:
    given = {name: fields.pop(name) for name in ("vector", "alpha", "condition") if name in fields}
    method = Steer(**fields)
    params = method.initial(jax.random.key(0), D)
    params |= {name: jnp.asarray(value) for name, value in given.items()}
    return np.asarray(jnp.asarray(h) + method.delta(params, jnp.asarray(h)))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("mode", sorted(FORMULAS))
def test_modes_are_their_formulas(mode, alpha):
    expected = FORMULAS[mode](alpha)
    found = steered(mode=mode, vector=VECTOR, alpha=alpha)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if mode == "project":
        np.testing.assert_allclose(found @ UNIT, (1 - alpha) * (H @ UNIT), atol=1e-5)
    if mode == "clamp":
        np.testing.assert_allclose(found @ UNIT, alpha * np.linalg.norm(VECTOR), atol=1e-5)
    kept = steered(mode=mode, vector=VECTOR, alpha=alpha, keep_norm=True)
    norms = np.linalg.norm(H, axis=-1) / np.linalg.norm(expected, axis=-1)
    np.testing.assert_allclose(kept, expected * norms[..., None], atol=1e-5)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_strength_zero_and_vectors_of_zeros_change_no_bit(keep_norm):
    for mode in ("add", "project"):
        found = steered(mode=mode, vector=VECTOR, alpha=0.0, keep_norm=keep_norm)
        np.testing.assert_array_equal(found, H)
    for mode in FORMULAS:
        np.testing.assert_array_equal(steered(mode=mode, keep_norm=keep_norm), H)


def test_gates_choose_tokens_by_a_dot_product():
    threshold = 0.3
    for given, direction in (({"condition": CONDITION}, CONDITION), ({}, VECTOR)):
        above = H @ direction / np.linalg.norm(direction) > threshold
        assert 0 < above.sum() < above.size
        for gate, chosen in (("above", above), ("below", ~above)):
            found = steered(gate=gate, threshold=threshold, vector=VECTOR, alpha=2.0, **given)
            np.testing.assert_allclose(found[chosen], H[chosen] + 2 * VECTOR, atol=1e-5)
            np.testing.assert_array_equal(found[~chosen], H[~chosen])


def test_half_precision_states_are_projected_in_full_precision():
    h = jnp.asarray(H, jnp.bfloat16)
    method = Steer(mode="project")
    delta = method.delta({"vector": jnp.asarray(VECTOR), "alpha": jnp.ones(())}, h)
    assert delta.dtype == jnp.float32
    whole = np.asarray(h, np.float32)
    np.testing.assert_allclose(delta, -(whole @ UNIT)[..., None] * UNIT, atol=1e-5)


def test_rows_of_a_batch_have_their_own_vectors_and_conditions():
    spec = "steer:mode=project,gate=above,threshold=0.1"
    tunings = {}
    for name, vector in (("a", VECTOR), ("b", CONDITION)):
        tunings[name] = Tuning(spec, tiny_config())
        tunings[name].set_constants("steer", {"vector": vector, "condition": -vector})
    stacked = stack_adapters(tunings)
    params = {n: x[...] for n, x in stacked.params["steer"]["llm.block.out"].items()}
    assert params["condition"].shape == (3, 3, D)
    np.testing.assert_array_equal(params["condition"][1, 1], -CONDITION)
    np.testing.assert_allclose(params["threshold"][0, :2], 0.1, atol=1e-7)


def test_what_a_gate_is_given_comes_from_files_and_is_set_while_a_model_answers(tmp_path):
    np.savez(tmp_path / "v.npz", up=VECTOR, only=CONDITION)
    spec = (
        f"steer:vector={tmp_path}/v.npz:up,gate=above,condition={tmp_path}/v.npz:only,"
        "threshold=1e9,positions=all,alpha=900"
    )
    model, prompt = talking_model(spec), "how many ?"
    assert parse_spec(model.tuning)[0] == Steer(gate="above", positions="all")
    base = np.asarray(talking_model("none").logits(prompt)[0])
    np.testing.assert_array_equal(np.asarray(model.logits(prompt)[0]), base)
    model.set(threshold=-1e9)
    assert np.abs(np.asarray(model.logits(prompt)[0]) - base).max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("steer:mode=replace", "'replace'; choose from: add, project, clamp"),
        ("steer:gate=cosine", "'cosine'; choose from: none, above, below"),
        ("steer:threshold=1", "condition and threshold are those of gate=above"),
        ("steer:gate=above,condition=nowhere.npz", "nowhere.npz' is not a readable"),
    ],
)
def test_what_no_steering_is_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        Tuning(spec, tiny_config())
