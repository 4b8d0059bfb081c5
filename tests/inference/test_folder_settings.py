"""Settings beside the weights, of generation, tokenizer and images, as `transformers` has them."""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

import moresjax as mj
from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.regions import tokens_inside
from moresjax.inference.convert import export_model, import_model
from moresjax.models.vision import OPENAI_MEAN, OPENAI_STD
from moresjax.testing.hf_encoders import clip, dinov2
from moresjax.testing.hf_llms import IMAGE_ID, TEXT, randomised

SQUARE = {"height": 12, "width": 12}
PROMPT, NEW = "how many ?", 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA with tokenizer and image processor."""
    path = tmp_path_factory.mktemp("llava")
    tower = clip().config
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=tower, image_token_index=IMAGE_ID
    )
    randomised(LlavaForConditionalGeneration(config)).save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"filler{i}" for i in range(IMAGE_ID - len(tokenizer))])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=SQUARE)
    LlavaProcessor(image, tokenizer, patch_size=4).save_pretrained(path)
    (path / "generation_config.json").unlink()
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change_json(file, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def ours(path, **options):
    return mj.load(path, template="bare").generate(
        PROMPT, max_new_tokens=NEW, details=True, **options
    )


def theirs(path) -> list[int]:
    """What `transformers` generates greedily from the row of the same prompt."""
    row = mj.load(path, template="bare").prompt(PROMPT)
    oracle = LlavaForConditionalGeneration.from_pretrained(path)
    ids = torch.tensor(row.tokens)[None]
    with torch.no_grad():
        out = oracle.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


# Generation


def test_every_end_token_of_the_folder_ends_an_answer(copy, tmp_path):
    """And it still does after import and export."""
    free = ours(copy).tokens.tolist()
    assert len(free) == NEW
    end = next(token for token in free[3:] if token not in free[:3])
    change_json(copy / "generation_config.json", eos_token_id=[59, end])
    expected = theirs(copy)
    assert len(expected) < NEW
    answer = ours(copy)
    assert (answer.tokens.tolist(), answer.stop_reason) == (expected, "eos")
    import_model(copy, tmp_path / "run", template="bare")
    assert ours(tmp_path / "run").tokens.tolist() == expected
    export_model(tmp_path / "run", tmp_path / "again", "hf")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {59, end} <= set(saved["eos_token_id"])


def test_without_a_file_the_end_tokens_are_those_of_config_json(copy):
    end = ours(copy).tokens.tolist()[2]
    change_json(copy / "config.json", eos_token_id=[59, end])
    assert len(ours(copy).tokens) <= 3


def test_the_repetition_penalty_of_the_folder(copy):
    free = ours(copy).tokens.tolist()
    change_json(copy / "generation_config.json", eos_token_id=59, repetition_penalty=1.7)
    expected = theirs(copy)
    assert expected != free
    assert ours(copy).tokens.tolist() == expected
    assert ours(copy, sampling=mj.Sampling(repetition_penalty=1.0)).tokens.tolist() == free


def test_a_tokenizer_without_an_end_token(copy):
    change_json(copy / "tokenizer_config.json", eos_token=None)
    text = json.loads((copy / "config.json").read_text())["text_config"]
    change_json(copy / "config.json", text_config=text | {"eos_token_id": None})
    model = mj.load(copy, template="bare")
    assert model.processor.tokenizer.eos_token is None
    assert model.processor.eos_ids == ()
    assert model.generate(PROMPT, max_new_tokens=3, details=True).stop_reason == "length"


# Token ids


def test_token_ids_without_an_embedding_are_refused(copy):
    model = mj.load(copy, template="bare")
    model.processor.tokenizer.add_tokens(["zebra"])
    with pytest.raises(UserError, match=r"token 'zebra' has id 61, but the model has 61 embed"):
        model.generate("zebra ?", max_new_tokens=2)
    wrong = "token id 61 is none of the model's 61 embeddings"
    with pytest.raises(UserError, match=wrong):
        model.logits(input_ids=[[3, 61]])
    with pytest.raises(UserError, match=wrong):
        model.service.generate_rows([Row.text([3, 61])], 2)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_logits_know_the_image_token_of_the_folder(has_tokenizer, copy):
    if not has_tokenizer:
        for file in copy.glob("*token*"):
            file.unlink()
    pixels = np.random.default_rng(0).standard_normal((1, 3, 12, 12)).astype(np.float32)
    ids = np.asarray([[IMAGE_ID] * 9 + [7, 9]])
    oracle = LlavaForConditionalGeneration.from_pretrained(copy)
    with torch.no_grad():
        expected = oracle(
            input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)
        ).logits.numpy()
    found = mj.load(copy).logits(input_ids=ids, pixel_values=pixels)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4


def test_settings_of_the_tokenizer_that_would_be_ignored(copy):
    change_json(copy / "tokenizer_config.json", add_eos_token=True)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: add_eos_token=True"):
        mj.load(copy)
    change_json(copy / "tokenizer_config.json", add_eos_token=False, fold_accents=True)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: the setting fold_accents=True"):
        mj.load(copy)


# Images


def test_without_a_saved_processor_images_are_normalised_for_the_encoder(copy):
    for file in copy.glob("*processor_config.json"):
        file.unlink()
    image = mj.load(copy).processor.image
    assert (image.mean, image.std) == (OPENAI_MEAN, OPENAI_STD)


def test_settings_of_the_image_processor_that_would_be_ignored(copy):
    (file,) = copy.glob("*processor_config.json")
    content = json.loads(file.read_text())
    content["image_processor"]["image_grid_pinpoints"] = [[12, 24]]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json: the setting image_grid_pinpoints="):
        mj.load(copy)


@pytest.fixture
def llm(folder, tmp_path):
    randomised(LlamaForCausalLM(LlamaConfig(**TEXT))).save_pretrained(tmp_path / "llm")
    for file in folder.glob("token*"):
        shutil.copy(file, tmp_path / "llm")
    return tmp_path / "llm"


def test_dinov2_takes_the_images_that_its_processor_makes(llm, tmp_path):
    """As published: a table of positions for 518 pixels, a processor that makes 224."""
    dinov2(image_size=20).save_pretrained(tmp_path / "dinov2")
    image = CLIPImageProcessor(size={"shortest_edge": 12}, crop_size=SQUARE)
    image.save_pretrained(tmp_path / "dinov2")
    import_model(llm, tmp_path / "run", vision=str(tmp_path / "dinov2"))
    model = mj.load(tmp_path / "run")
    assert (model.config.vision.image_size, model.config.visual_tokens) == (12, 9)
    black = np.zeros((30, 40, 3), np.uint8)
    assert np.isfinite(np.asarray(model.logits("what is the largest ?", black))).all()


def test_a_failed_import_leaves_nothing(llm, tmp_path):
    clip().save_pretrained(tmp_path / "clip")  # for 12 pixels
    large = {"height": 16, "width": 16}
    image = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=large)
    image.save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="images become 16 x 16, not 12 x 12"):
        import_model(llm, tmp_path / "run", vision=str(tmp_path / "clip"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="images become 16 x 16"):
        import_model(llm, tmp_path / "run", vision=str(tmp_path / "clip"))
    assert not list((tmp_path / "run").iterdir())


def test_the_box_of_a_whole_image_says_where_an_image_processor_puts_it():
    """The picture that comes out of a processor of `transformers` tells where everything went."""
    plain = {"do_normalize": False, "do_rescale": False, "resample": 0}
    crops = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=12, **plain)
    pads = LlavaImageProcessor(size={"shortest_edge": 12}, crop_size=12, do_pad=True, **plain)
    for reference, (width, height) in ((crops, (40, 20)), (crops, (20, 60)), (pads, (24, 12))):
        box = (0.25, 0.5, 0.5, 1.0)
        pixels = np.zeros((height, width, 3), np.uint8)
        x0, y0, x1, y1 = (round(a * b) for a, b in zip(box, (width, height) * 2, strict=True))
        pixels[y0:y1, x0:x1] = 255
        processor = ImageProcessor(12, reference=reference)
        shown = processor(pixels)[:, :, 0] > 128
        centres = (np.stack(np.meshgrid(range(12), range(12)), -1).reshape(-1, 2) + 0.5) / 12
        found = tokens_inside([box], centres, processor.placement(Image.fromarray(pixels)))
        assert shown.any()
        # A pixel at the edge may round to either side.
        assert (found.reshape(12, 12) != shown).sum() <= 12
