"""`moresjax import` and `moresjax export`, from folders and back."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_torch
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
)

import moresjax as mj
from moresjax.cli import main
from moresjax.cli.app import make_parser
from moresjax.cli.options import load_model
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.samples import Sample, Turn
from moresjax.data.templates import get_template
from moresjax.inference.convert import export_model, import_model
from moresjax.testing.hf_encoders import clip, dinov2, siglip
from moresjax.testing.hf_llms import IMAGE_ID, TEXT, randomised
from moresjax.testing.models import talking_model
from moresjax.weights.adapter import save_adapter
from moresjax.weights.export import export_hf
from moresjax.weights.hf import load_pretrained

SQUARE = {"height": 12, "width": 12}


def llava(**changes) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=clip().config,
        image_token_index=IMAGE_ID,
        **changes,
    )
    return randomised(LlavaForConditionalGeneration(config))


def tokenizer(image_token: bool = True):
    """The digits world's, filled up to the place of the image token."""
    made = build_tokenizer()
    made.add_tokens([f"filler{i}" for i in range(IMAGE_ID - len(made))])
    if image_token:
        made.add_tokens(["<image>"], special_tokens=True)
        assert made.convert_tokens_to_ids("<image>") == IMAGE_ID
    return made


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=SQUARE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA with tokenizer and image processor."""
    path = tmp_path_factory.mktemp("llava")
    llava().save_pretrained(path)
    LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("import") / "out"
    import_model(folder, out)
    return out


PROMPT = ["what is in the image ?"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8))


def logits(path) -> np.ndarray:
    return np.asarray(mj.load(path).logits(PROMPT, [[PICTURE]]))


def test_control_tokens_in_a_prompt_are_text_unless_asked(folder):
    def ends(model) -> int:
        return int((model.prompt("two </s> three").tokens == tokenizer().eos_token_id).sum())

    assert ends(mj.load(folder)) == 0
    assert ends(mj.load(folder, split_special_tokens=False)) == 1
    arguments = ["generate", "--model", str(folder), "--no-split-special-tokens"]
    assert ends(load_model(make_parser().parse_args(arguments))) == 1


def test_an_imported_model_is_the_folders(folder, imported):
    np.testing.assert_array_equal(logits(imported), logits(folder))


def test_an_exported_import_is_what_transformers_had(folder, imported, tmp_path):
    out = export_model(imported, tmp_path / "out", "hf")
    ours, theirs = (load_file(path / "model.safetensors").values() for path in (out, folder))
    assert sorted(x.tobytes() for x in ours) == sorted(x.tobytes() for x in theirs)
    back = LlavaForConditionalGeneration.from_pretrained(out).eval()
    processor = LlavaProcessor.from_pretrained(out)
    assert back.config.image_token_id == IMAGE_ID
    model = mj.load(folder)
    sample = Sample("it", (Turn(f"<image>\n{PROMPT[0]}"),), (PICTURE,))
    text = "".join(piece.text for piece in model.processor.template.render(sample, ""))
    inputs = processor(text=text, images=PICTURE, return_tensors="pt")
    with torch.no_grad():
        reference = back(**inputs).logits.numpy()
    ours = logits(folder)
    assert reference.shape == ours.shape
    assert np.abs(reference - ours).max() <= 1e-4


def test_command_lines(folder, tmp_path, capsys):
    arguments = [str(folder), str(tmp_path / "in"), "--quantize", "int8", "--json"]
    assert main(["import", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == sum(p.numel() for p in llava().parameters())
    assert report["model"]["llm"]["int8"]
    arguments = [str(folder), str(tmp_path / "out"), "--format", "hf", "--json"]
    assert main(["export", *arguments]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "hf"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "new"), "--format", "onnx"]) == 2
    assert (
        "'onnx'; choose from: hf, merged, tinyllava, adapter, peft, pyreft"
        in capsys.readouterr().err
    )


def test_eight_bits_do_not_go_out_as_weights(folder, tmp_path):
    import_model(folder, tmp_path / "run", quantize="int8")
    with pytest.raises(UserError, match="in eight bits; load it with quantize=int8"):
        export_model(tmp_path / "run", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert mj.load(tmp_path / "run").config.llm.int8


@pytest.fixture
def tuned(imported, tmp_path):
    """The import with a tuning attached: a run that ended before its first step."""

    def make(spec: str):
        folder = tmp_path / "run"
        shutil.copytree(imported, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tuning": spec}))
        return folder

    return make


def test_weight_deltas_are_folded_in(folder, tuned, tmp_path):
    run = tuned("ia3")
    with pytest.raises(UserError, match="format hf has no place for ia3; use format merged"):
        export_model(run, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    export_model(run, tmp_path / "out", "merged")
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(folder))


def test_edits_lie_beside_weights_and_come_along(tuned, tmp_path):
    """Deltas are folded in, edits stay edits; an import of the folder has them too."""
    run = tuned("mores:rank=2,positions=image:f2/ia3")
    with pytest.raises(UserError, match="format hf has no place for ia3; use format merged"):
        export_model(run, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    out = export_model(run, tmp_path / "out", "merged")
    assert mj.load(out).tuning == "mores:positions=image:f2,rank=2"
    np.testing.assert_allclose(logits(out), logits(run), atol=1e-5)
    import_model(out, tmp_path / "again")
    assert mj.load(tmp_path / "again").tuning == "mores:positions=image:f2,rank=2"
    np.testing.assert_array_equal(logits(tmp_path / "again"), logits(out))


@pytest.mark.parametrize(
    ("format", "spec", "file"),
    [
        ("adapter", "mores:rank=2", "tuning.json"),
        ("peft", "lora:rank=2", "adapter_config.json"),
        ("pyreft", "mores:rank=2", "config.json"),
    ],
)
def test_what_was_trained_alone(folder, tuned, tmp_path, format, spec, file):
    run = tuned(spec)
    export_model(run, tmp_path / "out", format)
    assert (tmp_path / "out" / file).is_file()
    if format != "pyreft":
        model = mj.load(folder)
        model.load_adapter(tmp_path / "out")
        assert model.tuning.split(":")[0] == spec.split(":")[0]
        ours = np.asarray(model.logits(PROMPT, [[PICTURE]]))
        np.testing.assert_allclose(ours, logits(run), atol=1e-5)


def test_whole_weights_of_a_run_over_eight_bits(tuned, tmp_path):
    """What `qlora` trained is a `lora` of the weights that the eight bits were made of."""
    run = tuned("qlora:rank=2")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"quantize": "int8"}))
    assert mj.load(run).tuning == "lora:rank=2"
    with pytest.raises(UserError, match="format hf has no place for lora; use format merged"):
        export_model(run, tmp_path / "out", "hf")
    assert mj.load(export_model(run, tmp_path / "out", "merged")).tuning == "none"


@pytest.mark.parametrize("format", ["adapter", "pyreft", "hf"])
def test_a_connector_that_an_adapter_brings_goes_along(folder, tuned, tmp_path, format):
    run = tuned("mores:rank=2,positions=image:f2")
    model = mj.load(run)
    kernel = model.mllm.connector.layers[0].kernel
    kernel.set_value(kernel.get_value() + 0.5)
    adapter = save_adapter(model.mllm, tmp_path / "ours", also_train=["connector"])
    out = export_model(folder, tmp_path / "out", format, adapter=adapter)
    back = mj.load(out if format == "hf" else folder)
    if format != "hf":
        pyreft = format == "pyreft"
        spec = "mores:positions=image:f2" if pyreft else ""
        back.load_adapter(out, edits=spec, allow_pickle=pyreft)
    assert back.tuning == model.tuning
    np.testing.assert_array_equal(back.mllm.connector.layers[0].kernel[...], kernel[...])


def test_the_template_comes_along(tmp_path):
    bare = talking_model()
    assert bare.processor.template == get_template("bare")
    folder = export_hf(bare.mllm, tmp_path / "hf", bare.processor)
    assert mj.load(folder).processor.template == get_template("bare")
    assert mj.load(folder, template="phi").processor.template == get_template("phi")
    import_model(folder, tmp_path / "run")
    assert mj.load(tmp_path / "run").processor.template == get_template("bare")
    (folder / "conversation.json").unlink()
    assert mj.load(folder).processor.template == get_template("vicuna_v1")


def test_a_tokenizer_gets_an_image_token_and_a_row_where_there_is_none(tmp_path, caplog):
    llava().save_pretrained(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "run")
    tokenizer(image_token=False).save_pretrained(tmp_path / "run" / "processor")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    named = json.dumps(config | {"tokenizer": "./processor"})
    (tmp_path / "run" / "config.json").write_text(named)
    export_model(tmp_path / "run", tmp_path / "out", "hf")
    made = LlavaProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert made.convert_tokens_to_ids("<image>") == IMAGE_ID
    full = tokenizer(image_token=False)
    full.add_tokens(["one more"])
    full.save_pretrained(tmp_path / "run" / "processor")
    export_model(tmp_path / "run", tmp_path / "again", "hf")
    assert "61 embeddings and none for <image>: the folder gets 62" in caplog.text
    made = LlavaProcessor.from_pretrained(tmp_path / "again").tokenizer
    assert made.convert_tokens_to_ids("<image>") == 61
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again")
    for table in (whole.get_input_embeddings().weight, whole.get_output_embeddings().weight):
        assert len(table) == 62
        torch.testing.assert_close(table[61], table[:61].mean(0))
    ids = [[5, 6, 7]]
    theirs = whole(input_ids=torch.tensor(ids)).logits.detach()[..., :61]
    ours = mj.load(tmp_path / "run").logits(input_ids=np.asarray(ids))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_tokenizer_without_the_image_token_is_not_a_llavas(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    tokenizer(image_token=False).save_pretrained(tmp_path / "copy")
    with pytest.raises(UserError, match="the tokenizer has no <image> token"):
        mj.load(tmp_path / "copy")


def test_an_llm_and_encoders_of_their_own(tmp_path):
    """A pair of encoders before an LLM; DINOv2's positions are interpolated to CLIP's image."""
    randomised(LlamaForCausalLM(LlamaConfig(**TEXT))).save_pretrained(tmp_path / "llm")
    clip().save_pretrained(tmp_path / "clip")
    dinov2(image_size=20).save_pretrained(tmp_path / "dinov2")
    tokenizer().save_pretrained(tmp_path / "llm")
    image_processor().save_pretrained(tmp_path / "clip")
    import_model(
        tmp_path / "llm",
        tmp_path / "out",
        vision=f"{tmp_path / 'clip'};{tmp_path / 'dinov2'}",
        connector="mof_mlp",
    )
    model = mj.load(tmp_path / "out")
    assert model.config.visual_tokens == 18
    assert model.processor.image.reference is not None
    assert np.isfinite(logits(tmp_path / "out")).all()
    llava().save_pretrained(tmp_path / "llava")
    with pytest.raises(UserError, match="has a vision encoder already"):
        import_model(tmp_path / "llava", tmp_path / "again", vision=str(tmp_path / "clip"))


# TinyLLaVA Factory


def factory_tensors(oracle, connector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a `TinyLlavaForConditionalGeneration` with the weights of a LLaVA."""
    names = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower._vision_tower.vision_model.",
    }
    found = {f"connector._connector.{name}": x for name, x in connector.items()}
    for name, tensor in oracle.state_dict().items():
        for old, new in names.items():
            if name.startswith(old):
                found[new + name.removeprefix(old)] = tensor.contiguous()
    return found


def factory_config(oracle, connector: str) -> dict:
    return {
        "model_type": "tinyllava",
        "connector_type": connector,
        "text_config": oracle.config.text_config.to_dict(),
        "vision_config": oracle.config.vision_config.to_dict(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "pad",
    }


@pytest.fixture(scope="module")
def factory():
    """A LLaVA, and its connector as the factory names it."""
    config = LlavaConfig(
        text_config=PhiConfig(**(TEXT | {"hidden_size": 80}), partial_rotary_factor=0.4),
        vision_config=siglip().config,
        image_token_index=IMAGE_ID,
    )
    oracle = randomised(LlavaForConditionalGeneration(config))
    state = oracle.state_dict()
    connector = {
        f"{2 * i}.{leaf}": state[f"model.multi_modal_projector.linear_{i + 1}.{leaf}"]
        for i in range(2)
        for leaf in ("weight", "bias")
    }
    return oracle, connector


def first_logits(mllm_folder, **options) -> np.ndarray:
    """Logits of one row: an image of eight tokens (the factory drops SigLIP's first), then text."""
    model = mj.load(mllm_folder, **options)
    ids = np.asarray([[IMAGE_ID] * 8 + [7, 9, 11]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 12, 12), np.float32)
    return np.asarray(model.logits(input_ids=ids, pixel_values=pixels, image_token_id=IMAGE_ID))


def test_tinyllava_factory_folders(factory, tmp_path):
    oracle, connector = factory
    tensors = factory_tensors(oracle, connector)
    tensors["language_model.lm_head.bias"] = torch.randn(61)  # Phi keeps the bias of its head
    folder = tmp_path / "whole"
    folder.mkdir()
    save_torch(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(factory_config(oracle, "mlp2x_gelu")))
    ids = torch.tensor([[IMAGE_ID] * 8 + [7, 9, 11]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 12, 12), np.float32)
    with torch.no_grad():
        theirs = oracle(input_ids=ids, pixel_values=torch.tensor(pixels)).logits
    expected = (theirs + tensors["language_model.lm_head.bias"]).numpy()
    assert np.abs(first_logits(folder) - expected).max() <= 1e-4

    # The same as a training stage leaves it: three folders of pickles.
    stage = tmp_path / "stage"
    parts = {"language_model": "", "vision_tower": "_vision_tower.", "connector": ""}
    for part, inside in parts.items():
        (stage / part).mkdir(parents=True)
        prefix = f"{part}.{inside}"
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        torch.save(own, stage / part / "pytorch_model.bin")
    (stage / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"only pickled weights .*--allow-pickle"):
        mj.load(stage)
    np.testing.assert_array_equal(first_logits(stage, allow_pickle=True), first_logits(folder))

    import_model(stage, tmp_path / "run", allow_pickle=True)
    np.testing.assert_array_equal(first_logits(tmp_path / "run"), first_logits(folder))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["image_aspect"] == "pad"


def test_factory_connectors(factory, tmp_path):
    oracle, connector = factory
    linear = {"weight": connector["0.weight"], "bias": connector["0.bias"]}
    save_torch(factory_tensors(oracle, linear), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(factory_config(oracle, "resampler")))
    with pytest.raises(UserError, match="connector 'resampler' is not supported"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(factory_config(oracle, "linear")))
    with pytest.raises(UserError, match=r"lacks 1 tensors: lm_head\.bias"):
        load_pretrained(tmp_path)
