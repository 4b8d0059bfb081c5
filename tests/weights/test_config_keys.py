"""Every key of every configuration class that is read has its place in a table of ours."""

import dataclasses
import inspect
import json
import re

import pytest
from transformers import CONFIG_MAPPING, GenerationConfig, LlavaProcessor, PretrainedConfig
from transformers.models.auto import image_processing_auto, tokenization_auto
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.saved_processors import (
    IMAGE_KEYS,
    PROCESSOR_KEYS,
    TOKENIZER_KEYS,
    check_tokenizer,
)
from moresjax.weights.families.base import (
    LLM_FAMILIES,
    MLLM_FAMILIES,
    VISION_FAMILIES,
    decoder_config,
    vision_config,
)
from moresjax.weights.families.keys import TWO_TOWER_KEYS
from moresjax.weights.generation_config import GENERATION_KEYS, read_generation_config
from moresjax.weights.hf import config_from_hf

# Those that `transformers` has by their names.
PARTS = {n: f for n, f in (LLM_FAMILIES | VISION_FAMILIES).items() if n in CONFIG_MAPPING}
TABLES = {name: family.keys for name, family in PARTS.items()}
TABLES |= {name: TWO_TOWER_KEYS for name in ("clip", "siglip")}
TABLES |= {name: f.keys for name, f in MLLM_FAMILIES.items() if name in CONFIG_MAPPING}


def keys_of(kind: type[PretrainedConfig]) -> set[str]:
    """What a configuration of this class has, in memory and in a file, and what it takes."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return {*kind().to_dict(), *fields, *kind.attribute_map} - set(kind.attribute_map)


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_transformers_is_listed(name):
    assert TABLES[name].unlisted(sorted(keys_of(CONFIG_MAPPING[name]))) == []


@pytest.mark.parametrize("name", PARTS)
def test_a_new_key_is_an_error_that_names_it(name):
    read = decoder_config if name in LLM_FAMILIES else vision_config
    hf = CONFIG_MAPPING[name]().to_dict()
    read(hf)
    with pytest.raises(UserError, match=f"{name} in config.json: the setting halting_bias=0.5"):
        read(hf | {"halting_bias": 0.5})


@pytest.mark.parametrize("name", TABLES)
def test_no_key_is_at_once_neutral_and_read(name):
    table: ConfigKeys = TABLES[name]
    lists = (table.implemented, table.choices, table.neutral, table.irrelevant)
    assert sum(map(len, lists)) == len(table.listed)
    assert all(table.irrelevant.values())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("clip_vision_model", {"num_channels": 4}, "num_channels=4"),
        ("llava", {"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ("llava", {"projector_hidden_act": "mish"}, "projector_hidden_act=mish"),
        ("llava", {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy=cls"),
    ],
)
def test_what_is_not_neutral_is_refused(name, changes, message):
    hf = CONFIG_MAPPING[name]().to_dict() | changes
    with pytest.raises(UserError, match=message):
        vision_config(hf) if name in VISION_FAMILIES else config_from_hf(hf)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope scaling 'yarn' is not supported"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_rotary_settings_are_keys_too(rope, message):
    with pytest.raises(UserError, match=message):
        decoder_config(CONFIG_MAPPING["llama"]().to_dict() | {"rope_parameters": rope})


def test_every_setting_of_generation_is_listed():
    assert GENERATION_KEYS.unlisted(GenerationConfig().to_dict()) == []
    GENERATION_KEYS.check(GenerationConfig().to_dict(), "here")


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"suppress_tokens": [3]}, r"suppress_tokens=\[3\]"), ({"novel": 1}, "setting novel=1")],
)
def test_settings_of_generation_that_would_be_ignored(setting, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(setting))
    with pytest.raises(UserError, match=rf"generation_config\.json: .*{message}"):
        read_generation_config(tmp_path)


# Image processors and tokenizers

IMAGE_PROCESSORS = {
    names["pil"]
    for family, names in image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.items()
    if family in {*VISION_FAMILIES, *MLLM_FAMILIES, "clip", "siglip", "dinov2"}
}
TOKENIZERS = {
    name
    for family, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items()
    if family in {*LLM_FAMILIES, *MLLM_FAMILIES} and name is not None
}
# What the constructors of tokenizers read of their keywords.
READ = re.compile(r"""kwargs(?:\.(?:pop|get|setdefault)\(\s*|\[)["'](\w+)["']""")
# Those that a caller gives, or that a tokenizer hands to itself: no file has them.
NOT_IN_FILES = {
    *("_commit_hash", "_from_auto", "_from_pipeline", "commit_message", "proxies", "repo_id"),
    *("subfolder", "token", "save_jinja_files", "use_source_tokenizer", "model_type", "type"),
    *("tokenizer", "tokenizer_object", "vocab", "merges", "unk_id", "post_processor"),
    *("tokenizer_padding", "tokenizer_truncation", "_json_padding", "_json_truncation"),
    *("initial_alphabet", "continuing_subword_prefix", "end_of_word_suffix"),
    *("_spm_precompiled_charsmap", "sanitize_control_tokens", "init_inputs"),
}


@pytest.mark.parametrize("name", sorted(IMAGE_PROCESSORS))
def test_every_key_of_image_processors_is_listed(name):
    kind = get_image_processor_class_from_name(name)
    keys = {*kind().to_dict(), *inspect.get_annotations(kind.valid_kwargs)}
    keys |= {key for base in kind.valid_kwargs.__mro__ for key in inspect.get_annotations(base)}
    assert {"image_mean", "do_resize", "resample"} <= keys
    assert IMAGE_KEYS.unlisted(sorted(keys)) == []


def test_every_key_of_the_processor_is_listed():
    parameters = {*inspect.signature(LlavaProcessor.__init__).parameters} - {"self", "kwargs"}
    assert "patch_size" in parameters
    assert PROCESSOR_KEYS.unlisted(sorted(parameters)) == []


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_every_key_of_tokenizers_is_listed(name):
    kind = tokenizer_class_from_name(name)
    classes = [each for each in kind.__mro__ if "transformers" in each.__module__]
    keys = {key for each in classes for key in READ.findall(inspect.getsource(each))}
    keys = {key for key in keys if not key.endswith("_token") or key.startswith("add_")}
    assert {"add_bos_token", "chat_template", "extra_special_tokens"} <= keys
    assert TOKENIZER_KEYS.unlisted(sorted(keys - NOT_IN_FILES)) == []


def test_what_a_tokenizer_saves_is_read(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.response_template, tokenizer.chat_control_tokens = {"role": "x"}, ["<go>"]
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {"response_template", "chat_control_tokens"} <= saved.keys()
    check_tokenizer(tmp_path, tokenizer)
