"""Analytic FLOPs, against the matrix products that JAX traces."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from moresjax.generation.engine import Engine
from moresjax.models.flops import generation_flops, train_flops
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_config
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model


def inner(value):
    """Programs inside an operation."""
    values = value if isinstance(value, tuple | list) else (value,)
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def products(jaxpr) -> float:
    """Operations of all matrix products of a traced program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            over = math.prod(shape[i] for i in contracted)
            total += 2 * over * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(products(p) for v in equation.params.values() for p in inner(v))
    return total


@pytest.mark.parametrize(
    ("tuning", "also_train", "changes"),
    [
        ("mores:rank=1,positions=image", (), {}),
        ("lora:rank=4", ("connector",), {}),
        ("full", ("connector",), {}),
        ("full", (), {"tie_embeddings": True}),
        ("none", ("connector", "vision"), {}),
        ("none", ("connector", "vision"), {"feature_layer": (1, 2, 0)}),
    ],
)
def test_flops_are_those_of_the_products_in_the_traced_step(tuning, also_train, changes):
    layer = changes.get("feature_layer", -2)
    changes = {name: value for name, value in changes.items() if name != "feature_layer"}
    config = tiny_config(hidden_size=64, intermediate_size=96, **changes)
    vision = dataclasses.replace(config.vision, feature_layer=layer)
    config = dataclasses.replace(config, vision=vision)
    model = initialize(MLLM(config, tuning))
    graphdef, trainable, frozen = split_model(model, also_train)
    batch = tiny_batch(rows=2)

    def loss(trainable):
        return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

    counted = products(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr)
    length = batch.layout.shape[1]
    found = train_flops(config, trainable, frozen, rows=2, length=length, images=1)
    assert found.model == pytest.approx(counted, rel=0.02)
    assert found.hardware == found.model


@pytest.mark.parametrize("tuning", ["mores:rank=1,positions=image", "lora:rank=4"])
def test_flops_of_generation_are_those_of_the_products_in_its_programs(tuning):
    config = tiny_config(hidden_size=64, intermediate_size=96)
    model = initialize(MLLM(config, tuning))
    engine, batch, new = Engine(model, eos_ids=(2,)), tiny_batch(rows=2), 4
    prompt = batch.layout.shape[1]
    whole, bare = engine.parameters

    # All tokens in all layers, as with attention kernels; a dense mask saves some in the last one.
    read = jax.make_jaxpr(lambda: model.llm.logits(model(batch).hidden[:, -1]))().jaxpr
    found = generation_flops(config, whole, rows=2, length=prompt, keys=prompt, images=1)
    assert found.model == pytest.approx(products(read), rel=0.02)

    carry = jax.eval_shape(lambda: engine.prefill(batch, new))
    step = jax.make_jaxpr(engine.decode)(carry).jaxpr
    found = generation_flops(config, bare, rows=2, length=1, keys=prompt + new, images=0)
    assert found.model == pytest.approx(products(step), rel=0.02)
