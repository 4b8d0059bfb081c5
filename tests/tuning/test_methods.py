"""LoRA, IA3, full and prompt tuning against `peft`, against merging, and combined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind, TokenLayout
from moresjax.models.mllm import MLLM
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import TINY_LLM, tiny_config, tiny_model
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.tuning.merge import merged
from moresjax.weights.hf import build_mllm, import_params, pretrained_config

PEFT_NAMES = {"attn": "self_attn", "mlp": "mlp"}
MODULES = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp"}
MODULES |= {"down": "mlp"}


def randomize(model: MLLM, seed: int = 1, scale: float = 0.3) -> MLLM:
    """Adds noise to every tuning parameter, so that no start value hides a mistake."""
    rng = np.random.default_rng(seed)
    flat = nnx.to_flat_state(nnx.state(model.tuning.params))
    new = [
        (p, v.replace(v.get_value() + scale * rng.standard_normal(v.shape).astype(np.float32)))
        for p, v in flat
    ]
    nnx.update(model.tuning.params, nnx.from_flat_state(new))
    return model


def logits(model, batch) -> np.ndarray:
    return np.asarray(model.llm.logits(model(batch).hidden))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    shape = {
        "vocab_size": TINY_LLM["vocab_size"],
        "hidden_size": TINY_LLM["hidden_size"],
        "intermediate_size": TINY_LLM["intermediate_size"],
        "num_hidden_layers": TINY_LLM["num_layers"],
        "num_attention_heads": TINY_LLM["num_heads"],
        "num_key_value_heads": TINY_LLM["num_kv_heads"],
    }
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def ours_and_peft(llama, tmp_path, spec: str, peft_config):
    """Our model and peft's with the same tuned weights, and their logits on the same tokens."""
    import copy

    from peft import get_peft_model

    llama.save_pretrained(tmp_path)
    tensors = {name: x.numpy() for name, x in llama.state_dict().items()}
    config, hf = pretrained_config(tmp_path), llama.config.to_dict()
    model = build_mllm(config, import_params(config, hf, tensors), spec)
    randomize(model)
    theirs = get_peft_model(copy.deepcopy(llama), peft_config).eval()
    state = dict(theirs.named_parameters())
    key = model.tuning.methods[0][0]
    used = set()
    for site, variables in model.tuning.params[key].items():
        linear = site.split(".")[-1]
        for leaf, x in variables.items():
            for layer, value in enumerate(np.asarray(x[...])):
                module = f"layers.{layer}.{PEFT_NAMES[MODULES[linear]]}.{linear}_proj"
                name = (
                    f"base_model.model.model.{module}."
                    + {
                        "a": "lora_A.default.weight",
                        "b": "lora_B.default.weight",
                        "scale_in": "ia3_l.default",
                        "scale_out": "ia3_l.default",
                    }[leaf]
                )
                value = torch.tensor(value.T if leaf in "ab" else value)
                state[name].data.copy_(value.reshape(state[name].shape))
                used.add(name)
    assert used == {name for name in state if "lora" in name or "ia3" in name}
    ids = np.random.default_rng(0).integers(0, 29, (2, 7))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    batch = Batch(jnp.asarray(ids), TokenLayout.text(np.ones_like(ids, bool)))
    return logits(model, batch), expected


def test_lora_equals_peft(llama, tmp_path):
    from peft import LoraConfig

    peft = LoraConfig(r=3, lora_alpha=7, target_modules=[f"{m}_proj" for m in MODULES])
    ours, theirs = ours_and_peft(llama, tmp_path, "lora:rank=3,alpha=7", peft)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_ia3_equals_peft(llama, tmp_path):
    from peft import IA3Config

    peft = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    ours, theirs = ours_and_peft(llama, tmp_path, "ia3", peft)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("spec", ["lora:rank=2", "ia3", "prompt:length=3"])
def test_a_fresh_method_starts_where_the_base_model_is(spec):
    batch = tiny_batch()
    model, base = tiny_model(spec), logits(tiny_model(), batch)
    if spec.startswith("prompt"):
        # A prompt is there from the first step on; it is the only one that changes anything.
        assert np.abs(logits(model, batch) - base).max() > 1e-4
    else:
        np.testing.assert_array_equal(logits(model, batch), base)


@pytest.mark.parametrize(
    "spec",
    [
        "lora:rank=2",
        "lora:rank=2,targets=q;down,layers=1",
        "lora:rank=2,targets=vision.q;vision.up;v",
        "ia3",
        "ia3:targets=q;up;down,layers=0;2",
        "ia3/lora:rank=2",
        "mores:rank=1/lora:rank=2",
    ],
)
@pytest.mark.parametrize("biases", [False, True])
def test_merged_weights_give_the_same_logits(spec, biases):
    batch = tiny_batch()
    llm = {"qkv_bias": True, "out_bias": True, "mlp_bias": True} if biases else {}
    model = randomize(tiny_model(spec, **llm))
    folded = merged(model)
    assert [m.name for _, m in folded.tuning.methods] == (["mores"] if "mores" in spec else [])
    np.testing.assert_allclose(logits(folded, batch), logits(model, batch), atol=2e-5)
    base = logits(tiny_model(**llm), batch)
    assert np.abs(logits(folded, batch) - base).max() > 1e-3
    # Merging works on a copy.
    assert len(model.tuning.methods) == 1 + spec.count("/")


def test_switched_off_layers_of_a_weight_delta_are_neutral_and_learn_nothing():
    batch = tiny_batch()
    model = randomize(tiny_model("lora:rank=2,targets=q,layers=1"))
    graphdef, trainable, frozen = split_model(model, ())

    def loss(trainable):
        return next_token(nnx.merge(graphdef, trainable, frozen), batch).total

    found = jax.grad(loss)(trainable)["tuning"]["params"]["lora"]["llm.block.q"]
    for leaf in found.values():
        gradient = np.asarray(leaf[...])
        assert (gradient[[0, 2]] == 0).all()
        assert np.abs(gradient[1]).max() > 0


def test_dropout_acts_in_training_only():
    batch = tiny_batch()
    model = randomize(tiny_model("lora:rank=2,dropout=0.5"))
    same = [np.asarray(model(batch).hidden) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
    a, b, c = (np.asarray(model(batch, key=key).hidden) for key in keys)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


def test_a_prompt_is_tokens_put_before_every_row():
    """The learned tokens act like words with those embeddings at the start of the row."""
    model = randomize(tiny_model("prompt:length=3"))
    batch = tiny_batch(images=0, rows=2)
    got = logits(model, batch)
    base = tiny_model()
    content = np.asarray(model.tuning.params["prompt"]["llm.embed"]["embedding"][...])
    table = np.asarray(base.llm.embed.table[...])
    # Spell the prompt with three words that the rows do not use.
    spare = [t for t in range(29) if t not in np.asarray(batch.tokens)][:3]
    table = table.copy()
    table[spare] = content
    base.llm.embed.table[...] = jnp.asarray(table)
    valid = np.asarray(batch.layout.kind) != TokenKind.PAD
    first = np.broadcast_to(np.asarray(spare), (2, 3))
    tokens = np.concatenate([first, np.asarray(batch.tokens)], axis=1).astype(np.int32)
    whole = np.concatenate([np.ones((2, 3), bool), valid], axis=1)
    expected = logits(base, Batch(tokens, TokenLayout.text(whole)))[:, 3:]
    np.testing.assert_allclose(got[valid], expected[valid], atol=1e-5)


def test_full_trains_the_llm_and_leaves_the_vision_encoder():
    model = tiny_model("full")
    _, trainable, frozen = split_model(model, ("connector",))
    assert {str(path[0]) for path, _ in nnx.to_flat_state(trainable)} == {"llm", "connector"}
    assert {str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(frozen, nnx.Param))} == {
        "vision"
    }


def test_an_edit_outside_the_llm_leaves_text_only_input_alone():
    batch = tiny_batch(images=0)
    for site in ("connector.out", "vision.block.out"):
        model = tiny_model(f"mores:site={site},positions=image:f2")
        np.testing.assert_array_equal(logits(model, batch), logits(tiny_model(), batch))


@pytest.mark.parametrize("site", ["connector.out", "llm.embed.out", "vision.block.out"])
def test_edits_outside_the_decoder_blocks_change_the_visual_tokens_only(site):
    batch = tiny_batch()
    model = tiny_model(f"mores:site={site},positions=image:f2")
    base = tiny_model()
    before = base.embed(batch, base.tuning.hooks(batch))
    hooks = model.tuning.hooks(batch)
    after = hooks.edit("llm.embed.out", model.embed(batch, hooks))
    changed = np.abs(np.asarray(after) - np.asarray(before)).max(-1) > 1e-6
    image = np.asarray(batch.layout.kind) == TokenKind.IMAGE
    assert changed.any()
    assert not changed[~image].any()
    if site != "vision.block.out":  # inside the encoder, attention spreads the edit
        assert changed.sum() == 4


def test_a_model_without_vision_refuses_vision_sites():
    from dataclasses import replace

    config = replace(tiny_config(), vision=None)
    with pytest.raises(UserError, match="needs a vision encoder"):
        MLLM(config, "mores:site=connector.out")
