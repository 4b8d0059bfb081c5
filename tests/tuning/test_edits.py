"""Every edit against its definition in numpy, where it starts, what trains, and what it costs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moresjax.core.layout import TokenKind
from moresjax.generation.engine import Engine
from moresjax.models.initialize import initialize
from moresjax.models.layers import Linear
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionConfig
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import TINY_VISION, tiny_config
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.low_rank import orthonormalize
from moresjax.tuning.spec import parse_spec

BATCH = tiny_batch()
SEGMENT = np.asarray(BATCH.layout.kind)
LOW_RANK = ("mores", "loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
# Edits of every kind at once, one program to compile. (Other ranks are MoReS's to test.)
EVERYTHING = "/".join(
    f"{name}:layers={{0}},positions=prompt|answer,rank=1"
    for name in ("noreft", "direft", "consreft", "lobireft")
)
EVERYTHING += "/red:layers={0}/houlsby:bottleneck=2,layers={0}/adapter:bottleneck=3,layers={0}"


def set_params(tuning: Tuning) -> Tuning:
    """Random parameters, drawn in numpy: nothing to compile, and no start value hides a mistake."""
    rng = np.random.default_rng(1)
    for variable in jax.tree.leaves(
        nnx.state(tuning.params, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        variable.set_value(jnp.asarray(0.3 * rng.standard_normal(variable.shape), jnp.float32))
    return tuning


def tuning_of(spec: str) -> Tuning:
    return set_params(Tuning(spec, tiny_config()))


def model_of(spec: str, **llm) -> MLLM:
    model = MLLM(tiny_config(**llm), spec)
    set_params(model.tuning)
    return initialize(model)


def hidden(dim: int = 16) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((*SEGMENT.shape, dim)).astype(np.float32)


def edited(tuning: Tuning, site: str, h, layer: int = 0, key=None) -> np.ndarray:
    """`h` after the edits at a site of a block."""
    place, name = site.split(".block.")

    def edit(h, key):
        tower = tuning.hooks(BATCH, key=key).tower(place)
        params = jax.tree.map(lambda x: x[layer], tower.stacked)
        return tower.layer(params, layer).edit(name, h)

    return np.asarray(jax.jit(edit)(jnp.asarray(h), key))


def values(tuning: Tuning, key: str, site: str, layer: int = 0) -> dict[str, np.ndarray]:
    """One layer's parameters in double precision."""
    params = tuning.params[key][site]
    return {name: np.asarray(x[...], np.float64)[layer] for name, x in params.items()}


def rotation(raw: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(raw)
    return q * np.sign(np.diagonal(r))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


# Each takes parameters and one token's features at a time, `[n, D]`.
DEFINITIONS = {
    "mores": lambda t, h: (
        h + (h @ t["weight"].T + t["bias"] - h @ (R := rotation(t["rotate"]))) @ R.T
    ),
    "loreft": lambda t, h: (
        h + (h @ t["weight"].T + t["bias"] - h @ (R := rotation(t["rotate"]))) @ R.T
    ),
    "noreft": lambda t, h: h + (h @ t["weight"].T + t["bias"] - h @ t["rotate"]) @ t["rotate"].T,
    "direft": lambda t, h: h + (h @ t["weight"].T + t["bias"]) @ rotation(t["rotate"]).T,
    "nodireft": lambda t, h: h + (h @ t["weight"].T + t["bias"]) @ t["rotate"].T,
    "consreft": lambda t, h: h + (t["bias"] - h @ (R := rotation(t["rotate"]))) @ R.T,
    "lobireft": lambda t, h: h + t["bias"] @ rotation(t["rotate"]).T,
    "red": lambda t, h: t["scale"] * h + t["bias"],
    "houlsby": lambda t, h: h + gelu(h @ t["down"] + t["down_bias"]) @ t["up"] + t["up_bias"],
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_an_edit_is_its_definition_at_the_selected_tokens_and_nothing_elsewhere(name):
    rank = "rank=3," if name in LOW_RANK else ""
    tuning = tuning_of(f"{name}:{rank}positions=prompt:f3+l2|answer:f1")
    selected = np.zeros_like(SEGMENT, bool)
    selected[:, [0, 1, 2, 12, 13, 14]] = True  # the prompt has 2 + 9 + 3 tokens
    h = hidden()
    for site in tuning.params[name]:
        after = edited(tuning, site, h, layer=1)
        # Only the selected rows are gathered and edited.
        expected = DEFINITIONS[name](values(tuning, name, site, layer=1), h[selected])
        np.testing.assert_allclose(after[selected], expected, atol=1e-5)
        np.testing.assert_array_equal(after[~selected], h[~selected])
        assert np.abs(after[selected] - h[selected]).max() > 1e-2


def test_houlsby_sits_after_attention_and_after_the_mlp():
    tuning = tuning_of("houlsby")
    assert set(tuning.params["houlsby"]) == {"llm.block.attn.out", "llm.block.mlp.out"}
    first, second = (edited(tuning, site, hidden()) for site in tuning.params["houlsby"])
    assert np.abs(first - second).max() > 1e-2


@pytest.mark.parametrize("side", ["before", "after"])
def test_an_adapter_is_its_definition_beside_the_linear(side):
    (method,) = parse_spec("adapter:bottleneck=5")
    shape = (16, 24, False) if side == "before" else (24, 16, True)
    linear = Linear(*shape[:2], axes=(None, None), bias=True)
    rng = np.random.default_rng(0)
    for leaf in ("kernel", "bias"):
        variable = getattr(linear, leaf)
        variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), jnp.float32))
    params = method.initial(jax.random.key(0), *shape)
    assert {x.shape for x in params.values()} == {(16, 5), (5, 16)}
    params = {name: x * 20 for name, x in params.items()}
    x = jnp.asarray(rng.standard_normal((2, 4, shape[0])), jnp.float32)
    down, up = (np.asarray(params[f"{side}_{end}"], np.float64) for end in ("in", "out"))
    w, b = np.asarray(linear.kernel[...], np.float64), np.asarray(linear.bias[...])

    def adapted(y):
        return y + np.tanh(y @ down) @ up

    y = np.asarray(x, np.float64)
    expected = adapted(y) @ w + b if side == "before" else adapted(y @ w + b)
    np.testing.assert_allclose(method.apply(params, linear, x), expected, atol=2e-5)
    # A switched-off layer is the plain linear; dropout needs a key.
    np.testing.assert_array_equal(method.apply(method.neutral(params), linear, x), linear(x))
    dropped = method.apply(params, linear, x, jax.random.key(1))
    assert np.abs(np.asarray(dropped) - expected).max() > 1e-3


def test_adapters_sit_where_the_hidden_size_is():
    gated = tuning_of("adapter").params["adapter"]
    assert {s.split(".")[-1]: set(x) for s, x in gated.items()} == {
        "gate": {"before_in", "before_out"},
        "up": {"before_in", "before_out"},
        "down": {"after_in", "after_out"},
    }
    plain = Tuning("adapter", tiny_config(gated_mlp=False)).params["adapter"]
    assert set(plain) == {"llm.block.up", "llm.block.down"}


# ---- Starts.


@pytest.mark.parametrize(
    "spec",
    [
        *(f"{name}:init=identity" for name in LOW_RANK if name != "consreft"),
        "red",
        "houlsby",
        "steer",
    ],
)
def test_starts_that_are_the_identity(spec):
    (method,) = parse_spec(spec)
    delta = method.delta(
        method.prepare(method.initial(jax.random.key(0), 16)), jnp.asarray(hidden())
    )
    np.testing.assert_allclose(delta, np.zeros_like(hidden()), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "share"),
    [  # mean square of the change of features with mean square 1, in units of r / D
        ("mores", 4 / 3),
        ("loreft", 4 / 3),
        ("noreft", 2 / 9),
        ("direft", 1 / 3),
        ("nodireft", 1 / 9),
        ("consreft", 4 / 3),
        ("lobireft", 1 / 3),
        ("adapter", None),
    ],
)
def test_starts_that_are_not_the_identity_deviate_as_stated(name, share):
    dim, rank = 512, 32
    h = jax.random.normal(jax.random.key(3), (1, 256, dim))
    if name == "adapter":  # small features, where tanh is linear: 0.02^4 * bottleneck * D
        h = 0.1 * h
        (method,) = parse_spec("adapter:bottleneck=32")
        linear = Linear(dim, dim, axes=(None, None))
        linear.kernel.set_value(jnp.eye(dim))
        delta = method.apply(method.initial(jax.random.key(0), dim, dim, True), linear, h) - h
        expected = 0.02**4 * 32 * dim
    else:
        (method,) = parse_spec(f"{name}:rank={rank}")
        delta = method.delta(method.prepare(method.initial(jax.random.key(0), dim)), h)
        expected = share * rank / dim
    found = float(jnp.square(delta).mean() / jnp.square(h).mean())
    assert found == pytest.approx(expected, rel=0.25)


# ---- Training.


def gradients(model) -> dict:
    graphdef, trainable, frozen = split_model(model)

    def loss(trainable):
        return next_token(nnx.merge(graphdef, trainable, frozen), BATCH).total

    return jax.jit(jax.grad(loss))(trainable)["tuning"]["params"]


def test_every_parameter_of_every_edit_learns_and_remat_changes_nothing():
    spec = EVERYTHING.format("all")
    plain, remat = (gradients(model_of(spec, remat=remat)) for remat in (False, True))
    assert len(plain) == 7
    for method, by_site in plain.items():
        for site, params in by_site.items():
            for leaf, variable in params.items():
                gradient = np.asarray(variable[...])
                largest = np.abs(gradient).max(axis=tuple(range(1, gradient.ndim)))
                assert (largest > 1e-7).all(), (method, site, leaf)
                other = np.asarray(remat[method][site][leaf][...])
                np.testing.assert_allclose(other, gradient, rtol=1e-3, atol=1e-5)


def test_one_program_serves_every_choice_of_layers_of_every_edit():
    traced, results = [], []

    def run(graphdef, state, batch):
        traced.append(1)
        return nnx.merge(graphdef, state)(batch).hidden

    jitted = jax.jit(run, static_argnums=0)
    for layers in ("all", "0", "1-", "every:2"):
        results.append(jitted(*nnx.split(model_of(EVERYTHING.format(layers))), BATCH))
    assert len(traced) == 1
    for i, a in enumerate(results):
        assert all(np.abs(np.asarray(a - b)).max() > 1e-3 for b in results[:i])


@pytest.mark.parametrize("name", ["mores", "consreft", "direft"])
def test_rotations_stay_orthonormal_for_a_hundred_steps_and_a_reload(name, tmp_path):
    (method,) = parse_spec(f"{name}:rank=3")
    optimizer = optax.adamw(3e-2)
    h, target = jax.random.normal(jax.random.key(0), (2, 1, 8, 16))

    def loss(params):
        return jnp.square(h + method.delta(method.prepare(params), h) - target).mean()

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=100)[0]

    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: method.initial(jax.random.key(0), 16))
    start = {n: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for n, x in shapes.items()}
    end, state = train(start, optimizer.init(start))
    np.savez(tmp_path / "params.npz", **end)
    loaded = {name: jnp.asarray(x) for name, x in np.load(tmp_path / "params.npz").items()}
    resumed, _ = train(loaded, state)
    assert loss(end) < 0.8 * loss(start)
    used = [
        np.asarray(method.prepare(params)["up"], np.float64) for params in (end, loaded, resumed)
    ]
    np.testing.assert_array_equal(used[0], used[1])
    assert np.abs(used[2] - used[0]).max() > 1e-3
    for r in used:
        np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-6)


def test_orthonormalisation_of_rows_split_over_devices_is_the_same():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("d"))
    raw = jax.random.normal(jax.random.key(0), (128, 4))
    split = jax.jit(orthonormalize, in_shardings=rows, out_shardings=rows)(
        jax.device_put(raw, rows)
    )
    assert len(split.sharding.device_set) == 8
    np.testing.assert_allclose(split, orthonormalize(raw), atol=1e-6)
    np.testing.assert_allclose(np.asarray(split).T @ np.asarray(split), np.eye(4), atol=1e-6)


# ---- MoReS as the authors' code computes it.


def test_parity_runs_the_linear_in_half_precision():
    spec = "mores:positions=all"
    ours = edited(tuning_of(spec), "llm.block.out", hidden())
    theirs = edited(tuning_of(spec + ",parity=llava-steering"), "llm.block.out", hidden())
    t, h = values(tuning_of(spec), "mores", "llm.block.out"), hidden()
    half = [x.astype(np.float16) for x in (h, t["weight"], t["bias"])]
    # Exact products of the rounded numbers, rounded once: as close as half precision defines it.
    linear = half[0].astype(np.float64) @ half[1].astype(np.float64).T + half[2]
    r = rotation(t["rotate"])
    low = linear.astype(np.float16) - (h @ r).astype(np.float16)
    expected = np.where(SEGMENT[..., None] > 0, h + low.astype(np.float64) @ r.T, h)
    np.testing.assert_allclose(theirs, expected, atol=1e-2)
    difference = np.abs(theirs - ours).max()
    assert 1e-5 < difference < 1e-2


def test_parity_drops_the_steered_state_and_the_paper_the_delta():
    h, key = hidden() + 5, jax.random.key(0)
    steered = tuning_of("mores:positions=all,dropout=0.5,parity=llava-steering")
    alive = SEGMENT > 0
    dropped = edited(steered, "llm.block.out", h, key=key)[alive]
    whole = edited(steered, "llm.block.out", h)[alive]
    gone = np.abs(dropped) < 1e-4
    assert 0.4 < gone.mean() < 0.6
    np.testing.assert_allclose(dropped[~gone], 2 * whole[~gone], rtol=1e-4, atol=1e-4)
    delta = tuning_of("mores:positions=all,dropout=0.5")
    dropped = edited(delta, "llm.block.out", h, key=key)[alive] - h[alive]
    whole = edited(delta, "llm.block.out", h)[alive] - h[alive]
    gone = np.abs(dropped) < 1e-6
    assert 0.4 < gone.mean() < 0.6
    np.testing.assert_allclose(dropped[~gone], 2 * whole[~gone], rtol=1e-4, atol=1e-4)


# ---- Given vectors.


def test_a_given_vector_is_added_as_it_is_and_never_trains(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    np.savez(tmp_path / "v.npz", calm=vectors[0], wild=vectors[1])
    spec = f"steer:vector={tmp_path}/v.npz:wild,alpha=-2.5,layers=1,positions=answer"
    tuning = tuning_of(spec)
    after, answer = edited(tuning, "llm.block.out", hidden(), 1), SEGMENT == TokenKind.ANSWER
    np.testing.assert_allclose(after[answer], hidden()[answer] - 2.5 * vectors[1], atol=1e-6)
    np.testing.assert_array_equal(after[~answer], hidden()[~answer])
    np.testing.assert_array_equal(edited(tuning, "llm.block.out", hidden(), 0), hidden())

    _, trainable, frozen = split_model(model_of(spec), ("connector",))
    assert set(trainable) == {"connector"}
    kept = frozen["tuning"]["params"]["steer"]["llm.block.out"]["vector"]
    np.testing.assert_array_equal(kept[...], np.broadcast_to(vectors[1], (3, 16)))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("a.npz:other", r"'other'; choose from: calm, wild"),
        ("a.npz", r"''; choose from: calm, wild"),
        ("a.npz:calm", r"must be 16 finite numbers, got shape \(15,\)"),
        ("a.npz:wild", r"must be 16 finite numbers"),
        ("b.npz", r"not a readable FILE.npz"),
    ],
)
def test_vectors_that_cannot_be_used_are_refused(tmp_path, choice, message):
    np.savez(tmp_path / "a.npz", calm=np.ones(15), wild=np.full(16, np.nan))
    (tmp_path / "b.npz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=message):
        Tuning(f"steer:vector={tmp_path}/{choice}", tiny_config())


def test_one_program_serves_every_strength_and_vector():
    graphdefs = set()
    for alpha in (1, -3):
        graphdefs.add(nnx.split(model_of(f"steer:alpha={alpha},layers={abs(alpha) - 1}"))[0])
    assert len(graphdefs) == 1


def test_steering_what_is_generated_leaves_the_prompt_alone():
    batch, tokens = tiny_batch(answer=0), []
    for alpha in (0, 1):  # one program for both
        model = model_of(f"steer:positions=generated,alpha={alpha}")
        vector = model.tuning.params["steer"]["llm.block.out"]["vector"]
        vector.set_value(jnp.full((3, 16), 3.0) * jnp.arange(16))
        tokens.append(np.asarray(Engine(model, eos_ids=(99,)).generate(batch, 5).tokens))
    # The first new token is what the prompt predicts.
    np.testing.assert_array_equal(tokens[0][:, 0], tokens[1][:, 0])
    assert (tokens[0][:, 1:] != tokens[1][:, 1:]).any()


# ---- MRT.


def test_the_editors_of_mrt_act_on_their_own_tokens():
    tuning = tuning_of("mrt:length=1")
    changed = np.abs(edited(tuning, "llm.block.out", hidden()) - hidden()).max(-1) > 1e-4
    expected = np.zeros_like(changed)
    expected[:, [11, 13]] = True  # first and last of the question's three tokens
    np.testing.assert_array_equal(changed, expected)
    code = tuning_of("mrt-code:visual_layers=all")
    changed = np.abs(edited(code, "llm.block.out", hidden()) - hidden()).max(-1) > 1e-4
    # Seven tokens of question and answer, six in the shorter row, without the first two and the
    # last: half of them each.
    expected = np.zeros_like(changed)
    expected[0, 13:17] = expected[1, [13, 15]] = True
    np.testing.assert_array_equal(changed, expected)


def test_visual_editors_act_on_the_class_token_too():
    config = dataclasses.replace(
        tiny_config(), vision=VisionConfig(**(TINY_VISION | {"num_layers": 4, "class_token": True}))
    )
    tuning = Tuning("mrt-code", config)
    np.testing.assert_array_equal(
        tuning.layer_masks["loreft"]["vision.block.out"][...], [False, True, True]
    )
    set_params(tuning)
    h = np.random.default_rng(0).standard_normal((2, 10, 8)).astype(np.float32)
    for layer, acts in enumerate((False, True, True)):
        after = edited(tuning, "vision.block.out", h, layer)
        np.testing.assert_array_equal(np.abs(after - h).max(-1) > 1e-3, acts)


def test_prompt_edits_leave_the_decode_program_alone():
    edits = "mrt-paper/mores2/loreft/noreft/direft/nodireft/consreft/lobireft/"
    edits += "red:positions=image/houlsby:positions=question/steer:positions=prompt"
    bare, edited = (
        Engine(model_of(spec), eos_ids=(2,)).lower_decode(tiny_batch(answer=0), 4).as_text()
        for spec in ("none", edits)
    )
    assert edited == bare
