"""Every method in every family of LLMs; a mesh and rematerialised layers change nothing."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import PhiConfig

from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.sharding.mesh import (
    batch_sharding,
    make_mesh,
    parameter_shardings,
    shard_params,
    use_mesh,
)
from moresjax.testing.batches import tiny_batch
from moresjax.testing.hf_llms import FAMILIES
from moresjax.testing.models import TINY_VISION
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.tuning.base import METHODS
from moresjax.weights.families.base import decoder_config

# Each family once, as one configuration of the decoder or another.
CONFIGS = {name: FAMILIES[name] for name in ("mistral", "qwen 3", "gemma 2", "gemma 3", "opt")}
CONFIGS |= {"stablelm": FAMILIES["stablelm, biases, parallel"], "llama 3": FAMILIES["llama 3"]}
CONFIGS["phi"] = PhiConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    partial_rotary_factor=0.5,
    max_position_embeddings=128,
)

# All methods, each on a mesh with one family; where two would share a matrix, on their own.
SPECS = {
    "phi": "oft:block_size=4,targets=q/lora:rank=2/ia3/mores:rank=2,positions=image/loreft/prompt",
    "gemma 3": "boft:block_size=4,targets=v/dora:rank=2,targets=o/ln/adapter:bottleneck=3/mores2"
    "/red/aprompt:length=2,kv_length=2",
    "opt": "oft-legacy:blocks=2,targets=k/vera:rank=2,targets=q;o/houlsby:bottleneck=2/noreft"
    "/direft/nodireft/vpt:length=2/ptum:length=2",
    "qwen 3": "mixlora:rank=2,factors=4,scored=true,targets=o/consreft/lobireft/reft/mrt:length=1"
    "/steer",
}
PIECES = [piece for spec in SPECS.values() for piece in spec.split("/")]
# What redefines a whole matrix comes first on it.
EVERYTHING = "/".join(
    sorted(PIECES, key=lambda p: not getattr(METHODS[p.split(":")[0]], "whole", False))
)
# Methods that are made of the others, or attach nothing.
MADE = {"control", "prefix", "m2pt", "qlora", "partial", "none", "full"}


def abstract(family: str, spec: str, **how) -> MLLM:
    llm = dataclasses.replace(decoder_config(CONFIGS[family].to_dict()), **how)
    config = MLLMConfig(llm=llm, vision=VisionConfig(**TINY_VISION), connector="linear")
    return MLLM(config, spec)


def model_of(family: str, **how) -> MLLM:
    """Random weights, also where tuning starts at zero."""
    model = initialize(abstract(family, SPECS[family], **how))
    rng = np.random.default_rng(1)
    variables = nnx.to_flat_state(nnx.state(model.tuning.params, nnx.Param))
    for _, variable in variables:
        noise = 0.1 * rng.standard_normal(variable.shape).astype(np.float32)
        variable.set_value(variable.get_value() + noise)
    return model


def loss_and_gradients(model: MLLM, mesh=None):
    graphdef, trainable, frozen = split_model(model, ("connector", "llm.norm"))
    batch = tiny_batch(rows=4)

    def loss(trainable, frozen, batch):
        with use_mesh(mesh) if mesh else contextlib.nullcontext():
            return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

    shardings = None
    if mesh:
        shardings = None, parameter_shardings(trainable, mesh)
        trainable, frozen = shard_params(trainable, mesh), shard_params(frozen, mesh)
        batch = jax.device_put(batch, batch_sharding(mesh))
    run = jax.jit(jax.value_and_grad(loss), out_shardings=shardings)
    value, gradients = run(trainable, frozen, batch)
    return float(value), {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(gradients)}


def test_no_method_is_missing_here():
    own = {name for name, x in METHODS.items() if x.__module__.startswith("moresjax.")}
    assert {piece.split(":")[0] for piece in PIECES} | MADE == own


@pytest.mark.parametrize("family", SPECS)
def test_a_mesh_and_rematerialised_layers_change_nothing(family):
    wanted, gradients = loss_and_gradients(model_of(family))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found, same = loss_and_gradients(model_of(family, remat=True), mesh)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert set(gradients) == set(same)
    for path, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), 1.0)
        np.testing.assert_allclose(same[path] / scale, gradient / scale, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("family", CONFIGS)
def test_all_methods_together_fit_every_family(family):
    model, batch = abstract(family, EVERYTHING), tiny_batch()
    shape = jax.eval_shape(lambda model: model(batch, key=jax.random.key(0)).hidden, model)
    assert shape.shape == (*batch.tokens.shape, model.config.llm.hidden_size)


def test_a_step_asks_nothing_of_lapack():
    """Its calls for stacked matrices wait for each other for ever where there are few cores."""
    model = abstract("llama 3", EVERYTHING)
    graphdef, trainable, frozen = split_model(model, ())

    def loss(trainable, frozen):
        return next_token(nnx.merge(graphdef, trainable, frozen), tiny_batch()).total

    program = jax.jit(jax.grad(loss)).trace(trainable, frozen).lower(lowering_platforms=("cpu",))
    assert "lapack" not in program.as_text()
