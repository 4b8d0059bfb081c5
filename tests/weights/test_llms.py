"""LLM families: logits, greedy ids and attention of tiny random `transformers` models, in fp32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import assert_same_logits
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
)

from moresjax.analysis.attention import AttentionMaps
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch, TokenKind
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.inference.model import Model
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.testing.batches import row_layout, stack_layout, tiny_batch
from moresjax.testing.hf_llms import (
    FAMILIES,
    IMAGE_ID,
    LINEAR,
    LLAMA3,
    LOCAL,
    PAD,
    TEXT,
    VOCAB,
    WINDOW,
    gemma2,
    gemma3,
    opt,
    oracle_of,
    padded,
    qwen2,
    randomised,
    stablelm,
    text_rows,
)
from moresjax.testing.models import tiny_model
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import (
    build_mllm,
    config_from_hf,
    import_params,
    load_pretrained,
    model_mappings,
)

NEW = 32
NEVER = (VOCAB + 1,)  # an end token that no row can produce
LENGTHS = (11, 6, 1)  # of the rows: longer than the window, and padded


def run(oracle, ids, mask, **options):
    with torch.no_grad():
        return oracle(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Oracle and our model of a family, which has read the oracle's folder; made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("family")
            oracle = oracle_of(FAMILIES[name])
            oracle.save_pretrained(folder)
            made[name] = oracle, load_pretrained(folder)
        return made[name]

    return get


# Parity


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(saved, name, left):
    oracle, ours = saved(name)
    assert_same_logits(oracle, Model(ours, None), *padded(text_rows(*LENGTHS), left))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids(saved, name):
    oracle, ours = saved(name)
    ids, mask = padded(text_rows(*LENGTHS), left=True)
    with torch.no_grad():
        wanted = oracle.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
        )[:, ids.shape[1] :].numpy()
    assert wanted.shape == (len(LENGTHS), NEW)
    # The prompts of our side are padded on the right: the gap lies between them and the new tokens.
    batch = hf_batch(*padded(text_rows(*LENGTHS), left=False), None, None, 0)
    generation = Engine(ours, eos_ids=NEVER, pad_id=PAD).generate(batch, NEW)
    np.testing.assert_array_equal(generation.tokens, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_imported(saved, name):
    oracle, ours = saved(name)
    sources = model_mappings(ours.config, oracle.config.to_dict())
    used = [tensor for source in sources for tensor in source.names]
    assert len(used) == len(set(used)), "one tensor fills two parameters"
    tied = {"lm_head.weight"} if ours.config.llm.tie_embeddings else set()
    assert set(used) == set(oracle.state_dict()) - tied


LLAVAS = {
    "qwen 2": qwen2(),
    "gemma 2": gemma2(),
    "gemma 3": gemma3(),
    # The wrapper ties its head to a place where OPT has no embedding: it cannot be tied.
    "opt": opt(tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", LLAVAS)
def test_llava_logits(name):
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(text_config=LLAVAS[name], vision_config=tower, image_token_index=IMAGE_ID)
    oracle = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    randomised(oracle)
    hf = oracle.config.to_dict()
    tensors = {n: x.detach().numpy() for n, x in oracle.state_dict().items()}
    ours_config = config_from_hf(hf)
    ours = build_mllm(ours_config, import_params(ours_config, hf, tensors))
    first, second, last = text_rows(3, 4, 5)
    ids, mask = padded([[*first, *[IMAGE_ID] * 4, *second], last], left=True)
    pixels = np.random.default_rng(8).standard_normal((1, 3, 8, 8)).astype(np.float32)
    assert_same_logits(oracle, Model(ours, None), ids, mask, pixels)


# Local layers


def changed(model: MLLM, **llm) -> MLLM:
    """The same weights under another configuration."""
    config = dataclasses.replace(model.config, llm=dataclasses.replace(model.config.llm, **llm))
    new = MLLM(config)
    for name in ("embed", "blocks", "norm", "head", "position"):
        setattr(new.llm, name, getattr(model.llm, name))
    new.llm.blocks = jax.tree.map(lambda x: x, model.llm.blocks)
    return new


def logits_of(model: MLLM, batch: Batch) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, b: m.llm.logits(m(b).hidden))(model, batch))


@pytest.mark.parametrize("name", LOCAL)
def test_local_layers(saved, name):
    config = saved(name)[1].config.llm
    assert (config.window, config.attention_pattern) == (WINDOW, LOCAL[name])
    every = LOCAL[name] * 4
    assert config.local_layers == tuple(c == "l" for c in every[: config.num_layers])


@pytest.mark.parametrize("name", [*LOCAL, "opt"])
def test_scanned_unrolled_and_listed_layers_agree(saved, name):
    model = saved(name)[1]
    batch = hf_batch(*padded(text_rows(*LENGTHS), left=True), None, None, 0)
    scanned = logits_of(model, batch)
    np.testing.assert_allclose(logits_of(changed(model, unroll=True), batch), scanned, atol=2e-5)
    np.testing.assert_allclose(logits_of(changed(model, remat=True), batch), scanned, atol=2e-5)
    listed = changed(model)
    listed.llm.unstack()
    np.testing.assert_allclose(logits_of(listed, batch), scanned, atol=2e-5)
    if name in LOCAL:
        everywhere = logits_of(changed(model, attention_pattern="g"), batch)
        # The window shows from the first query that has more keys before it, and not earlier.
        np.testing.assert_allclose(everywhere[0, :1], scanned[0, :1], atol=2e-5)
        assert np.abs(everywhere[0, WINDOW:] - scanned[0, WINDOW:]).max(-1).min() > 1e-3


def test_packed_documents_have_windows_of_their_own(saved):
    model = saved("mistral")[1]
    rows = text_rows(9, 7)
    apart = [logits_of(model, hf_batch(*padded([row], True), None, None, 0))[0] for row in rows]
    pieces = [(TokenKind.QUESTION, len(row)) for row in rows]
    layout = stack_layout([row_layout(*pieces)], visual=0)
    document = np.repeat([[0, 1]], [9, 7], axis=1).astype(np.int32)
    position = np.concatenate([np.arange(9), np.arange(7)])[None].astype(np.int32)
    tokens = np.asarray([[*rows[0], *rows[1]]], np.int32)
    packed = Batch(tokens, layout.replace(document=document, position=position))
    np.testing.assert_allclose(logits_of(model, packed)[0], np.concatenate(apart), atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma 3", "gemma 2"])
def test_attention_maps_have_window_and_soft_cap(saved, name):
    oracle, ours = saved(name)
    ids, mask = padded(text_rows(*LENGTHS), left=True)
    theirs = run(oracle, ids, mask, output_attentions=True).attentions
    batch, real = hf_batch(ids, mask, None, None, 0), mask.astype(bool)
    queries = np.asarray([[10, 4], [10, 6], [10, 10]])
    for chosen in (None, queries):
        maps = ours(batch, probes=[AttentionMaps()], queries=chosen).stats["maps"]
        for layer, wanted in enumerate(theirs):
            wanted = wanted.mean(1).numpy()
            if chosen is None:
                np.testing.assert_allclose(maps[layer][real], wanted[real], atol=1e-5)
            else:
                wanted = np.take_along_axis(wanted, queries[:, :, None], 1)
                np.testing.assert_allclose(maps[layer], wanted, atol=1e-5)


# Other parts


def test_embeddings_are_scaled_in_the_activations_dtype():
    model = tiny_model(scale_embeddings=True, hidden_size=24, dtype="bfloat16")
    h = model.llm.embeddings(jnp.asarray([[3, 4]]))
    assert h.dtype == jnp.bfloat16
    table = model.llm.embed.table[...][jnp.asarray([[3, 4]])].astype(jnp.bfloat16)
    np.testing.assert_array_equal(h, table * jnp.asarray(24**0.5, jnp.bfloat16))


def test_norms_with_an_offset_start_as_the_identity():
    llm = tiny_model(norm_offset=1.0, qk_norm=True, post_norms=True).llm
    for norm in (llm.norm, llm.blocks.attn.q_norm, llm.blocks.mlp_post_norm):
        assert not np.any(norm.scale[...])


def test_learned_positions_are_limited():
    model = tiny_model(positions="learned", max_positions=8)
    with pytest.raises(UserError, match=r"18 tokens do not fit the model's 8 positions"):
        model(tiny_batch())


# Errors


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (qwen2(), {"hidden_act": "tanhshrink"}, "hidden_act=tanhshrink.*silu"),
        (opt(), {"activation_function": "mish"}, "activation_function=mish.*relu"),
        (
            LlamaConfig(**TEXT),
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope scaling 'yarn'.*linear, llama3",
        ),
        (
            LlamaConfig(**TEXT),
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic'",
        ),
        (
            gemma3(),
            {"rope_parameters": {"full_attention": {}, "sliding_attention": LINEAR}},
            "rope scaling 'linear'.*default",
        ),
        (qwen2(), {"layer_types": ["chunked_attention"] * 3}, "layer type 'chunked_attention'"),
        (gemma2(), {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (stablelm(), {"qk_layernorm": True}, "stablelm in config.json: qk_layernorm=True"),
        (PhiConfig(**TEXT), {"qk_layernorm": True}, "phi in config.json: qk_layernorm=True"),
        (opt(), {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16.*hidden_size=32"),
        (opt(), {"do_layer_norm_before": False}, "opt in config.json: do_layer_norm_before=False"),
        (opt(), {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        (opt(), {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        (qwen2(), {"model_type": "rwkv"}, "LLM family 'rwkv'.*opt.*qwen3"),
    ],
)
def test_unsupported(config, changes, message):
    with pytest.raises(UserError, match=message):
        decoder_config(config.to_dict() | changes)


def test_rope_scaling_of_transformers_4():
    hf = LlamaConfig(**TEXT).to_dict() | {"rope_parameters": None, "rope_theta": 100.0}
    old = {k: x for k, x in LLAMA3.items() if k != "rope_theta"}
    config = decoder_config(hf | {"rope_scaling": old})
    assert config == decoder_config(LlamaConfig(**TEXT, rope_parameters=LLAMA3).to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_pattern": "lx", "window": 4}, "attention_pattern 'lx'"),
        ({"attention_pattern": "l"}, "window of at least 1, got 0"),
        ({"attention_pattern": ""}, "attention_pattern ''"),
        ({"positions": "alibi"}, "positions 'alibi'.*rope, learned"),
        ({"rope_scaling": "yarn"}, "rope scaling 'yarn'.*llama3"),
    ],
)
def test_configurations_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        initialize(tiny_model(**changes))
