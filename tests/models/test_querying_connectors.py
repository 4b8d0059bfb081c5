"""Resampler and Q-Former: the definition written with torch, and `transformers`."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from linkers import TINY_QFORMER, TINY_RESAMPLER, TOLERANCE, features, parameters, randomised
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from moresjax.models.connector import build_connector, parse_connector


@pytest.mark.parametrize("unroll", [False, True])
def test_resampler(unroll):
    """Against the definition written with torch, one layer after the other."""
    kind, config = parse_connector(TINY_RESAMPLER)
    assert (kind, config.latents, config.expansion) == ("resampler", 5, 4)
    connector = randomised(build_connector(TINY_RESAMPLER, 6, 10, unroll=unroll))
    p = {k: torch.tensor(x) for k, x in parameters(connector).items()}
    x = torch.tensor(features()) @ p["projection.kernel"] + p["projection.bias"]
    h = p["latents"].expand(3, 5, 10)

    def norm(y, name, layer=...):
        return F.layer_norm(y, (10,), p[f"{name}.scale"][layer], p[f"{name}.bias"][layer], 1e-5)

    for i in range(2):
        kernel = {n: p[f"blocks.{n}.kernel"][i] for n in ("q", "k", "v", "o", "up", "down")}
        latents = norm(h, "blocks.latent_norm", i)
        seen = torch.cat([norm(x, "blocks.feature_norm", i), latents], 1)
        q, k, v = (
            (y @ kernel[n]).unflatten(-1, (2, 4)).transpose(1, 2)
            for n, y in (("q", latents), ("k", seen), ("v", seen))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + y @ kernel["o"]
        h = h + F.gelu(norm(h, "blocks.mlp_norm", i) @ kernel["up"]) @ kernel["down"]
    expected = norm(h, "norm")
    ours = connector(jnp.asarray(features()))
    assert ours.shape == (3, 5, 10)
    assert expected.std() > 0.2
    assert np.abs(np.asarray(ours) - expected.numpy()).max() <= TOLERANCE


# Our module -> that of transformers, below a layer
QFORMER_NAMES = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.o": "attention.output.dense",
    "attn.norm": "attention.output.LayerNorm",
    "cross.q": "crossattention.attention.query",
    "cross.k": "crossattention.attention.key",
    "cross.v": "crossattention.attention.value",
    "cross.o": "crossattention.output.dense",
    "cross.norm": "crossattention.output.LayerNorm",
    "up": "intermediate_query.dense",
    "down": "output_query.dense",
    "norm": "output_query.LayerNorm",
}


def qformer_state(ours: dict[str, np.ndarray], every: int) -> dict[str, torch.Tensor]:
    """Our parameters as a state dict of `Blip2QFormerModel`."""
    state = {}
    for name, x in ours.items():
        *_, leaf = name.split(".")
        end = "bias" if leaf == "bias" else "weight"
        x = torch.tensor(np.swapaxes(x, -1, -2).copy() if leaf == "kernel" else x)
        if m := re.fullmatch(r"blocks\.layers\.(\d+)\.(.*)\.\w+", name):
            for group, part in enumerate(x):
                layer = group * every + int(m[1])
                state[f"encoder.layer.{layer}.{QFORMER_NAMES[m[2]]}.{end}"] = part
        elif name.startswith("norm."):
            state[f"layernorm.{end}"] = x
    return state


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_qformer(every, unroll):
    name = f"{TINY_QFORMER},cross_every={every}"
    connector = randomised(build_connector(name, 6, 10, unroll=unroll))
    config = Blip2QFormerConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=12,
        encoder_hidden_size=6,
        cross_attention_frequency=every,
    )
    oracle = Blip2QFormerModel(config).eval()
    p = parameters(connector)
    oracle.load_state_dict(qformer_state(p, every), strict=True)
    with torch.no_grad():
        queries = torch.tensor(p["latents"]).expand(3, 5, 8)
        y = oracle(query_embeds=queries, encoder_hidden_states=torch.tensor(features()))
    expected = y.last_hidden_state.numpy() @ p["projection.kernel"] + p["projection.bias"]
    ours = np.asarray(connector(jnp.asarray(features())))
    assert ours.shape == (3, 5, 10)
    assert np.ptp(expected, axis=0).max() > 0.05, "the features do not matter"
    assert np.abs(ours - expected).max() <= TOLERANCE
