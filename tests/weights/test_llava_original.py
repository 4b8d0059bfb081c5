"""LLaVA folders as their authors publish them: the logits are those of `transformers`."""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import moresjax as mj
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.inference.convert import import_model
from moresjax.testing.hf_llavas import IMAGE_ID, TEXT, TOWER
from moresjax.testing.hf_llms import randomised

NAME = "clip-vit-large-patch14-336"
SQUARE = {"height": 8, "width": 8}
PROJECTOR = "model.multi_modal_projector.linear_"


@pytest.fixture(scope="module")
def oracle():
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**TOWER),
        image_token_index=IMAGE_ID,
    )
    return randomised(LlavaForConditionalGeneration(config))


def tensors_of(oracle, *, with_tower: bool = False) -> dict[str, torch.Tensor]:
    """The tensors by their names in the authors' files."""
    names = {
        f"{PROJECTOR}1.": "model.mm_projector.0.",
        f"{PROJECTOR}2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }
    found = {}
    for name, tensor in oracle.state_dict().items():
        old = next(old for old in names if name.startswith(old))
        if with_tower or old != "model.vision_tower.":
            found[names[old] + name.removeprefix(old)] = tensor.contiguous()
    return found


def config_of(**changes) -> dict:
    text = {k: x for k, x in LlamaConfig(**TEXT).to_dict().items() if k != "rope_parameters"}
    own = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "rope_scaling": None,
        "image_aspect_ratio": "pad",
        "freeze_mm_mlp_adapter": False,
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"openai/{NAME}",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_mm_proj": True,
    }
    return text | own | changes


def write(folder, tensors, **changes):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(**changes)))
    build_tokenizer().save_pretrained(folder)
    return folder


def write_tower(oracle, folder):
    """A CLIP folder with both of its towers' keys, as published."""
    folder.mkdir(parents=True)
    prefix, tensors = "model.vision_tower.", {}
    for name, tensor in oracle.state_dict().items():
        if name.startswith(prefix):
            tensors[f"vision_model.{name.removeprefix(prefix)}"] = tensor.contiguous()
    tensors["text_model.final_layer_norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")
    vision = CLIPVisionConfig(**TOWER).to_dict() | {"dropout": 0.0, "vocab_size": 49408}
    config = {"model_type": "clip", "vision_config": vision, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=SQUARE).save_pretrained(folder)
    return folder


IDS = np.asarray([[IMAGE_ID] * 4 + [7, 9, 11]])
PIXELS = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)


def check_logits(model, oracle) -> None:
    with torch.no_grad():
        theirs = oracle(input_ids=torch.tensor(IDS), pixel_values=torch.tensor(PIXELS)).logits
    ours = model.logits(input_ids=IDS, pixel_values=PIXELS, image_token_id=IMAGE_ID)
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= 1e-4


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_the_tower_is_the_folder_beside(kind, oracle, tmp_path):
    folder = write(tmp_path / "llava", tensors_of(oracle), model_type=kind)
    with pytest.raises(UserError, match=rf"vision tower openai/{NAME}, which is not here; put"):
        mj.load(folder)
    write_tower(oracle, tmp_path / NAME)
    model = mj.load(folder)
    check_logits(model, oracle)
    assert model.processor.image.aspect == "pad"
    assert model.processor.image.reference is not None
    image = np.zeros((20, 30, 3), np.uint8)
    assert isinstance(model.generate("how many ?", image, max_new_tokens=2), str)


def test_the_tower_is_named(oracle, tmp_path, capsys):
    folder = write(tmp_path / "llava", tensors_of(oracle))
    tower = write_tower(oracle, tmp_path / "elsewhere" / "clip")
    check_logits(mj.load(folder, vision_tower=tower), oracle)
    out = tmp_path / "run"
    assert main(["import", str(folder), str(out), "--vision", str(tower)]) == 0
    check_logits(mj.load(out), oracle)
    config = json.loads((out / "config.json").read_text())
    assert (config["image_aspect"], bool(config["image_processor"])) == ("pad", True)
    with pytest.raises(UserError, match="names no vision tower"):
        mj.load(tower, vision_tower=tower)


def test_a_tower_that_was_trained_is_in_the_folder(oracle, tmp_path):
    other = {name: x + 1 for name, x in oracle.state_dict().items()}
    tower = write_tower(oracle, tmp_path / NAME)
    model = LlavaForConditionalGeneration(oracle.config)
    model.load_state_dict(other)
    folder = write(tmp_path / "llava", tensors_of(oracle, with_tower=True))
    write_tower(model, tmp_path / "wrong")
    (tmp_path / "wrong" / "model.safetensors").rename(tower / "model.safetensors")
    check_logits(mj.load(folder), oracle)


def test_a_linear_connector_of_version_1(oracle, tmp_path):
    tensors = {k: x for k, x in tensors_of(oracle).items() if "mm_projector" not in k}
    state = oracle.state_dict()
    tensors["model.mm_projector.weight"] = state[f"{PROJECTOR}1.weight"].contiguous()
    tensors["model.mm_projector.bias"] = state[f"{PROJECTOR}1.bias"].contiguous()
    folder = write(tmp_path / "llava", tensors, mm_projector_type=None)
    write_tower(oracle, tmp_path / NAME)
    model = import_model(folder, tmp_path / "run")
    assert model.config.connector == "linear"
    kernel = np.asarray(model.connector.layers[0].kernel[...])
    np.testing.assert_array_equal(kernel.T, tensors["model.mm_projector.weight"].numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True is not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type=spatial_unpad"),
        ({"mm_projector_type": "cabstractor"}, "mm_projector_type=cabstractor is not supported"),
        ({"mm_novel": 3}, "the setting mm_novel=3 is not known here"),
    ],
)
def test_what_is_not_read_is_refused(changes, message, oracle, tmp_path):
    folder = write(tmp_path / "llava", tensors_of(oracle), **changes)
    write_tower(oracle, tmp_path / NAME)
    with pytest.raises(UserError, match=message):
        mj.load(folder)
