"""`scratch` and `laptop`: models for one's own files, from nothing and from folders on disk."""

import json

import pytest
from tiny_tokenizers import byte_level, sentencepiece
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen3Config,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.runs.config import load_config
from moresjax.runs.workdir import load_workdir
from moresjax.testing.llava_files import conversation, make_images, write_list

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIDE = 24
TOWER = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
TEXT_TOWER = TOWER | {"vocab_size": 30}
TOWER |= {"image_size": SIDE, "patch_size": 8}
QUICK = ["steps=1", "batch_size=8", "max_seq_len=128", "tensorboard=False"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Folders of the classes of SmolLM2, Qwen3 and SigLIP, and a data folder of two images."""
    root = tmp_path_factory.mktemp("disk")
    smol, qwen = sentencepiece(bos=True), byte_level()
    qwen.chat_template = (  # as Qwen3's, which writes only the newest answer with its thoughts
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role=='assistant' "
        "%}<think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    llms = {
        "smol": (LlamaConfig(vocab_size=len(smol), tie_word_embeddings=True, **TEXT), smol),
        "qwen": (Qwen3Config(vocab_size=len(qwen) + 3, head_dim=8, **TEXT), qwen),
    }
    for name, (config, tokenizer) in llms.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    parts = {"text_config": TEXT_TOWER, "vision_config": TOWER}
    SiglipModel(SiglipConfig(**parts)).save_pretrained(root / "siglip")
    size = {"height": SIDE, "width": SIDE}
    SiglipImageProcessor(size=size).save_pretrained(root / "siglip")
    mine = root / "mine"
    mine.mkdir()
    images = make_images(mine, 2)
    asked = [{"image": n, "conversations": conversation("<image>\nWhat?", "A cat")} for n in images]
    for name in ("train.json", "validation.json", "captions.json"):
        write_list(mine / name, asked)
    return root


def config_of(disk, config, **arguments):
    given = {"data": disk / "mine"} | arguments
    return f"{config}:" + ",".join(f"{key}={value}" for key, value in given.items())


def laptop(disk, llm, **arguments):
    return config_of(disk, "laptop", llm=disk / llm, vision=disk / "siglip", **arguments)


def test_a_model_of_two_folders_trains(disk, tmp_path):
    options = [*QUICK, "init.connector=random", "validation.every=1"]
    overrides = [f"--config.{option}" for option in options]
    command = ["train", "--config", laptop(disk, "smol"), "--workdir", str(tmp_path / "run")]
    assert main([*command, *overrides]) == 0
    model, processor = load_workdir(tmp_path / "run")
    assert processor is not None
    assert model.config.visual_tokens == (SIDE // 8) ** 2
    assert model.config.llm.tie_embeddings
    assert json.loads((tmp_path / "run" / "train.json").read_text())["metrics"]["validation_loss"]


def test_laptop_takes_what_the_folders_say(disk):
    smol, qwen = (load_config(laptop(disk, name)) for name in ("smol", "qwen"))
    assert (smol.template, qwen.template) == ("vicuna_v1", "chatml")
    assert (qwen.model.llm["qk_norm"], qwen.model.llm["vocab_size"]) == (
        True,
        len(byte_level()) + 3,
    )
    assert qwen.model.vision["image_size"] == SIDE
    assert qwen.init.connector == "../connector"
    first = load_config(laptop(disk, "qwen", stage="connector"))
    assert (first.template, first.init.connector, first.tuning) == ("plain", "", "none")
    assert first.data["files"] == str(disk / "mine" / "captions.json")
    assert load_config(laptop(disk, "qwen", tuning="full")).optimizer.lr < qwen.optimizer.lr
    assert load_config(laptop(disk, "qwen", template="plain")).template == "plain"


def test_a_missing_folder_is_named(disk):
    for config, message in (
        ("laptop", "config argument llm must be a folder of Hugging Face, such as SmolLM2"),
        (f"laptop:llm={disk / 'smol'},vision=here", "config argument vision must .* got 'here'"),
        (
            config_of(disk, "scratch"),
            r"tokenizer does not exist; make it with: moresjax data token",
        ),
        (config_of(disk, "scratch", stage="all"), "stage 'all'"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(config)
