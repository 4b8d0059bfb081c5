"""Export: the folder gives `transformers` the weights and the logits that the model came with."""

import json

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
)

from moresjax.core.errors import UserError
from moresjax.models.connector import CONNECTORS
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.testing.hf_encoders import ORACLES, clip, siglip
from moresjax.testing.hf_llms import (
    FAMILIES,
    IMAGE_ID,
    TEXT,
    oracle_of,
    padded,
    randomised,
    text_rows,
)
from moresjax.testing.models import randomised_tuning, tiny_config, tiny_model
from moresjax.tuning.merge import merged
from moresjax.weights.export import export_hf, hf_config
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import load_pretrained

LLMS = FAMILIES | {
    "llama": LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True),
    "phi": PhiConfig(**(TEXT | {"hidden_size": 80}), partial_rotary_factor=0.4),
}
TOWERS = ("clip", "siglip", "dinov2", "dinov2, gated", "dinov2, no bias")


def llava_of(tower, text=None, **changes) -> LlavaForConditionalGeneration:
    text = text or LlamaConfig(**TEXT)
    config = LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE_ID, **changes
    )
    return randomised(LlavaForConditionalGeneration(config))


def logits(model, images: int = 0, visual: int = 0) -> np.ndarray:
    """Logits of two rows, padded on the left, the first one with images."""
    first, second = text_rows(11, 6)
    ids, mask = padded([[IMAGE_ID] * visual * images + first, second], left=True)
    extra = {}
    if images:
        pixels = np.random.default_rng(0).standard_normal((images, 3, 12, 12), np.float32)
        extra["pixel_values"] = torch.tensor(pixels)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **extra)
    return out.logits.numpy()[mask.astype(bool)]


def reloaded(kind, folder):
    """The model that `transformers` makes of a folder, of which it must use every tensor."""
    model, report = kind.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    # DINOv2's mask token is pretraining's; nothing uses it.
    report["missing_keys"] -= {"model.vision_tower.embeddings.mask_token"}
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", LLMS)
def test_exported_llms_have_equal_logits(name, tmp_path):
    oracle = oracle_of(LLMS[name])
    oracle.save_pretrained(tmp_path / "in")
    export_hf(load_pretrained(tmp_path / "in"), tmp_path / "out")
    back = reloaded(AutoModelForCausalLM, tmp_path / "out")
    assert back.state_dict().keys() == oracle.state_dict().keys()
    assert np.abs(logits(back) - logits(oracle)).max() <= 1e-5


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("name", TOWERS)
def test_exported_llavas_have_equal_logits(name, strategy, tmp_path):
    tower = ORACLES[name]().config
    layer = [-1, 1] if name == "clip" else -2
    oracle = llava_of(tower, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    oracle.save_pretrained(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in")
    export_hf(ours, tmp_path / "out")
    back = reloaded(LlavaForConditionalGeneration, tmp_path / "out")
    assert back.config.vision_feature_layer == layer
    visual = ours.config.visual_tokens
    assert visual == 9 + (strategy == "full") - (name == "siglip")
    assert np.abs(logits(back, 2, visual) - logits(oracle, 2, visual)).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_import_export_import_changes_no_bit(dtype, tmp_path):
    llava_of(clip().config).to(dtype).save_pretrained(tmp_path / "in")
    export_hf(load_pretrained(tmp_path / "in"), tmp_path / "once", shard_size="20KB")
    export_hf(load_pretrained(tmp_path / "once"), tmp_path / "twice")
    first, second = (
        {
            name: tensor
            for file in (tmp_path / folder).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in ("once", "twice")
    )
    original = load_file(tmp_path / "in" / "model.safetensors")
    assert first.keys() == second.keys()
    assert len(first) == len(original)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype == str(dtype).removeprefix("torch.")
        assert tensor.tobytes() == second[name].tobytes()
    assert sorted(x.tobytes() for x in first.values()) == sorted(
        x.tobytes() for x in original.values()
    )
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_large_models_are_written_in_shards(tmp_path):
    oracle = oracle_of(LLMS["llama"])
    oracle.save_pretrained(tmp_path / "in")
    export_hf(load_pretrained(tmp_path / "in"), tmp_path / "out", shard_size="20KB")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    assert (
        np.abs(logits(reloaded(AutoModelForCausalLM, tmp_path / "out")) - logits(oracle)).max()
        <= 1e-5
    )


def test_every_llm_family_finds_its_way_back():
    """The configuration alone: what is exported means the same decoder, fields and all."""
    for config in LLMS.values():
        ours = decoder_config(config.to_dict())
        assert decoder_config(hf_config(MLLMConfig(llm=ours))) == ours


def test_a_model_that_was_trained_here_is_exported(tmp_path):
    config = tiny_config()
    export_hf(initialize(MLLM(config)), tmp_path / "out")
    back = reloaded(LlavaForConditionalGeneration, tmp_path / "out")
    assert type(back.model.language_model).__name__ == "LlamaModel"
    assert load_pretrained(tmp_path / "out").config.visual_tokens == config.visual_tokens


def test_a_model_that_has_generated_is_merged_and_exported_all_the_same(tmp_path):
    fresh, used = (randomised_tuning(tiny_model("lora:rank=2")) for _ in range(2))
    bare = tiny_model()
    for model in (used, bare):
        model.llm.unstack()
    files = []
    for name, model in (("fresh", tiny_model()), ("bare", bare), ("merged", merged(fresh))):
        export_hf(model, tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    export_hf(merged(used), tmp_path / "both")
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == files[2]
    assert isinstance(used.llm.blocks, nnx.List)  # it goes on generating


def test_what_has_no_counterpart_is_refused(tmp_path):
    with pytest.raises(
        UserError,
        match="no LLM in a LLaVA of transformers is like this one: stablelm with post_norms",
    ):
        export_hf(tiny_model(gated_mlp=False, norm="layer", post_norms=True), tmp_path / "out")
    for name in set(CONNECTORS) - {"mlp{n}x_gelu", "norm-mlp{n}x_gelu", "mof_mlp", "identity"}:
        connector = name.format(m=3, n=2)
        config = MLLMConfig(llm=tiny_config().llm, vision=tiny_config().vision, connector=connector)
        with pytest.raises(UserError, match=f"mlp2x_gelu.*{connector}"):
            hf_config(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"full is not empty"):
        export_hf(tiny_model(), tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_siglip_is_exported_without_the_pooling_head_it_never_had(tmp_path):
    llava_of(siglip().config, vision_feature_select_strategy="full").save_pretrained(tmp_path / "a")
    export_hf(load_pretrained(tmp_path / "a"), tmp_path / "b")
    names = load_file(tmp_path / "b" / "model.safetensors")
    assert not any(".head." in name for name in names)
