"""Adapters of `peft` on a whole LLaVA: lists of targets, patterns, uneven layers, saved modules."""

import dataclasses
import json
import re

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from moresjax.core.errors import UserError
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.models.vision import EVA, VisionConfig
from moresjax.testing.hf_adapters import adapted_llava
from moresjax.testing.models import tiny_config
from moresjax.weights.adapter import load_adapter, save_adapter
from moresjax.weights.peft import export_peft, import_peft
from moresjax.weights.peft_keys import KEYS

QV = ["q_proj", "v_proj"]
ALL = "all;vision.all;connector.all"
ADAPTERS = {
    f"dora:rank=2,alpha=8.0,targets={ALL}/partial:train=biases": peft.LoraConfig(
        r=2, use_dora=True, target_modules="all-linear", bias="all", fan_in_fan_out=True
    ),
    # In one of two layers q and v have rank 1, so that they are filled up.
    "lora:rank=4,alpha=32.0,rslora=true,targets=q;v/lora:rank=4,alpha=8.0,rslora=true,"
    "targets=vision.q;vision.v/lora:rank=3,alpha=5.0,rslora=true,targets=connector.0": (
        peft.LoraConfig(
            r=4,
            use_rslora=True,
            target_modules=[*QV, "linear_1"],
            rank_pattern={"linear_1": 3, r"language_model.layers.0.self_attn.\w_proj": 1},
            alpha_pattern={"linear_1": 5, r"language_model.*proj": 16},
            init_lora_weights="eva",
        )
    ),
    "lora:layers=0,rank=2,alpha=8.0,targets=q/lora:layers=1,rank=2,alpha=8.0,targets=v;up/"
    "lora:rank=2,alpha=8.0,targets=vision.down/partial:train=biases": peft.LoraConfig(
        r=2,
        bias="lora_only",
        target_modules=r".*language.*\.0\..*q_proj|.*language.*\.1\..*(v|up)_proj|.*fc2",
    ),
    "lora:layers=1,rank=2,alpha=8.0,targets=q;v;vision.q;vision.v/"
    "partial:train=connector;lm_head;embed": peft.LoraConfig(
        r=2,
        target_modules=QV,
        layers_to_transform=[1],
        modules_to_save=["multi_modal_projector", "lm_head", "embed_tokens"],
    ),
    "ia3:targets=k;down/ia3:targets=connector.1,inputs=1/partial:train=vision": peft.IA3Config(
        target_modules=r".*language_model.*(k_proj|down_proj)|.*linear_2",
        feedforward_modules=r".*down_proj|.*linear_2",
        modules_to_save=["embeddings", "layer_norm1"],
    ),
    "vera:rank=3,targets=q;vision.q;connector.0": peft.VeraConfig(
        r=3, target_modules=["q_proj", "linear_1"]
    ),
    "partial:train=connector/ln:targets=attn_norm;norm;vision.attn_norm;vision.pre_norm": (
        peft.LNTuningConfig(
            target_modules=["input_layernorm", "norm", "layer_norm1", "pre_layrnorm"],
            modules_to_save=["multi_modal_projector"],
        )
    ),
    "lora:rank=4,alpha=6.0,targets=q;vision.q": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa"
    ),
    "lora:rank=4,alpha=14.0,targets=up;connector.1/lora:rank=2,alpha=8.0,targets=down": (
        peft.LoraConfig(
            r=2,
            lora_alpha=7,
            target_modules=["up_proj", "down_proj", "linear_2"],
            rank_pattern={"down_proj": 1},
            alpha_pattern={"down_proj": 4},
            init_lora_weights="olora",
        )
    ),
}


@pytest.fixture(scope="module")
def llava():
    return adapted_llava()


@pytest.mark.parametrize("spec", ADAPTERS)
def test_an_adapter_of_a_llava_gives_the_same_logits_in_both_directions(llava, spec, tmp_path):
    config = ADAPTERS[spec]
    theirs = llava.adapted(config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = llava.their_logits(theirs)
    assert np.abs(expected - llava.their_logits(llava.oracle)).max() > 1e-2
    model = llava.ours()
    assert import_peft(tmp_path / "theirs", model) == spec
    np.testing.assert_allclose(llava.our_logits(model), expected, atol=2e-5)
    again = llava.from_folder(export_peft(model, tmp_path / "ours"))
    np.testing.assert_allclose(llava.their_logits(again), expected, atol=2e-5)
    # Our own folder of it belongs to the base as it was.
    copy = llava.ours()
    load_adapter(copy, save_adapter(model, tmp_path / "own"))
    np.testing.assert_array_equal(llava.our_logits(copy), llava.our_logits(model))


def test_names_of_older_releases_choose_ranks_and_scales_too(llava, tmp_path):
    """Files, patterns and modules to save as transformers had them before 4.52."""
    config = peft.LoraConfig(
        r=2,
        target_modules=QV,
        rank_pattern={"model.language_model.layers.1.self_attn.q_proj": 3},
        alpha_pattern={"model.vision_tower.encoder.layers.0.self_attn.v_proj": 20},
        modules_to_save=["multi_modal_projector"],
    )
    theirs = llava.adapted(config)
    theirs.save_pretrained(tmp_path)
    new = {
        r"model\.language_model\.": "language_model.model.",
        r"model\.vision_tower\.": "vision_tower.vision_model.",
        r"model\.multi_modal": "multi_modal",
    }

    def old(name: str) -> str:
        for pattern, replacement in new.items():
            name = re.sub(pattern, replacement, name)
        return name

    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({old(name): x for name, x in load_file(file).items()}, file)
    settings.write_text(old(settings.read_text()))
    assert "vision_tower.vision_model.encoder.layers.0" in settings.read_text()
    model = llava.ours()
    import_peft(tmp_path, model)
    np.testing.assert_allclose(llava.our_logits(model), llava.their_logits(theirs), atol=2e-5)


@pytest.fixture(scope="module")
def plain(llava, tmp_path_factory):
    """Settings and tensors of a LoRA on three parts with a saved head."""
    folder = tmp_path_factory.mktemp("plain")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "linear_1"], modules_to_save=["lm_head"]
    )
    llava.adapted(config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    return settings, load_file(folder / "adapter_model.safetensors")


def write(folder, settings, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_scale_of_zero_is_zero(llava, plain, tmp_path):
    settings, tensors = plain
    settings = settings | {"lora_alpha": 0, "modules_to_save": None}
    write(tmp_path, settings, {n: x for n, x in tensors.items() if "lora" in n})
    model = llava.ours()
    assert import_peft(tmp_path, model) == ("lora:rank=2,alpha=0.0,targets=q;vision.q;connector.0")
    expected = llava.their_logits(llava.oracle)
    np.testing.assert_allclose(llava.our_logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "left_out", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "", r"'pissa_niter_4' .* by random numbers"),
        ({"init_lora_weights": "corda"}, "", r"by statistics .* path_initial_model_for_weight"),
        ({"init_lora_weights": "lora_ga"}, "", r"by gradients on data"),
        ({"init_lora_weights": "loftq"}, "", r"by a quantization"),
        ({"init_lora_weights": "new"}, "", r"unknown init_lora_weights in .* 'new'"),
        ({"lora_bias": True}, "", r"LORA in .*config\.json: lora_bias=True is not supported"),
        ({"target_parameters": ["x"]}, "", r"target_parameters=\['x'\] is not supported"),
        ({"surprise": 3}, "", r"surprise=3 is not known"),
        ({}, "layers.1.self_attn.q_proj", r"lacks tensors \(2\): model\.language.*\.1.*q_proj"),
        ({}, "lm_head", r"lacks tensors \(1\): lm_head\.weight"),
        ({"modules_to_save": ["score"]}, "", r"saves the module 'score', which is not here"),
    ],
)
def test_what_would_load_as_something_else_is_refused(
    llava, plain, changes, left_out, message, tmp_path
):
    settings, tensors = plain
    kept = {n: x for n, x in tensors.items() if not left_out or left_out not in n}
    write(tmp_path, settings | changes, kept)
    model = llava.ours()
    with pytest.raises(UserError, match=message):
        import_peft(tmp_path, model)
    assert model.tuning.spec == "none"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_is_named(llava, plain, file, tmp_path):
    write(tmp_path, *plain)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{tmp_path}/{file} cannot be (read|used): "):
        import_peft(tmp_path, llava.ours())


def test_a_file_without_what_its_settings_name_is_refused_in_that_part_only(llava, plain, tmp_path):
    """An adapter of the LLM alone names `q_proj`, which the vision tower has too."""
    settings, tensors = plain
    kept = {n: x for n, x in tensors.items() if "vision_tower" not in n}
    write(tmp_path, settings, kept)
    assert import_peft(tmp_path, llava.ours()) == (
        "lora:rank=2,alpha=8.0,targets=q;connector.0/partial:train=lm_head"
    )


TYPES = {
    "LORA": peft.LoraConfig,
    "IA3": peft.IA3Config,
    "OFT": peft.OFTConfig,
    "BOFT": peft.BOFTConfig,
    "VERA": peft.VeraConfig,
    "LN_TUNING": peft.LNTuningConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
}


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_of_every_type_is_listed_and_neutral_as_it_starts(kind):
    keys, config = KEYS[kind], TYPES[kind]
    assert keys.unlisted(field.name for field in dataclasses.fields(config)) == []
    keys.check(json.loads(json.dumps(config().to_dict(), default=sorted)), kind)


def test_what_peft_cannot_hold_is_refused(llava, tmp_path):
    model = llava.ours()
    for spec, also, message in (
        ("lora:rank=2/mores:positions=image", (), r"unknown method for peft 'mores'"),
        ("lora:targets=connector.0", ("connector",), r"either adapts .*linear_1 or saves all"),
        ("ia3/partial:train=biases", (), r"IA3 cannot hold biases"),
        ("lora", ("llm.blocks.mlp",), r"but not llm\.blocks\.mlp\.down\.kernel"),
        ("prompt", ("connector",), r"with prompt holds nothing else"),
        ("vera:targets=q/vera:targets=k", (), r"same settings for all linears"),
    ):
        model.attach(spec)
        with pytest.raises(UserError, match=message):
            export_peft(model, tmp_path / "out", also_train=also)
    assert not (tmp_path / "out").exists()


def test_what_trained_of_an_encoder_that_transformers_has_not_is_refused(tmp_path):
    config = tiny_config()
    assert isinstance(config.vision, VisionConfig)
    behind = {"feature_layer": -1, "feature_norm_eps": 1e-5}
    eva = dataclasses.replace(config.vision, model_type=EVA, k_bias=False, **behind)
    model = initialize(MLLM(dataclasses.replace(config, vision=eva)))
    for spec in (
        "ln:targets=vision.post_norm",
        "ln:targets=all;vision.all",
        "lora/partial:train=biases",
    ):
        model.attach(spec)
        with pytest.raises(UserError, match=r"no place for vision\.\w+"):
            export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
