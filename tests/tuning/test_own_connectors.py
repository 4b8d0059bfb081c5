"""Rows of a batch with connectors of their own, of every kind that there is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_config
from moresjax.tuning.multi_adapter import adapter_ids
from moresjax.weights.adapter import load_adapter, load_adapters, save_adapter

KINDS = (
    "linear",
    "mlp3x_gelu",
    "norm-mlp2x_gelu",
    "resampler:latents=4,layers=1,heads=2,head_dim=4",
    "qformer:latents=4,layers=2,width=8,heads=2,mlp=8",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_the_visual_tokens_of_its_adapters_connector(kind, tmp_path):
    config = dataclasses.replace(tiny_config(), connector=kind)
    base = initialize(MLLM(config, "lora:rank=1,targets=q"))
    for number, name in enumerate(("a", "b"), 1):
        own = nnx.clone(base)
        state = jax.tree.map(lambda x, n=number: x + 0.1 * n, nnx.state(own.connector, nnx.Param))
        nnx.update(own.connector, state)
        save_adapter(own, tmp_path / name, also_train=("connector",))
    batch = tiny_batch(rows=4, images=2, answer=0)

    @nnx.jit
    def features(model, batch):
        hooks = model.tuning.hooks(batch)
        return model.visual_features(jnp.asarray(batch.pixels), hooks, batch)

    found = {}
    for name in ("a", "b", None):
        single = nnx.clone(base)
        if name:
            load_adapter(single, tmp_path / name)
        found[name] = np.asarray(features(single, batch))
    together = nnx.clone(base)
    load_adapters(together, {name: tmp_path / name for name in ("a", "b")})
    rows = ["b", None, "a", "b"]
    chosen = dataclasses.replace(batch, adapter=adapter_ids(together.tuning, rows, 4))
    got = np.asarray(features(together, chosen))
    for row, name in enumerate(rows):
        np.testing.assert_allclose(got[row], found[name][row], atol=1e-5, err_msg=str(name))
    assert np.abs(found["a"] - found["b"]).max() > 1e-3
    assert np.abs(found["a"] - found[None]).max() > 1e-3
