"""Gemma 3 with images, in and out: logits and tokens are those of `transformers`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers import (
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import moresjax as mj
from moresjax.analysis.attention import to_grid
from moresjax.core.errors import UserError
from moresjax.data.samples import Sample, Turn
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.models.zoo import MODELS, mllm_config
from moresjax.testing.hf_llms import gemma3
from moresjax.weights.export import export_hf, hf_config
from moresjax.weights.hf import config_from_hf

SIDE, VISUAL, NEW = 16, 4, 32
WORDS = ["user", "model", "what", "is", "this", "?", "a", "cat", "and", "\n", "\n\n", "\n\n\n"]
MARKS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
SPECIAL = ["<pad>", "<eos>", "<bos>", *MARKS, "<image_soft_token>"]
VOCABULARY = [*SPECIAL, "<unk>", *WORDS]
IMAGE_ID = VOCABULARY.index("<image_soft_token>")
# What Gemma 3's own template writes of texts and images.
CHAT = """{{ bos_token }}{% set ns = namespace(first='') %}{% if messages[0]['role'] == 'system' %}\
{% set ns.first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}\
{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') }}
{{ ns.first if loop.first else '' }}{% if m.content is string %}{{ m.content | trim }}{% else %}\
{% for part in m.content %}{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}\
{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


# What the published files say.
TEXT = {
    "model_type": "gemma3_text",
    "sliding_window": 1024,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
PUBLISHED = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
}
SIZES = {
    "gemma-3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    },
    "gemma-3-12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "gemma-3-27b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    raw = RawTokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(r"\n+", "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r" ", "removed"), pre_tokenizers.Split("\n\n\n", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=MARKS[:2],
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        chat_template=CHAT,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An oracle and its folder, with processor."""
    text = gemma3(vocab_size=len(VOCABULARY), final_logit_softcapping=5.0, pad_token_id=0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = SiglipVisionConfig(
        **tower, num_hidden_layers=2, image_size=SIDE, patch_size=4, vision_use_head=False
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=VISUAL,
        image_token_index=IMAGE_ID,
    )
    config._attn_implementation = "eager"
    oracle = Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in oracle.parameters():
            std = 0.3 if parameter.ndim == 1 else 0.25
            parameter.normal_(0, std, generator=generator)
    oracle.tie_weights()
    oracle.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp("gemma3")
    oracle.save_pretrained(folder)
    image = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    Gemma3Processor(image, tokenizer(), CHAT, image_seq_length=VISUAL).save_pretrained(folder)
    return oracle, folder


def rows(images: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(3)
    found = []
    for number, count in enumerate(images):
        row = [2, *rng.integers(10, len(VOCABULARY), 2 + number)]
        for _ in range(count):
            row += [5, *[IMAGE_ID] * VISUAL, 6, *rng.integers(10, len(VOCABULARY), 3)]
        found.append([int(i) for i in row])
    return found


def inputs(images: tuple[int, ...], left: bool):
    prompts = rows(images)
    length = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), length), int), np.zeros((len(prompts), length), int)
    for number, row in enumerate(prompts):
        where = slice(length - len(row), None) if left else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    made = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        pixels = np.random.default_rng(8).standard_normal((sum(images), 3, SIDE, SIDE))
        made["pixel_values"] = pixels.astype(np.float32)
    return made


def theirs(given):
    """As the processor gives them: it says which tokens stand for images."""
    tensors = {name: torch.tensor(x) for name, x in given.items()}
    return tensors | {"token_type_ids": (tensors["input_ids"] == IMAGE_ID).long()}


@pytest.fixture(scope="module")
def model(saved):
    return mj.load(saved[1])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("images", [(0, 0), (1, 0, 2)], ids=str)
def test_logits(saved, model, images, left):
    given = inputs(images, left)
    with torch.no_grad():
        expected = saved[0](**theirs(given)).logits.numpy()
    logits = np.asarray(model.logits(**given))
    real = given["attention_mask"] == 1
    assert expected[real].std() > 0.2
    assert np.abs(logits - expected)[real].max() <= 1e-4
    if sum(images):  # the window of 4 is as long as an image, so what they see of it matters
        causal = saved[0](**{k: x for k, x in theirs(given).items() if k != "token_type_ids"})
        assert np.abs(causal.logits.detach().numpy() - expected)[real].max() > 1e-2


def test_greedy_tokens(saved, model):
    given = inputs((1, 0, 2), True)
    with torch.no_grad():
        out = (
            saved[0]
            .generate(**theirs(given), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[
                :, given["input_ids"].shape[1] :
            ]
            .numpy()
        )
    batch = hf_batch(*given.values(), IMAGE_ID, VISUAL)
    found = Engine(model.mllm, eos_ids=(), pad_id=0).generate(batch, NEW)
    np.testing.assert_array_equal(found.tokens, out)


def test_prompts_are_the_processors(saved, model):
    """Text, system prompts and images come out as the folder's own chat template has them."""
    processor = AutoProcessor.from_pretrained(saved[1])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 41, 3), np.uint8))
    said = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}
    ]
    text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    expected = processor(text=text, images=[picture], return_tensors="np", add_special_tokens=False)
    sample = Sample("x", (Turn("<image>\nwhat is this ?"),), (picture,))
    row = model.processor.row(sample)
    ids = np.where(row.image >= 0, IMAGE_ID, row.tokens)
    assert ids.tolist() == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(row.pixels[0].transpose(2, 0, 1), expected["pixel_values"][0])


def test_back_and_forth(saved, model, tmp_path):
    given = inputs((1, 0), True)
    export_hf(model.mllm, tmp_path / "out", model.processor)
    back, report = Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    with torch.no_grad():
        expected = saved[0](**theirs(given)).logits.numpy()
        logits = back.eval()(**theirs(given)).logits.numpy()
    real = given["attention_mask"] == 1
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)
    assert mj.load(tmp_path / "out").processor.template == model.processor.template
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_seq_length == VISUAL


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("gemma")])
def test_named_sizes_are_the_published_ones(name):
    hf = Gemma3Config(**PUBLISHED, text_config=TEXT | SIZES[name]).to_dict()
    assert config_from_hf(hf) == mllm_config(name)
    assert config_from_hf(hf_config(mllm_config(name))) == mllm_config(name)


def test_what_is_refused(saved, tmp_path):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for changes, message in (
        ({"mm_tokens_per_image": 5}, "mm_tokens_per_image=5 is not supported: 4 x 4 patches"),
        ({"novel": 1}, "novel=1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            mj.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match=r"multimodal family 'qwen2_vl'.*gemma3, llava"):
        mj.load(tmp_path)


def test_questions_share_an_image(model):
    """A shared beginning ends behind an image, never inside it, whose tokens see each other."""
    pictures = np.random.default_rng(1).integers(0, 255, (2, SIDE, SIDE, 3), np.uint8)
    asked = ["what is this ?", "is this a cat ?", "a cat and what is this ?"]
    images, answers = [pictures[i] for i in (0, 0, 1)], ["a cat", "this"]
    together = model.score(asked, [answers] * 3, images)
    for found, question, image in zip(together, asked, images, strict=True):
        for answer, one in zip(answers, found, strict=True):
            [whole] = model.score(question, [answer], image)
            assert abs(one.logprob - whole.logprob) <= 1e-5
    assert to_grid(np.arange(float(VISUAL)), model.config).tolist() == [[0, 1], [2, 3]]
    centres = model.config.visual_token_centres()
    assert centres.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
