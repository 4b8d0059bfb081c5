"""VipLLaVA, in and out: logits are those of `transformers`."""

import json

import numpy as np
import pytest
import torch
from hf_models import IMAGE_ID, LEFT, built, clip, image_rows, llama, padded, pixels
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

import moresjax as mj
from moresjax.core.errors import UserError
from moresjax.weights.export import export_hf

LAYERS = [-1, 1, -2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An oracle, its folder and what it says about two rows of which one has an image."""
    config = VipLlavaConfig(
        text_config=llama(),
        vision_config=clip(),
        vision_feature_layer=LAYERS,
        image_token_index=IMAGE_ID,
    )
    oracle = built(VipLlavaForConditionalGeneration, config)
    folder = tmp_path_factory.mktemp("vipllava")
    oracle.save_pretrained(folder)
    return oracle, folder


def answers(oracle, ids, mask):
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(1, 12)}
        return oracle(**{k: torch.tensor(x) for k, x in inputs.items()}).logits.numpy()[mask == 1]


def test_logits_in_and_out(saved, tmp_path):
    oracle, folder = saved
    model = mj.load(folder)
    assert model.config.connector == "norm-mlp2x_gelu"
    assert model.config.vision.feature_layer == tuple(LAYERS)
    ids, mask = padded(image_rows((1, 0), model.config.visual_tokens), LEFT)
    expected = answers(oracle, ids, mask)
    ours = model.logits(input_ids=ids, attention_mask=mask, pixel_values=pixels(1, 12))
    assert np.abs(np.asarray(ours)[mask == 1] - expected).max() <= 1e-4
    export_hf(model.mllm, tmp_path / "out")
    back, report = VipLlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    assert back.config.vision_feature_layer == LAYERS
    np.testing.assert_allclose(answers(back.eval(), ids, mask), expected, atol=1e-5)


def test_published_names_and_what_is_refused(saved, tmp_path):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())

    def load(**changes):
        changed = {key: x for key, x in (config | changes).items() if x is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return mj.load(tmp_path)

    # As llava-hf/vip-llava-7b-hf spells it.
    model = load(vision_feature_layer=None, vision_feature_layers=LAYERS)
    assert model.config.vision.feature_layer == tuple(LAYERS)
    with pytest.raises(UserError, match=r"vipllava in config\.json.*projector_layernorm_eps=1e-06"):
        load(projector_layernorm_eps=1e-6)
    with pytest.raises(UserError, match="novel=1"):
        load(novel=1)
