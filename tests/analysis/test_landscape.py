"""Loss landscapes: exact on quadratics, directions as long as filters, scales that mean nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.landscape import (
    curvature,
    draw_directions,
    flatness,
    is_scale_invariant,
    join_chunks,
    losses_on_plane,
    make_axis,
)
from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(9, 4)).astype(np.float32), RNG.normal(size=(9, 3)).astype(np.float32)
W, D1, D2 = (jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32) for _ in range(3))
AXIS = make_axis(5, 0.5)


def squares(w, data):
    x, y = data
    return jnp.square(x @ w["w"] - y).mean()


def grid(d1, d2, chunk=7, known=None):
    found = losses_on_plane(
        squares, {"w": W}, (X, Y), ({"w": d1}, {"w": d2}), AXIS, chunk=chunk, known=known
    )
    return join_chunks(dict(found), len(AXIS))


def test_a_linear_model_gives_the_exact_quadratic():
    residual, moved = X @ W - Y, [np.asarray(X @ d, np.float64) for d in (D1, D2)]
    hessian = np.array([[2 * (a * b).mean() for a in moved] for b in moved])
    slope = np.array([2 * (residual * a).mean() for a in moved])
    places = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1)
    bowl = np.einsum("...i,ij,...j->...", places, hessian, places) / 2
    wanted = (np.asarray(residual) ** 2).mean() + places @ slope + bowl
    np.testing.assert_allclose(grid(D1, D2), wanted, rtol=2e-6)
    bent = curvature(squares, {"w": W}, (X, Y), ({"w": D1}, {"w": D2}))
    np.testing.assert_allclose(bent, hessian, rtol=1e-5)


def test_directions_that_change_places_transpose_the_surface():
    np.testing.assert_allclose(grid(D2, D1), grid(D1, D2).T, rtol=1e-6)


def test_chunks_that_are_known_are_not_computed_again():
    whole = grid(D1, D2)
    known = {7: [float(n) for n in range(7)], 14: [0.0]}  # the second is no whole chunk
    wanted = whole.ravel().copy()
    wanted[7:14] = np.arange(7)
    np.testing.assert_array_equal(grid(D1, D2, known=known).ravel(), wanted)
    np.testing.assert_allclose(grid(D1, D2, chunk=25), whole, rtol=1e-6)


# For each leaf of a name: the axis of its filters, from the end.
FILTERS = {"kernel": -2, "rotate": -2, "weight": -1, "embedding": -1, "table": -1}
FILTERS |= {"router_a": -2, "router_b": -2, "before_in": -2, "after_out": -2}
CASES = {
    "mores:rank=2,layers=1": {},
    "m2pt:visual_length=2,length=2": {},
    "mixlora": {"a": -1, "b": -1},
    "lora:rank=2": {"a": -2, "b": -2},
    "prefix:length=2": {"k": -1, "v": -1},
    "full": {},
}


@pytest.mark.parametrize("spec", CASES)
def test_every_filter_is_as_long_as_that_of_the_parameters(spec):
    model = tiny_model(spec)
    trainable = split_model(model, ("connector",))[1]
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)  # no zeros: B of LoRA starts with them
    axes = FILTERS | CASES[spec]
    values = named_parameters(trainable)
    drawn = [named_parameters(d) for d in draw_directions(trainable, 0, 0, tuning=model.tuning)]
    assert any((drawn[0][name][...] != drawn[1][name][...]).any() for name in values)
    for name, x in values.items():
        d, leaf = np.asarray(drawn[0][name][...]), name.rpartition(".")[2]
        if leaf not in axes:
            assert not d.any(), name
            continue
        length = functools.partial(np.linalg.norm, axis=axes[leaf])
        wanted = np.asarray(length(np.asarray(x[...])))
        if "layers=1" in spec and name.startswith("tuning."):
            assert not d[0].any()
            assert not d[2].any()
            d, wanted = d[1], wanted[1]
        np.testing.assert_allclose(length(d), wanted, rtol=1e-5, err_msg=name)


def test_layers_and_raw_draws_and_other_models():
    mores, lora = tiny_model("mores:rank=2"), tiny_model("lora:rank=2")
    trainable = split_model(mores, ("connector",))[1]
    draw = lambda how: draw_directions(trainable, 3, 1, normalize=how, tuning=mores.tuning)  # noqa: E731
    values, layer, raw = map(named_parameters, (trainable, draw("layer")[0], draw("none")[0]))
    for name in (n for n in values if n.endswith(("kernel", "rotate", "weight"))):
        x, d = (np.asarray(of[name][...]) for of in (values, layer))
        flat = lambda y: y.reshape(-1, *y.shape[-2:])  # noqa: E731
        lengths = [np.linalg.norm(flat(y), axis=(1, 2)) for y in (x, d)]
        np.testing.assert_allclose(*lengths, rtol=1e-5, err_msg=name)
    kernel = "connector.layers.1.kernel"
    assert np.std(raw[kernel][...]) == pytest.approx(1, abs=0.15)
    # The connector moves in the same directions whatever the method is.
    other = split_model(lora, ("connector",))[1]
    drawn = draw_directions(other, 3, 1, normalize="none", tuning=lora.tuning)[0]
    np.testing.assert_array_equal(raw[kernel][...], named_parameters(drawn)[kernel][...])
    assert is_scale_invariant(mores.tuning)
    assert not is_scale_invariant(lora.tuning)


def test_the_length_of_a_column_of_r_changes_nothing():
    model, batch = tiny_model("mores:rank=2,positions=image"), tiny_batch()
    graphdef, trainable, frozen = split_model(model)
    rotate = named_parameters(trainable)["tuning.params.mores.llm.block.out.rotate"]

    def loss(trainable, batch):
        found = next_token(nnx.merge(graphdef, trainable, frozen), batch)
        return found.total / found.weight

    def surface():
        drawn = draw_directions(trainable, 0, 0, tuning=model.tuning)
        found = dict(losses_on_plane(loss, trainable, batch, drawn, make_axis(3, 1.0), chunk=9))
        return join_chunks(found, 3)

    before = surface()
    rotate.set_value(rotate[...] * jnp.array([3.0, 0.2]))
    np.testing.assert_allclose(surface(), before, rtol=1e-5)
    assert np.ptp(before) > 1e-3


def test_numbers_of_a_surface():
    axis = make_axis(9, 1.0)
    losses = 0.1 + axis[:, None] ** 2 + 0 * axis[None]
    losses[0, 0], losses[-1, -1] = np.nan, np.inf
    found = flatness(losses, axis)
    # a = 0 and +-.25 are at most .1 + .1 (27 of 81 points), no others at most .2
    assert found["share_twice"] == found["share_above"] == pytest.approx(27 / 81)
    assert found["maximum_near"] == pytest.approx(0.1 + 0.25**2)
    assert found["not_finite"] == 2
    assert flatness(np.ones((3, 3)), make_axis(3, 1.0))["maximum_near"] is None
    losses[4, 5] = np.nan
    assert flatness(losses, axis)["maximum_near"] is None


def test_bad_input_is_told():
    for points in (1, 4):
        with pytest.raises(UserError, match="points must be an odd number from 3"):
            make_axis(points, 1.0)
    with pytest.raises(UserError, match="range of a landscape must be positive"):
        make_axis(3, 0.0)
    model = tiny_model("ia3")
    trainable = split_model(model)[1]
    with pytest.raises(UserError, match=r"normalize.*choose from: filter, layer, none"):
        draw_directions(trainable, 0, 0, normalize="filters", tuning=model.tuning)
    with pytest.raises(UserError, match="nothing trains but biases, scales and other vectors"):
        draw_directions(trainable, 0, 0, tuning=model.tuning)
