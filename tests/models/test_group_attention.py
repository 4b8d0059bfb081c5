"""Statistics of attention while it stays on its kernel: exact, and never an array of all pairs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.attention import (
    AttentionProbe,
    GroupProbe,
    KeyProbe,
    by_image,
)
from moresjax.core.layout import Batch, RowStructure, TokenKind
from moresjax.models import attention as attention_module
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
    model = tiny_model(tuning, **llm)
    graphdef, state = nnx.split(model)

    def run(state, batch):
        out = nnx.merge(graphdef, state)(batch, probes=probes, queries=queries)
        return out.hidden, out.stats

    return run, state, batch


LOCAL = {"attention_pattern": "lg", "window": 7, "attention_softcap": 3.0}
CASES = [
    ("splash", "none", packed_batch(), {}),
    ("splash", "prompt:length=2", long_batch(), LOCAL | {"num_kv_heads": 2}),
    ("chunked", "none", packed_batch(), {"num_kv_heads": 2}),
    ("chunked", "none", long_batch(), LOCAL),
    ("chunked", "prefix:length=3", long_batch(), {}),
]


@pytest.mark.parametrize(("kernel", "tuning", "batch", "llm"), CASES)
def test_statistics_are_those_of_a_dense_mask(kernel, tuning, batch, llm, chunks):
    """Grouped heads, windows, soft caps, packed rows and virtual tokens."""
    alive = np.asarray(batch.layout.kind) != TokenKind.PAD
    queries = np.tile(np.arange(40), (len(alive), 1))  # so many that attention itself is asked
    run, *args = passes(batch, tuning, PROBES, queries, attention=kernel, **llm)
    hidden, stats = jax.jit(run)(*args)
    run, *args = passes(batch, tuning, PROBES, queries, attention="xla", **llm)
    wanted, wanted_stats = jax.jit(run)(*args)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(hidden, wanted)
    jax.tree.map(close, stats, wanted_stats)
    assert alive[:, :40].all()
    np.testing.assert_allclose(stats["each"]["mass"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("kernel", ["splash", "chunked"])
@pytest.mark.parametrize("tuning", ["none", "prompt:length=2", "prefix:length=3"])
def test_no_array_has_all_pairs(kernel, tuning, chunks):
    """Of all queries, of many and of few."""
    length = 192  # longer than the lanes of a kernel
    batch = long_batch(length=length)
    for count in (None, 64, 4):
        queries = None if count is None else np.full((len(batch.tokens), count), 40)
        run, *args = passes(batch, tuning, PROBES, queries, attention=kernel, **LOCAL)
        program = jax.make_jaxpr(run)(*args)
        assert not of_all_pairs(program, length)
        assert ("splash_mha" in str(program)) == (kernel == "splash")
    run, *args = passes(batch, tuning, PROBES, attention="xla", **LOCAL)
    assert of_all_pairs(jax.make_jaxpr(run)(*args), length)
