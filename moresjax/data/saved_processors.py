"""What the files of a saved image processor and tokenizer mean here, key by key.

`transformers` makes the image processor and the tokenizer of a folder, so what their classes take
is honoured by them. What they would not know, or what the code around them leaves out, is refused.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.json_files import read_object, write_json
from moresjax.data.templates import Template, template_name

# The file beside an exported model that names its conversation template; not of transformers.
TEMPLATE_FILE = "conversation.json"
# Files in which transformers saves image processors.
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
CLASS = "it names a class or says where the file comes from"
CALLS = "it says what calls return, not what is computed"
ROWS = "rows are built and padded otherwise here"

_PAN_AND_SCAN = (
    "pan_and_scan_min_crop_size",
    "pan_and_scan_max_num_crops",
    "pan_and_scan_min_ratio_to_activate",
)

IMAGE_KEYS = ConfigKeys(
    implemented=(
        *("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
        *("do_convert_rgb", "do_pad", "pad_size"),
    ),
    neutral={"do_pan_and_scan": (None, False)},
    irrelevant={
        **dict.fromkeys(("image_processor_type", "feature_extractor_type"), CLASS),
        **dict.fromkeys(("processor_class", "_processor_class", "auto_map"), CLASS),
        **dict.fromkeys(("transformers_version", "_valid_processor_keys"), CLASS),
        **dict.fromkeys(("data_format", "input_data_format", "return_tensors"), CALLS),
        **dict.fromkeys(("device", "disable_grouping", "backend"), "it changes speed only"),
        "image_seq_length": "the size of image and patch says it",
        **dict.fromkeys(_PAN_AND_SCAN, "images are not cut: do_pan_and_scan says it"),
    },
)

PROCESSOR_KEYS = ConfigKeys(
    implemented=("image_processor", "chat_template"),
    choices={"image_token": (None, "<image>")},
    irrelevant={
        **dict.fromkeys(("patch_size", "num_additional_image_tokens"), ROWS),
        "vision_feature_select_strategy": "config.json says it",
        **dict.fromkeys(("processor_class", "auto_map", "transformers_version"), CLASS),
        "image_seq_length": ROWS,
        "tokenizer": "tokenizer_config.json says it",
    },
)

_CLEAN_UP_ANYWAY = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
TOKENIZER_KEYS = ConfigKeys(
    implemented=(
        *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
        *("added_tokens_decoder", "add_bos_token", "add_prefix_space", "legacy"),
        *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "sp_model_kwargs"),
        *("do_lower_case", "errors", "trim_offsets", "chat_template", "from_slow", "use_fast"),
        *("fix_mistral_regex", _CLEAN_UP_ANYWAY),
    ),
    neutral={"add_eos_token": (None, False)},
    irrelevant={
        **dict.fromkeys(("tokenizer_class", "processor_class", "auto_map", "backend"), CLASS),
        **dict.fromkeys(("name_or_path", "tokenizer_file", "vocab_file", "merges_file"), CLASS),
        **dict.fromkeys(("special_tokens_map_file", "added_tokens_file", "is_local"), CLASS),
        **dict.fromkeys(("transformers_version", "_commit_hash", "local_files_only"), CLASS),
        **dict.fromkeys(("padding_side", "truncation_side", "padding", "truncation"), ROWS),
        **dict.fromkeys(("max_length", "stride", "pad_to_multiple_of"), ROWS),
        **dict.fromkeys(("pad_token_type_id", "truncation_strategy"), ROWS),
        **dict.fromkeys(("model_input_names", "model_max_length"), ROWS),
        **dict.fromkeys(("return_token_type_ids", "token_type_ids_disabled"), ROWS),
        "trust_remote_code": "code of a folder never runs",
        **dict.fromkeys(("cache_dir", "revision", "device_map"), CLASS),
        **dict.fromkeys(("slow_tokenizer_class", "files_loaded", "gguf_file"), CLASS),
        **dict.fromkeys(("max_len", "max_target_length"), ROWS),
        **dict.fromkeys(("response_schema", "response_template"), "answers are not parsed"),
        "verbose": "it changes what is logged only",
        "chat_control_tokens": "control tokens in the text of users are text anyway",
        "use_default_system_prompt": "the conversation template says it",
        "split_special_tokens": "the conversation template says which texts have special tokens",
    },
)


def check_image_processor(folder: Path) -> bool:
    """Whether a folder has an image processor; refuses keys of it that would be ignored.

    Raises:
      UserError: A file is damaged, or names the key that would be ignored.
    """
    found = False
    for name in IMAGE_FILES:
        if (folder / name).is_file():
            values = read_object(folder / name)
            if name == "processor_config.json":
                PROCESSOR_KEYS.check(values, str(folder / name))
                values = values.get("image_processor") or {}
            IMAGE_KEYS.check(values, str(folder / name))
            found |= bool(values)
    return found


def save_template(template: Template, folder: Path) -> None:
    """Notes the template that a model was trained in, unless it is one that drops questions."""
    if template.keep_question:
        name = template_name(template).split("/")[0]
        write_json(folder / TEMPLATE_FILE, {"template": name}, indent=None)


def saved_template(folder: Path) -> str:
    """The name of the template that `save_template` has noted; empty without a note.

    Raises:
      UserError: The file is damaged.
    """
    file = folder / TEMPLATE_FILE
    return str(read_object(file).get("template", "")) if file.is_file() else ""


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer of `transformers` was saved in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Refuses keys of a tokenizer's file that neither its class nor the code here honours.

    Args:
      folder: The tokenizer's folder.
      tokenizer: The tokenizer, whose class may take keys of its own.

    Raises:
      UserError: The file is damaged, or names the key that would be ignored.
    """
    file = folder / "tokenizer_config.json"
    if file.is_file():
        values = read_object(file)
        own = {*inspect.signature(type(tokenizer).__init__).parameters, *_tokens(values)}
        own -= TOKENIZER_KEYS.listed
        TOKENIZER_KEYS.check({k: x for k, x in values.items() if k not in own}, str(file))


def _tokens(names: Iterable[str]) -> set[str]:
    """The names of special tokens, which are the tokenizer's attributes."""
    return {name for name in names if name.endswith("_token") and not name.startswith("add_")}
