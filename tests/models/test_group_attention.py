"""Statistics of attention while it stays on its kernel: exact, and never an array of all pairs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.attention import (
    AttentionMaps,
    AttentionProbe,
    GroupProbe,
    KeyProbe,
    by_image,
    by_roi,
)
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, LazyMask, RowStructure, TokenKind, visible
from moresjax.models import attention as attention_module
from moresjax.models.attention import attention
from moresjax.models.fused_attention import Runs, log_fallback
from moresjax.models.group_attention import attention_and_masses, group_masses, key_sums, one_hot
from moresjax.models.mllm import PrefillChunk
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_model

LENGTH = 128
PROBES = (
    AttentionProbe(),
    AttentionProbe("each", by_query=True),
    GroupProbe(by_image, 2),
    KeyProbe(by_head=True),
)


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of sixteen queries."""
    monkeypatch.setattr(attention_module, "PAIRS", 16 * LENGTH)


def long_batch(structure: RowStructure = RowStructure.SINGLE, length: int = LENGTH) -> Batch:
    """`tiny_batch` with an image, padded to the length that kernels need."""
    batch = tiny_batch(images=1, answer=40)

    def lengthened(x, fill=0):
        x = np.asarray(x)
        return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill)

    layout = jax.tree.map(lengthened, batch.layout)
    layout = layout.replace(image=lengthened(batch.layout.image, -1))
    return dataclasses.replace(
        batch, tokens=lengthened(batch.tokens), layout=layout, structure=structure
    )


def packed_batch() -> Batch:
    """Every row has two documents."""
    batch = long_batch(RowStructure.PACKED)
    document = np.array(batch.layout.document)
    document[:, 30:] = 1
    position = np.where(document == 1, np.arange(LENGTH) - 30, np.asarray(batch.layout.position))
    layout = batch.layout.replace(document=document, position=np.maximum(position, 0))
    return dataclasses.replace(batch, layout=layout)


def arrays(jaxpr):
    """The shapes of all arrays of a program, but for those inside of kernels."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        if equation.primitive.name != "pallas_call":
            parts = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
            for inner in filter(is_program, parts):
                yield from arrays(getattr(inner, "jaxpr", inner))


def is_program(x) -> bool:
    return hasattr(x, "jaxpr") or hasattr(x, "eqns")


def of_all_pairs(program, length: int) -> set[tuple[int, ...]]:
    """The arrays of a program that have an axis of all queries and one of all keys."""
    return {x for x in arrays(program.jaxpr) if sum(size >= length for size in x) > 1}


def passes(batch: Batch, tuning: str, probes, queries=None, **llm):
    """The pass of a tiny model, and its arguments."""
    model = tiny_model(tuning, **{"num_layers": 1} | llm)
    graphdef, state = nnx.split(model)

    def run(state, batch):
        out = nnx.merge(graphdef, state)(batch, probes=probes, queries=queries)
        return out.hidden, out.stats

    return run, state, batch


LOCAL = {"attention_pattern": "l", "window": 7, "attention_softcap": 3.0}
CASES = [
    ("splash", "none", packed_batch(), {}),
    ("splash", "prompt:length=2", long_batch(), LOCAL | {"num_kv_heads": 2}),
    ("chunked", "none", packed_batch(), {"num_kv_heads": 2}),
    ("chunked", "none", long_batch(), LOCAL | {"attention_pattern": "lg", "num_layers": 2}),
    ("chunked", "prefix:length=3", long_batch(), {}),
]


@pytest.mark.parametrize(("kernel", "tuning", "batch", "llm"), CASES)
def test_statistics_are_those_of_a_dense_mask(kernel, tuning, batch, llm, chunks):
    """Grouped heads, windows, soft caps, packed rows and virtual tokens."""
    alive = np.asarray(batch.layout.kind) != TokenKind.PAD
    queries = np.tile(np.arange(40), (len(alive), 1))  # so many that attention itself is asked
    probes = *PROBES, AttentionMaps()
    run, *args = passes(batch, tuning, probes, queries, attention=kernel, **llm)
    hidden, stats = jax.jit(run)(*args)
    run, *args = passes(batch, tuning, probes, queries, attention="xla", **llm)
    wanted, wanted_stats = jax.jit(run)(*args)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(hidden, wanted)
    jax.tree.map(close, stats, wanted_stats)
    assert alive[:, :40].all()
    np.testing.assert_allclose(stats["each"]["mass"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "tuning"), [("splash", "prefix:length=3"), ("chunked", "prompt:length=2")]
)
def test_no_array_has_all_pairs(kernel, tuning, chunks):
    """Of all queries, of many and of few."""
    length = 192  # longer than the lanes of a kernel
    batch = long_batch(length=length)
    for count in (None, 4):
        queries = None if count is None else np.full((len(batch.tokens), count), 40)
        run, *args = passes(batch, tuning, PROBES, queries, attention=kernel, **LOCAL)
        program = jax.make_jaxpr(run)(*args)
        assert not of_all_pairs(program, length)
        assert ("splash_mha" in str(program)) == (kernel == "splash")
    run, *args = passes(batch, tuning, PROBES, attention="xla")
    assert of_all_pairs(jax.make_jaxpr(run)(*args), length)


def test_masses_and_key_sums_of_single_passes(chunks):
    """Eight groups in one kernel: of each query and, by the gradient of its values, of each key."""
    layout = long_batch().layout
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 4, LENGTH, 8)), jnp.float32)
    k, v = jnp.asarray(rng.standard_normal((2, 2, 2, LENGTH, 8)), jnp.float32)
    members = one_hot(jnp.asarray(rng.integers(0, 9, (2, LENGTH))), 8)  # the last belongs to none
    columns = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    lazy, mask = LazyMask(layout, columns), visible(layout)
    alive = np.asarray(layout.kind) != TokenKind.PAD
    weights = jnp.asarray(alive, jnp.float32)
    wanted, sums = group_masses(q, k, members, mask), key_sums(q, k, weights, mask)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(group_masses(q, k, members, lazy), wanted)
    close(key_sums(q, k, weights, lazy), sums)
    runs = Runs(jnp.where(alive, 0, -1), "splash")
    wide = jnp.concatenate([v] * 16, axis=3)  # no room for groups beside the values
    for values in (v, wide):
        for view in (runs, lazy):
            both = jax.jit(attention_and_masses, static_argnums=4)
            y, masses = both(q, k, values, view, 0.0, members)
            close((masses - wanted) * alive[:, None, :, None], 0)
            close((y - attention(q, k, values, mask)) * alive[:, None, :, None], 0)
    close(jax.jit(key_sums)(q, k, weights, runs), sums)


def test_statistics_on_cudnn_lower_for_gpus_without_an_array_of_all_pairs(monkeypatch):
    """Groups as the values of a second run, learned keys before the rows, gradients; no GPU."""
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(version, lambda: 91200)
    monkeypatch.setattr(attention_module, "PAIRS", 16 * 192)
    batch, llm = long_batch(length=192), {"dtype": "bfloat16", "head_dim": 16}
    run, state, batch = passes(batch, "prefix:length=3", PROBES, attention="cudnn", **llm)
    program = jax.jit(run).trace(state, batch)
    assert not of_all_pairs(program.jaxpr, 192)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") >= 3  # of attention, of groups and of key sums
    assert "@__cudnn$fmhaSoftmaxBackward(" in text
    assert not re.findall(r"tensor<(?:\d+x)*19[25]x19[25]x", text)


@pytest.mark.parametrize(
    ("structure", "tuning", "llm", "reason"),
    [
        (RowStructure.ANY, "none", {}, "branches"),
        (RowStructure.PACKED, "prompt:length=2", {}, "virtual tokens that all documents"),
        (RowStructure.PACKED, "none", {"attention": "cudnn"}, "packed rows"),
        (RowStructure.SINGLE, "none", {"attention": "cudnn"}, "activations in float32"),
    ],
)
def test_what_a_kernel_cannot_say_is_read_in_chunks_and_named(
    structure, tuning, llm, reason, caplog, monkeypatch
):
    monkeypatch.setattr(attention_module, "PAIRS", 16 * 192)
    log_fallback.cache_clear()
    batch = long_batch(structure, 192)
    for _ in range(2):
        run, *args = passes(batch, tuning, PROBES, **{"attention": "splash"} | llm)
        assert not of_all_pairs(jax.make_jaxpr(run)(*args), 192)
    assert [reason in record.message for record in caplog.records] == [True]


def test_a_probe_that_needs_a_mask_leaves_attention_on_its_kernel(chunks):
    """A probe of a plug-in has the mask of the queries it chose."""

    class Sight:
        name, site = "sight", "attn"

        def read(self, context, q, k):
            return context.mask.sum(axis=2)

    queries = np.full((2, 2), 20)
    run, *args = passes(long_batch(), "none", (Sight(),), queries, attention="splash")
    assert "splash_mha" in str(jax.make_jaxpr(run)(*args))
    both = LOCAL | {"attention_pattern": "lg", "num_layers": 2}
    run, *args = passes(long_batch(), "none", (Sight(),), queries, attention="chunked", **both)
    np.testing.assert_array_equal(jax.jit(run)(*args)[1]["sight"][:, 0, 0], [7, 21])


def test_groups_of_a_region_of_interest():
    batch = long_batch()
    roi = np.zeros((2, 9), bool)
    roi[:, :4] = True
    probes = (GroupProbe(by_roi, 2), GroupProbe(by_image, 1, "image"))
    queries = np.full((2, 1), 40)
    run, *args = passes(dataclasses.replace(batch, roi=roi), "none", probes, queries)
    _, stats = jax.jit(run)(*args)
    np.testing.assert_allclose(stats["groups"].sum(-1), stats["image"][..., 0], rtol=1e-5)
    assert (np.asarray(stats["groups"]) > 0).all()
    with pytest.raises(UserError, match="give roi="):
        run(args[0], batch)


def test_a_chunk_of_a_prompt_is_read_by_the_kernel():
    """Its first column is data; statistics of its last token are those of a whole prompt."""
    batch, first = long_batch(length=160), 20
    alive = np.asarray(batch.layout.kind) != TokenKind.PAD
    last = jnp.asarray(alive.sum(axis=1))[:, None] - 1
    options = {"tuning": "prefix:length=3", "num_layers": 1}
    graphdef, state = nnx.split(unstacked(attention="splash", **options))
    dense, _ = nnx.split(unstacked(attention="xla", **options))

    @jax.jit
    def whole(state, batch):
        out = nnx.merge(dense, state)(batch, probes=PROBES[:2], queries=last, keep_cache=True)
        return out.hidden, out.cache, out.stats

    def chunk(state, batch, caches, first):
        model = nnx.merge(graphdef, state)
        chunk = PrefillChunk(caches, first, 140)
        out = model(batch, probes=PROBES[:2], queries=last, chunk=chunk)
        return out.hidden, out.stats

    wanted, caches, wanted_stats = whole(state, batch)
    known = jnp.arange(3 + 160) < 3 + first  # the rest of a cache is what was there before
    caches = [jax.tree.map(lambda x: jnp.where(known[:, None], x, 7.0), one) for one in caches]
    args = state, batch, caches, jnp.asarray(first)
    assert "splash_mha" in str(jax.make_jaxpr(chunk)(*args))
    hidden, stats = jax.jit(chunk)(*args)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(hidden, wanted)
    jax.tree.map(close, stats, wanted_stats)


def unstacked(**options):
    """A tiny model whose layers are a list, as decoding has them."""
    model = tiny_model(**options)
    model.llm.unstack()
    return model
