"""The train step and its optimizer: what trains, by how much, and at what cost."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.runs.checkpoint import named
from moresjax.runs.run_config import OptimizerConfig
from moresjax.runs.state import TrainState
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_model
from moresjax.training import objectives
from moresjax.training.objectives import next_token
from moresjax.training.optimizer import learning_rate_ratios, make_optimizer, make_schedule
from moresjax.training.step import make_train_step, split_model

MORES = "mores:rank=1,positions=image"
CONNECTOR = {f"connector.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")}
TUNED = {f"tuning.params.mores.llm.block.out.{leaf}" for leaf in ("rotate", "weight", "bias")}


def optimizer_config(**changes):
    """Settings without warm-up, decay or clipping, changed by `changes`."""
    plain = {"warmup": 0.0, "schedule": "constant", "clip": 0.0}
    return OptimizerConfig(**plain | changes)


def uneven_batch(rows: int):
    """Rows with one to four answer tokens, in no order that a split would even out."""
    batch = tiny_batch(rows=rows)
    kind = batch.layout.kind.copy()
    for row in range(rows):
        answer = np.flatnonzero(kind[row] == TokenKind.ANSWER)
        kind[row, answer[: (row * row) % 4]] = TokenKind.QUESTION
    return dataclasses.replace(batch, layout=batch.layout.replace(kind=kind))


def start(model, also_train, optimizer=None):
    graphdef, trainable, frozen = split_model(model, also_train)
    optimizer = optimizer or optax.sgd(1.0)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    return graphdef, state, frozen, optimizer


def one_step(model, also_train, batch, **options):
    """A step of plain gradient descent: the updates are the gradients."""
    graphdef, state, frozen, optimizer = start(model, also_train)
    schedule = make_schedule("constant", 1.0, 10, 0.0, 0.0)
    step = jax.jit(make_train_step(graphdef, next_token, optimizer, schedule, **options))
    after, metrics = step(state, frozen, batch)
    grads = jax.tree.map(jnp.subtract, state.trainable, after.trainable)
    return named(grads), {name: float(value) for name, value in metrics.items()}


def mean_loss_gradients(model, also_train, batch):
    """The definition: the gradient of the mean over the labels of the whole batch."""
    graphdef, trainable, frozen = split_model(model, also_train)

    def mean(trainable):
        loss = next_token(nnx.merge(graphdef, trainable, frozen), batch)
        return loss.total / loss.weight

    loss, grads = jax.jit(jax.value_and_grad(mean))(trainable)
    return float(loss), named(grads)


# ---- Microbatches and metrics.


def test_microbatches_give_the_gradient_of_the_mean_over_labels():
    model, batch = tiny_model(MORES, num_layers=2), uneven_batch(8)
    loss, wanted = mean_loss_gradients(model, ("connector",), batch)
    counts = [(row == TokenKind.ANSWER).sum() for row in batch.layout.kind]
    assert len(set(counts)) > 2
    for microbatches in (1, 2, 4):
        grads, metrics = one_step(model, ("connector",), batch, microbatches=microbatches)
        assert metrics["labels"] == sum(counts)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
        norm = np.sqrt(sum(float((g**2).sum()) for g in wanted.values()))
        assert metrics["grad_norm"] == pytest.approx(norm, abs=1e-6)
        assert set(grads) == set(wanted) == CONNECTOR | TUNED
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, wanted[name], atol=1e-6, rtol=0, err_msg=name)
        assert any(np.abs(grad).max() > 1e-3 for grad in grads.values())


def scores(model, batch):
    graphdef, state = nnx.split(model)

    def forward(state, batch):
        model = nnx.merge(graphdef, state)
        return model.llm.logits(model(batch).hidden)

    return np.asarray(jax.jit(forward)(state, batch))


def test_logits_in_pieces_give_the_same_gradients(monkeypatch):
    model, batch = tiny_model(MORES), uneven_batch(rows=4)
    whole, measured = one_step(model, ("connector", "llm.head"), batch)
    monkeypatch.setattr(objectives, "PIECE", 3)
    pieces, same = one_step(model, ("connector", "llm.head"), batch)
    assert same == pytest.approx(measured, rel=1e-5)
    for name, gradient in whole.items():
        np.testing.assert_allclose(pieces[name], gradient, atol=1e-6, err_msg=name)


def test_logits_are_not_made_where_no_row_has_labels(monkeypatch):
    """The head is applied to as many pieces as hold the labels of the row with most of them."""
    made = []
    model, batch = tiny_model(), tiny_batch(rows=2, answer=4)
    head = model.llm.logits

    def counting(hidden):
        jax.debug.callback(lambda: made.append(hidden.shape[1]))
        return head(hidden)

    monkeypatch.setattr(objectives, "PIECE", 3)
    monkeypatch.setattr(model.llm, "logits", counting)
    found = jax.block_until_ready(jax.jit(lambda batch: next_token(model, batch))(batch))
    jax.effects_barrier()
    assert (float(found.weight), made) == (7, [3, 3])


def test_accuracy_is_the_share_of_right_labels():
    model, batch = tiny_model(num_layers=1), uneven_batch(4)
    logits = scores(model, batch)
    answer = batch.layout.kind == TokenKind.ANSWER
    guesses = logits.argmax(-1)[:, :-1][answer[:, 1:]]
    labels = batch.tokens[:, 1:][answer[:, 1:]]
    # Half of the labels become what the model says.
    labels[::2] = guesses[::2]
    tokens = batch.tokens.copy()
    tokens[:, 1:][answer[:, 1:]] = labels
    batch = dataclasses.replace(batch, tokens=tokens)
    logits = scores(model, batch)
    right = logits.argmax(-1)[:, :-1][answer[:, 1:]] == labels
    assert 0 < right.mean() < 1
    for microbatches in (1, 2):
        metrics = one_step(model, ("connector",), batch, microbatches=microbatches)[1]
        assert metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-6)


def test_a_batch_without_labels_changes_nothing():
    batch = tiny_batch(rows=2)
    kind = np.where(batch.layout.kind == TokenKind.ANSWER, 3, batch.layout.kind)
    batch = dataclasses.replace(batch, layout=batch.layout.replace(kind=kind))
    grads, metrics = one_step(tiny_model(num_layers=1), ("connector",), batch)
    assert metrics["labels"] == metrics["loss"] == metrics["grad_norm"] == 0
    assert all(not np.asarray(grad).any() for grad in grads.values())


# ---- What trains.


@pytest.mark.parametrize(
    ("tuning", "also", "wanted"),
    [
        ("none", ("connector",), CONNECTOR),
        ("none", ("connector.layers.1",), {n for n in CONNECTOR if ".1." in n}),
        ("none", (r"connector\..*\.bias",), {n for n in CONNECTOR if n.endswith("bias")}),
        ("none", ("llm.embed.table", "connector"), CONNECTOR | {"llm.embed.table"}),
        (MORES, (), TUNED),
        (MORES, ("connector",), TUNED | CONNECTOR),
    ],
)
def test_also_train_takes_prefixes_and_expressions(tuning, also, wanted):
    model = tiny_model(tuning)
    _, trainable, frozen = split_model(model, also)
    everything = {".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert set(named(trainable)) == wanted
    rest = {".".join(map(str, p)) for p, v in nnx.to_flat_state(frozen) if v.type is nnx.Param}
    assert rest == everything - wanted


def test_full_tuning_trains_the_whole_llm():
    names = set(named(split_model(tiny_model("full"), ())[1]))
    assert names
    assert all(name.startswith("llm.") for name in names)
    model = nnx.state(tiny_model("full"), nnx.Param)
    assert len(names) == len(nnx.to_flat_state(model.llm))


@pytest.mark.parametrize("pattern", ["conector", "connector.layer", "onnector", "llm.head.bias"])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(UserError, match="connector, llm, vision") as error:
        split_model(tiny_model(), ("connector", pattern))
    assert repr(pattern) in str(error.value)


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        split_model(tiny_model(), ())


def test_what_trains_is_fp32_and_what_is_frozen_keeps_its_type():
    model = tiny_model(MORES)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    _, trainable, frozen = split_model(model, ("connector",))
    assert {x.dtype for x in named(trainable).values()} == {jnp.dtype(jnp.float32)}
    params = [v for _, v in nnx.to_flat_state(frozen) if v.type is nnx.Param]
    assert {v.get_value().dtype for v in params} == {jnp.dtype(jnp.bfloat16)}


# ---- The frozen part.


def test_the_frozen_part_is_neither_changed_nor_donated():
    optimizer = optax.adam(1e-2)
    graphdef, state, frozen, _ = start(tiny_model(num_layers=1), ("connector",), optimizer)
    before = jax.tree.map(np.array, frozen)
    schedule = make_schedule("constant", 1.0, 10, 0.0, 0.0)
    step = jax.jit(make_train_step(graphdef, next_token, optimizer, schedule), donate_argnums=0)
    old = jax.tree.leaves(state.trainable)
    for _ in range(3):
        state, _ = step(state, frozen, tiny_batch())
    assert int(state.step) == 3
    assert all(x.is_deleted() for x in old)
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))


def wide_step():
    """A step of connector training beside an LLM that is far larger than its activations."""
    optimizer = optax.adam(1e-3)
    model = tiny_model(num_layers=2, hidden_size=128, intermediate_size=768)
    graphdef, state, frozen, _ = start(model, ("connector",), optimizer)
    schedule = make_schedule("constant", 1.0, 10, 0.0, 0.0)
    step = make_train_step(graphdef, next_token, optimizer, schedule)
    return graphdef, step, (state, frozen, tiny_batch(rows=1))


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_the_step_returns_the_trainable_part_and_its_moments_only():
    _, step, arguments = wide_step()
    leaves = [(x.shape, x.dtype) for x in jax.tree.leaves(arguments[0])]
    returned = jax.eval_shape(lambda *a: jax.tree.leaves(step(*a)), *arguments)
    returned = [(x.shape, x.dtype) for x in returned]
    assert returned[: len(leaves)] == leaves
    assert all(shape == () for shape, _ in returned[len(leaves) :])


def test_the_step_needs_no_memory_for_frozen_gradients():
    graphdef, step, arguments = wide_step()
    frozen = arguments[1]

    def trap(state, frozen, batch):
        """Gradients of everything, thrown away but for their norm."""

        def loss(parts):
            return next_token(nnx.merge(graphdef, *parts), batch).total

        grads = jax.grad(loss, allow_int=True)((state.trainable, frozen))
        grads = [g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.floating)]
        new, metrics = step(state, frozen, batch)
        return new, metrics | {"grad_norm": optax.global_norm(grads)}

    def need(function):
        memory = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert need(trap) - need(step) > nbytes(frozen.llm.blocks) / 2
    # A gradient of a frozen kernel would be a product of activations in the kernel's shape.
    gradient = re.compile(r"f32\[(128,768|768,128)\] = dot_general")
    assert gradient.search(str(jax.make_jaxpr(trap)(*arguments)))
    assert not gradient.search(str(jax.make_jaxpr(step)(*arguments)))


def test_the_gradient_norm_is_that_of_the_trainable_part():
    model, batch = tiny_model(num_layers=1), tiny_batch()
    _, some = mean_loss_gradients(model, ("connector",), batch)
    _, more = mean_loss_gradients(model, ("connector", "llm.head"), batch)
    norm = float(optax.global_norm(some))
    assert one_step(model, ("connector",), batch)[1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert float(optax.global_norm(more)) > 1.1 * norm


# ---- The optimizer.


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


def first_update(trainable, grads=None, **changes):
    optimizer, _ = make_optimizer(optimizer_config(**changes), 10, trainable)
    grads = random_like(trainable) if grads is None else grads
    updates, state = optimizer.update(grads, optimizer.init(trainable), trainable)
    return named(updates), state


@pytest.fixture(scope="module")
def trainable():
    also = ("connector", "llm.embed", "llm.norm", "llm.blocks.attn.q")
    return split_model(tiny_model(MORES), also)[1]


def test_learning_rates_by_component(trainable):
    base, _ = first_update(trainable, lr=1e-3)
    updates, _ = first_update(trainable, lr=1e-3, lr_by_component="connector=4e-3;llm=1e-4")
    ratios = {"connector": 4.0, "llm": 0.1, "tuning": 1.0}
    for name, update in updates.items():
        ratio = ratios[name.split(".")[0]]
        np.testing.assert_allclose(update, ratio * base[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(np.abs(update), ratio * 1e-3, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("flip", [False, True])
def test_the_last_matching_override_wins(trainable, flip):
    rates = ["connector=2e-3", r".*\.bias=5e-3"]
    ratios = learning_rate_ratios(trainable, 1e-3, ";".join(rates[::-1] if flip else rates))
    assert ratios["connector.layers.0.kernel"] == pytest.approx(2)
    assert ratios["connector.layers.0.bias"] == pytest.approx(2 if flip else 5)
    assert ratios["tuning.params.mores.llm.block.out.bias"] == pytest.approx(5)
    assert ratios["llm.embed.table"] == 1


@pytest.mark.parametrize("flip", [False, True])
def test_overrides_keep_the_order_of_the_config(trainable, flip):
    rates = ["llm=2e-3", "[cl].*=5e-3"]
    by_component = ";".join(rates[::-1] if flip else rates)
    config = OptimizerConfig(lr_by_component=by_component, clip=0.0, warmup=0.0, lr=1e-3)
    optimizer, _ = make_optimizer(config, 10, trainable)
    grads = random_like(trainable)
    updates = named(optimizer.update(grads, optimizer.init(trainable), trainable)[0])
    wanted = 2e-3 if flip else 5e-3
    np.testing.assert_allclose(np.abs(updates["llm.embed.table"]), wanted, rtol=1e-3)


def test_a_config_can_name_a_parameter_inside_a_component(trainable):
    by_component = "connector.layers.0=5e-3"
    config = OptimizerConfig(lr_by_component=by_component, clip=0.0, warmup=0.0, lr=1e-3)
    optimizer, _ = make_optimizer(config, 10, trainable)
    grads = random_like(trainable)
    updates = named(optimizer.update(grads, optimizer.init(trainable), trainable)[0])
    np.testing.assert_allclose(np.abs(updates["connector.layers.0.bias"]), 5e-3, rtol=1e-3)
    np.testing.assert_allclose(np.abs(updates["connector.layers.1.bias"]), 1e-3, rtol=1e-3)


def test_an_override_that_matches_nothing_is_refused(trainable):
    with pytest.raises(UserError, match="conector"):
        first_update(trainable, lr_by_component="conector=1e-4")


@pytest.mark.parametrize("text", ["connector", "connector=fast", "=1e-3"])
def test_a_malformed_override_is_refused(trainable, text):
    with pytest.raises(UserError, match="PATTERN=LR"):
        first_update(trainable, lr_by_component=text)


def test_weight_decay_is_for_kernels_and_tables(trainable):
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = first_update(trainable, zeros, lr=1e-2, weight_decay=0.1)
    values = named(trainable)
    decayed = {name for name, update in updates.items() if np.asarray(update).any()}
    assert decayed == {name for name in values if name.endswith((".kernel", ".table"))}
    assert {"llm.embed.table", "llm.blocks.attn.q.kernel"} <= decayed < set(values)
    for name in decayed:
        np.testing.assert_allclose(updates[name], -1e-3 * values[name], rtol=1e-5)


def test_gradients_are_clipped_together(trainable):
    grads = random_like(trainable)
    norm = float(optax.global_norm(grads))
    for clip, wanted in ((0.5, 0.5), (2 * norm, norm), (0.0, norm)):
        _, state = first_update(trainable, grads, clip=clip)
        moments = optax.tree_utils.tree_get(state, "mu")
        assert float(optax.global_norm(moments)) == pytest.approx(0.1 * wanted, rel=1e-4)


# ---- Schedules.


@pytest.mark.parametrize(
    ("name", "end", "last"),
    [("cosine", 0.05, 0.05), ("linear", 0.05, 0.05), ("linear", 0.0, 0.0), ("constant", 0.05, 1.0)],
)
def test_schedules_rise_then_fall(name, end, last):
    schedule = make_schedule(name, 2e-3, 100, 0.1, end)
    values = np.array([float(schedule(step)) for step in range(101)]) / 2e-3
    np.testing.assert_allclose(values[:11], np.arange(11) / 10, atol=1e-6)
    assert values[100] == pytest.approx(last, abs=1e-6)
    assert (np.diff(values[10:]) <= 1e-7).all()
    if name != "constant":
        middle = end + (1 - end) / 2
        assert values[55] == pytest.approx(middle, abs=1e-5)


def test_schedules_without_warmup_start_at_the_top():
    for name in ("cosine", "linear", "constant"):
        assert float(make_schedule(name, 2e-3, 10, 0.0, 0.0)(0)) == pytest.approx(2e-3)


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(UserError, match=r"'cosin'.*cosine, linear, constant"):
        make_schedule("cosin", 1e-3, 10, 0.0, 0.0)


def test_the_logged_rate_is_the_one_of_the_update():
    rate = make_schedule("linear", 0.5, 4, 0.5, 0.0)
    optimizer = optax.sgd(rate)
    graphdef, state, frozen, _ = start(tiny_model(num_layers=1), ("llm.head",), optimizer)
    step = jax.jit(make_train_step(graphdef, next_token, optimizer, rate))
    for number in range(3):
        new, metrics = step(state, frozen, tiny_batch())
        moved = jax.tree.map(jnp.subtract, state.trainable, new.trainable)
        assert float(metrics["lr"]) == pytest.approx(float(rate(number)))
        distance = float(optax.global_norm(moved))
        assert distance == pytest.approx(float(metrics["lr"] * metrics["grad_norm"]), rel=1e-3)
        state = new
