"""Attention kernels: they compute what attention over a dense mask does, where they are used."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.attention import AttentionProbe
from moresjax.core.errors import UserError
from moresjax.core.layout import (
    Batch,
    RowStructure,
    TokenKind,
    infer_structure,
    valid_mask,
    visible,
)
from moresjax.data.digits import DigitsSource
from moresjax.data.llava import LlavaSource
from moresjax.data.pipeline import structure_for
from moresjax.hardware.chips import find_slice
from moresjax.models.attention import attention
from moresjax.models.fused_attention import Runs, visible_runs
from moresjax.plans.train_plan import abstract_step
from moresjax.runs.config import base_config
from moresjax.runs.run_config import resolve
from moresjax.sharding.mesh import batch_sharding, make_mesh, mesh_preset, shard_params, use_mesh
from moresjax.testing.batches import row_layout, stack_layout, tiny_batch
from moresjax.testing.models import tiny_config, tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model

LENGTH = 130  # no multiple of a block


def packed_layout():
    """Rows with two documents and padding between, before and behind them."""
    document = np.zeros((2, LENGTH), np.int32)
    document[0, 70:], document[1, 50:] = 1, 1
    padding = np.zeros((2, LENGTH), bool)
    padding[0, 120:], padding[1, :5], padding[1, 45:50] = True, True, True
    position = np.zeros_like(document)
    for row, number in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = (document[row] == number) & ~padding[row]
        position[row, own] = np.arange(own.sum())
    zeros = np.zeros_like(document)
    row = row_layout((TokenKind.QUESTION, LENGTH))
    layout = stack_layout([row, row])
    return layout.replace(
        kind=np.where(padding, int(TokenKind.PAD), layout.kind),
        document=document,
        position=position,
        branch=zeros,
    )


@pytest.mark.parametrize(
    ("dim", "heads", "window", "softcap"),
    [(16, (4, 2), 0, 0.0), (80, (2, 2), 0, 0.0), (8, (2, 1), 17, 2.0)],
)
def test_splash_is_attention_over_a_dense_mask(dim, heads, window, softcap):
    """Phi-2's head size, grouped heads, sliding windows and soft caps; gradients too."""
    layout = packed_layout()
    valid = np.asarray(valid_mask(layout))
    mask = visible(layout)
    if window:
        mask &= layout.position[:, :, None] - layout.position[:, None, :] < window
    runs = Runs(jnp.where(valid, layout.document, -1), "splash", window)
    rng = np.random.default_rng(0)
    queries, keys = heads
    q = rng.standard_normal((2, queries, LENGTH, dim)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, keys, LENGTH, dim)).astype(np.float32)
    weights = rng.standard_normal(q.shape).astype(np.float32) * valid[:, None, :, None]

    @functools.partial(jax.jit, static_argnums=0)
    def both(kernel, q, k, v):
        def total(q, k, v):
            y = attention(q, k, v, runs if kernel else mask, softcap)
            return (y * weights).sum(), y

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    (_, y), gradients = both(True, q, k, v)
    (_, expected), expected_gradients = both(False, q, k, v)
    alive = valid[:, None, :, None]
    np.testing.assert_allclose(y * alive, expected * alive, atol=2e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def long_batch(structure: RowStructure = RowStructure.SINGLE) -> Batch:
    """`tiny_batch`, padded to the length that kernels need."""
    batch = tiny_batch(images=0, answer=40)
    missing = 128 - batch.tokens.shape[1]

    def lengthened(x, fill=0):
        return np.pad(np.asarray(x), ((0, 0), (0, missing)), constant_values=fill)

    layout = jax.tree.map(lengthened, batch.layout)
    layout = layout.replace(image=lengthened(batch.layout.image, -1))
    return Batch(lengthened(batch.tokens), layout, structure=structure)


def test_a_scanned_decoder_learns_the_same_with_the_kernel():
    """Rematerialised, a local and a global layer, rows and heads split over devices."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    options = {"num_layers": 2, "attention_pattern": "lg", "window": 7, "remat": True}
    batch = jax.device_put(long_batch(), batch_sharding(mesh))

    def loss_and_gradients(attention):
        model = tiny_model("mores:rank=1,positions=all", attention=attention, **options)
        graphdef, trainable, frozen = split_model(model)
        trainable, frozen = shard_params(trainable, mesh), shard_params(frozen, mesh)

        @jax.jit
        @jax.value_and_grad
        def compute(trainable, frozen, batch):
            with use_mesh(mesh):
                return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

        return compute(trainable, frozen, batch)

    loss, gradients = loss_and_gradients("splash")
    expected_loss, expected = loss_and_gradients("xla")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients, expected)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 1e-2


def program(batch: Batch, tuning: str = "none", probes=(), **llm) -> str:
    model = tiny_model(tuning, attention="splash", **llm)
    graphdef, state = nnx.split(model)

    def run(state, batch):
        return nnx.merge(graphdef, state)(batch, probes=probes).hidden

    return str(jax.make_jaxpr(run)(state, batch))


def test_the_dense_mask_is_used_where_no_kernel_can_say_the_same():
    packed = long_batch(RowStructure.PACKED)
    assert "splash_mha" in program(packed)
    assert "splash_mha" not in program(long_batch(RowStructure.ANY))  # there may be branches
    assert "splash_mha" in program(packed, probes=(AttentionProbe(),))
    assert "splash_mha" in program(long_batch(), tuning="prefix:length=2")
    assert "splash_mha" not in program(packed, tuning="prefix:length=2")  # all documents see it
    assert "splash_mha" not in program(
        dataclasses.replace(tiny_batch(), structure=RowStructure.SINGLE)
    )


def test_cudnn_is_used_for_one_document_of_sixteen_bits_only():
    llm = tiny_config(attention="cudnn", dtype="bfloat16", head_dim=8).llm

    def kernel(structure=RowStructure.SINGLE, **changes):
        runs = visible_runs(long_batch(structure), dataclasses.replace(llm, **changes))
        return runs and runs.kernel

    assert kernel() == "cudnn"
    assert kernel(RowStructure.PACKED) is None
    assert kernel(dtype="float32") is None
    assert kernel(head_dim=12) is None
    assert kernel(head_dim=256) is None
    assert kernel(attention_softcap=50.0) is None


@pytest.mark.parametrize("window", [0, 17])
def test_cudnn_is_asked_for_what_the_dense_mask_says(window, monkeypatch):
    """JAX's own XLA implementation, given the same arguments, on right-padded rows."""
    ask = jax.nn.dot_product_attention

    def on_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return ask(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    layout = long_batch().layout
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 4, 128, 8)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 2, 2, 128, 8)), jnp.float32)
    mask = visible(layout)
    if window:
        mask &= layout.position[:, :, None] - layout.position[:, None, :] < window
    y = attention(q, k, v, Runs(jnp.asarray(layout.document), "cudnn", window))
    alive = np.asarray(valid_mask(layout))[:, None, :, None]
    np.testing.assert_allclose(y * alive, attention(q, k, v, mask) * alive, atol=2e-6)


def test_cudnn_lowers_for_gpus_in_both_directions(monkeypatch):
    """Without a GPU; only the question for cuDNN's version is answered here."""
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(version, lambda: 91200)
    query, key = (jnp.zeros((2, heads, 128, 80), jnp.bfloat16) for heads in (4, 2))
    runs = Runs(jnp.zeros((2, 128), jnp.int32), "cudnn", 17)
    traced = jax.jit(jax.grad(lambda q: attention(q, key, key, runs).sum())).trace(query)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text
    assert "@__cudnn$fmhaSoftmaxBackward(" in text


def test_on_a_cpu_nothing_is_fused_unless_it_is_asked_for():
    assert visible_runs(long_batch(), tiny_config().llm) is None
    assert visible_runs(long_batch(), tiny_config(attention="splash").llm).kernel == "splash"
    whole = long_batch().layout.replace(whole_images=True)
    assert visible_runs(long_batch(), tiny_config(attention="splash").llm, whole) is None
    with pytest.raises(UserError, match="attention 'flash'"):
        tiny_config(attention="flash")


def test_what_rows_hold_is_seen_or_known_from_source_and_batching():
    batch = long_batch()
    assert infer_structure(batch.layout) == RowStructure.SINGLE
    branch = np.array(batch.layout.branch)
    branch[0, 3] = 1
    left = np.array(batch.layout.kind)
    left[0, 0] = TokenKind.PAD
    assert infer_structure(batch.layout.replace(branch=branch)) == RowStructure.ANY
    assert infer_structure(batch.layout.replace(document=branch)) == RowStructure.ANY
    assert infer_structure(batch.layout.replace(kind=left)) == RowStructure.ANY
    assert (
        structure_for(LlavaSource, "pad")
        == structure_for(LlavaSource, "bucket")
        == RowStructure.SINGLE
    )
    assert structure_for(LlavaSource, "pack") == RowStructure.PACKED
    assert structure_for(DigitsSource("instruct"), "pack") == RowStructure.ANY


def lowered_for_tpus(preset: str):
    """The train step of a small decoder with Phi-2's head size."""
    config = base_config()
    config.dtype, config.remat, config.tuning = "bfloat16", True, "mores:rank=1"
    config.batch_size, config.max_seq_len, config.data = 16, 128, {"name": "llava"}
    config.also_train = ()
    config.mesh.update(mesh_preset(preset, 4))
    config.model.llm = {
        "vocab_size": 256,
        "hidden_size": 320,
        "intermediate_size": 256,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = resolve(config)
    mesh = make_mesh(**mesh_preset(preset, 4), devices=find_slice("v5e-4").devices())
    state, frozen, batch, step = abstract_step(config, mesh)
    return step.lower(state, frozen, batch)


def test_a_train_step_for_tpus_lowers_to_a_kernel_for_each_chips_rows():
    text = lowered_for_tpus("fsdp").as_text()
    assert "tpu_custom_call" in text
    assert "tensor<4x4x128x80xbf16>" in text  # of 16 rows


def test_a_compiled_train_step_has_the_kernels_of_both_directions():
    """Rows and heads split over the chips."""
    text = lowered_for_tpus("fsdp+tensor").compile().as_text()
    assert "bf16[8,2,128,80]" in text  # 16 rows over 2 chips, 4 heads over 2
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}_segmented" in text
