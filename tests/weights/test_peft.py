"""Adapter folders of `peft`: its random adapters give its logits here, and ours there."""

import json
import re

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import matches, named_parameters
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.inference.model import Model
from moresjax.testing.hf_adapters import IMAGE_ID, TEXT, VOCAB, AdaptedModel, adapted_llava
from moresjax.testing.hf_llms import FAMILIES, gemma3, oracle_of, padded, text_rows
from moresjax.tuning.methods.vera import VeRA
from moresjax.weights.hf import load_pretrained
from moresjax.weights.peft import export_peft, import_peft

QKV = ["q_proj", "k_proj", "v_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
ADAPTERS = {
    "lora:rank=3,alpha=7.0,rslora=true,targets=q;k;v": peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=QKV
    ),
    "lora:layers=1,rank=2,alpha=8.0,targets=up": peft.LoraConfig(
        r=2, target_modules=["up_proj"], layers_to_transform=[1]
    ),
    "dora:rank=3,alpha=8.0,targets=q;up": peft.LoraConfig(
        r=3, use_dora=True, target_modules=["q_proj", "up_proj"]
    ),
    "ia3:targets=k;down": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft:block_size=4": peft.OFTConfig(oft_block_size=4, target_modules=QKV),
    "oft:block_size=2,cayley=exact": peft.OFTConfig(
        r=8, oft_block_size=0, use_cayley_neumann=False, target_modules=QKV
    ),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "vera:rank=5,seed=3,targets=q;down": peft.VeraConfig(
        r=5, projection_prng_key=3, target_modules=["q_proj", "down_proj"]
    ),
    "ln": peft.LNTuningConfig(target_modules=NORMS),
}


@pytest.fixture(scope="module")
def llama():
    return AdaptedModel(LlamaForCausalLM, LlamaConfig(**TEXT))


@pytest.fixture(scope="module")
def phi():
    text = {k: x for k, x in TEXT.items() if k != "num_key_value_heads"}
    return AdaptedModel(PhiForCausalLM, PhiConfig(**text))


@pytest.fixture(scope="module")
def llava():
    return adapted_llava()


def check_both_directions(base, config, spec, tmp_path):
    theirs = base.adapted(config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = base.their_logits(theirs)
    assert np.abs(expected - base.their_logits(base.oracle)).max() > 1e-2
    model = base.ours()
    assert import_peft(tmp_path / "theirs", model) == spec
    assert model.tuning.spec == spec
    np.testing.assert_allclose(base.our_logits(model), expected, atol=1e-5)
    model.llm.unstack()  # as after generating
    again = base.from_folder(export_peft(model, tmp_path / "ours"))
    np.testing.assert_allclose(base.their_logits(again), expected, atol=1e-5)
    return model


@pytest.mark.parametrize("spec", ADAPTERS)
def test_an_adapter_gives_the_same_logits_in_both_directions(llama, spec, tmp_path):
    check_both_directions(llama, ADAPTERS[spec], spec, tmp_path)


def test_lora_on_all_linears_of_phi(phi, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    check_both_directions(phi, config, "lora:rank=2,alpha=4.0", tmp_path)


def test_all_norms_of_gemma_3_in_both_directions(tmp_path):
    base = AdaptedModel(Gemma3ForCausalLM, gemma3(vocab_size=VOCAB, pad_token_id=0))
    config = peft.LNTuningConfig(target_modules=r".*norm")
    check_both_directions(base, config, "ln:targets=all;k_norm;q_norm", tmp_path)


@pytest.mark.parametrize(
    ("name", "spec", "count"),
    [("gemma 2", "ln", 5), ("gemma 3", "ln", 5), ("gemma 3", "ln:targets=all;k_norm;q_norm", 7)],
)
def test_norms_that_trained_on_a_bf16_folder_go_out_and_come_back(name, spec, count, tmp_path):
    """Scales of Gemma are added to one; trained ones are fp32 beside weights in bf16."""
    oracle_of(FAMILIES[name]).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", spec)
    trains = [pattern for _, method in model.tuning.methods for pattern in method.trains]
    rng, rows = np.random.default_rng(0), padded(text_rows(9, 5), left=True)
    named = named_parameters(model).items()
    scales = [x for path, x in named if any(matches(path, pattern) for pattern in trains)]
    assert len(scales) == count
    for scale in scales:
        moved = np.asarray(scale.get_value(), np.float32)
        scale.set_value(jnp.asarray(moved + 0.2 * rng.standard_normal(moved.shape, np.float32)))
    ids, mask = rows

    def logits(model):
        return np.asarray(Model(model, None).logits(input_ids=ids, attention_mask=mask))[mask > 0]

    expected = logits(model)
    assert np.abs(expected - logits(load_pretrained(tmp_path / "base"))).max() > 1
    export_peft(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    np.testing.assert_allclose(out.numpy()[mask > 0], expected, atol=1e-5)
    again = load_pretrained(tmp_path / "base")
    import_peft(tmp_path / "adapter", again)
    np.testing.assert_array_equal(logits(again), expected)


def test_saved_embeddings_of_a_model_that_ties_its_head(tmp_path):
    base = AdaptedModel(LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    base.adapted(config).save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="embeddings and a head of different values"):
        import_peft(tmp_path / "untied", base.ours())
    config.ensure_weight_tying = True
    spec = "lora:rank=2,alpha=8.0,targets=q/partial:train=embed"
    check_both_directions(base, config, spec, tmp_path)


def test_lora_on_a_llava_with_its_connector_leaves_the_vision_tower_alone(llava, tmp_path):
    pattern = r".*language_model.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=2, target_modules=pattern, modules_to_save=["multi_modal_projector"])
    theirs = llava.adapted(config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = llava.their_logits(theirs)
    model = llava.ours()
    assert import_peft(tmp_path / "theirs", model) == (
        "lora:rank=2,alpha=8.0,targets=q;v/partial:train=connector"
    )
    np.testing.assert_allclose(llava.our_logits(model), expected, atol=1e-5)
    again = llava.from_folder(export_peft(model, tmp_path / "ours"))
    np.testing.assert_allclose(llava.their_logits(again), expected, atol=1e-5)
    assert not [n for n, _ in again.named_parameters() if "vision" in n and "lora" in n]

    # Adapters written before transformers 4.52 have the module levels the other way round.
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    old = {
        re.sub("model.language_model.", "language_model.model.", n): x
        for n, x in load_file(file).items()
    }
    assert old.keys() != load_file(file).keys()
    save_file(old, file)
    model = llava.ours()
    import_peft(tmp_path / "theirs", model)
    np.testing.assert_allclose(llava.our_logits(model), expected, atol=1e-5)


def test_the_projections_of_vera_are_those_that_peft_makes_of_the_seed(llama, tmp_path):
    config = peft.VeraConfig(r=5, projection_prng_key=3, target_modules=["q_proj", "down_proj"])
    theirs = llama.adapted(config)
    shared = VeRA(rank=5, seed=3, targets="q;down").shared(llama.config)
    np.testing.assert_array_equal(shared["a"].T, theirs.base_model.vera_A["default"].numpy())
    np.testing.assert_array_equal(shared["b"].T, theirs.base_model.vera_B["default"].numpy())


SLOTS = {
    "prompt:length=3": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix:length=3": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("spec", SLOTS)
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_slots_give_the_same_logits_in_both_directions(family, spec, tmp_path, request):
    base = request.getfixturevalue(family)
    theirs = base.adapted(SLOTS[spec])
    theirs.save_pretrained(tmp_path / "theirs")
    length = base.inputs["input_ids"].shape[1]
    expected = base.their_logits(theirs)[:, -length:]  # prompt tuning gives its own tokens' too
    assert np.abs(expected - base.their_logits(base.oracle)).max() > 1e-2
    model = base.ours()
    assert import_peft(tmp_path / "theirs", model) == spec
    np.testing.assert_allclose(base.our_logits(model), expected, atol=1e-5)
    again = base.from_folder(export_peft(model, tmp_path / "ours"))
    np.testing.assert_allclose(base.their_logits(again)[:, -length:], expected, atol=1e-5)


def greedy(model: torch.nn.Module, ids: np.ndarray, count: int) -> list[int]:
    """Greedy tokens, each from a forward pass over the whole row: `generate` of transformers 5.24
    ignores the keys and values that peft 0.21 hands it."""
    row = torch.tensor(ids[None])
    with torch.no_grad():
        for _ in range(count):
            following = model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)
            row = torch.cat([row, following], dim=1)
    return row[0, -count:].tolist()


@pytest.mark.parametrize("left", [False, True])
def test_slots_generate_what_peft_generates(llama, left, tmp_path):
    """Rows of different lengths, padded; the learned keys are before the padding."""
    model = llama.ours()
    model.attach("prefix:length=3", seed=1)
    for variable in model.tuning.params["prefix"]["llm.block.kv"].values():
        variable[...] = 40 * variable[...]
    theirs = llama.from_folder(export_peft(model, tmp_path / "ours"))
    ids, mask = llama.inputs["input_ids"].copy(), np.ones((2, 7), int)
    empty = slice(0, 2) if left else slice(5, 7)
    ids[1, empty], mask[1, empty] = 0, 0
    expected = [
        greedy(theirs, row[keep.astype(bool)], 5) for row, keep in zip(ids, mask, strict=True)
    ]
    batch = hf_batch(ids, mask, None, IMAGE_ID, 0)
    assert Engine(model, eos_ids=(VOCAB,)).generate(batch, 5).tokens.tolist() == expected


def write(folder, config, arrays):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "adapter_model.safetensors")


def test_what_would_load_as_something_else_is_refused(llama, tmp_path):
    model = llama.ours()
    model.attach("lora:rank=2,targets=q")
    folder = export_peft(model, tmp_path / "good")
    good = json.loads((folder / "adapter_config.json").read_text())
    arrays = load_file(folder / "adapter_model.safetensors")
    name, wide = next(iter(arrays)), np.zeros((2, 17), np.float32)
    prompt, prefix = ({"peft_type": kind} for kind in ("PROMPT_TUNING", "PREFIX_TUNING"))
    cases = [
        (good | {"peft_type": "LOHA"}, arrays, r"unknown peft_type 'LOHA'.*LORA.*LN_TUNING"),
        (good | {"lora_bias": True}, arrays, r"lora_bias=True is not supported"),
        (good | {"new_lora": 4}, arrays, r"LORA in .*: the setting new_lora=4 is not known"),
        (good | {"use_dora": True}, arrays, r"lacks tensors \(2\).*lora_magnitude_vector"),
        (
            good,
            arrays | {"base_model.model.lm_head.lora_A.weight": arrays[name]},
            r"unknown .*lm_head",
        ),
        (prompt, {"prompt_embeddings": wide}, r"\(2, 17\), the model needs \(length, 16\)"),
        (prefix, {"prompt_embeddings": wide}, r"\(2, 17\), the model needs \(length, 32\)"),
        (prefix, {"embeddings": wide}, r"lacks tensors \(1\): prompt_embeddings"),
        (good, {n: x for n, x in arrays.items() if n != name}, r"lacks tensors \(1\).*lora_A"),
        (
            good,
            arrays | {name: arrays[name][:1]},
            r"has shape \(1, 16\), the model needs \(2, 16\)",
        ),
    ]
    model.attach("oft:block_size=4")
    folder = export_peft(model, tmp_path / "oft")
    turned = json.loads((folder / "adapter_config.json").read_text())
    vectors = load_file(folder / "adapter_model.safetensors")
    second = {n.replace("oft_R.weight", "oft_r"): x for n, x in vectors.items()}
    cases += [
        (turned | {"peft_version": "0.17.1"}, vectors, r"OFT is of peft 0\.17\.1"),
        (turned | {"coft": True}, vectors, r"coft=True is not supported"),
        (turned, second, r"no oft of this model, only: .*oft_r"),
    ]
    for config, tensors, message in cases:
        write(tmp_path / "bad", config, tensors)
        with pytest.raises(UserError, match=message):
            import_peft(tmp_path / "bad", model)
        assert model.tuning.spec == "oft:block_size=4"
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        import_peft(tmp_path, model)


def test_only_one_method_that_peft_knows_is_exported(llama, tmp_path):
    model = llama.ours()
    for spec, message in (
        ("ia3:targets=q/lora:targets=k", "peft holds one method"),
        ("ia3:targets=q/ia3:targets=q;k", "peft holds one method"),
        ("oft:block_size=4,targets=q/oft:block_size=2,targets=k", "has the same settings for all"),
        ("mixlora:targets=q", r"unknown method for peft 'mixlora'.*lora.*vera.*ln"),
        ("oft-legacy:blocks=2", r"unknown method for peft 'oft-legacy'"),
    ):
        model.attach(spec)
        with pytest.raises(UserError, match=message):
            export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
