"""Tokenizers of the kinds that LLMs have: the rows' ids and labels are the reference's.

They are trained here on a few sentences: SentencePiece's byte-pair encoding with a blank before the
first word (LLaMA), and byte-level pairs without one (GPT-2, Phi, Qwen).
"""

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.data.templates import TEMPLATES, get_template

VISUAL = 4
CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the image? ASSISTANT: A cat on a mat.\n",
    "How many dogs are there? Two dogs, one of them brown.",
)
IMAGE = np.zeros((12, 12, 3), np.uint8)
TALK = Sample(
    "talk",
    (
        Turn(f"{IMAGE_MARK}\nWhat is in the image?", "A cat on a mat."),
        Turn(f"How many dogs are there? {IMAGE_MARK}", "Two naïve dogs…"),
    ),
    (IMAGE, IMAGE),
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['role'] }}: "
    "{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sentencepiece(bos: bool) -> PreTrainedTokenizerFast:
    """A blank before the first word, bytes for what is unknown, and BOS if wanted."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no pair across words
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as letters, no blank before the first word, no BOS; end and beginning are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


KINDS = {
    "sentencepiece with bos": sentencepiece(bos=True),
    "sentencepiece without bos": sentencepiece(bos=False),
    "byte level": byte_level(),
}


def row_of(tokenizer, template: str, sample: Sample = TALK):
    processor = Processor(tokenizer, get_template(template, tokenizer), ImageProcessor(12), VISUAL)
    return processor.row(sample)


def reference_ids(tokenizer, text: str) -> list[int | None]:
    """LLaVA's: the text between two images is tokenised by itself, BOS once; None is an image."""
    ids = tokenizer("").input_ids
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        ids += [None] * VISUAL * bool(number)
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def ids_of(row) -> list[int | None]:
    images = row.kind == TokenKind.IMAGE
    return [None if image else int(t) for t, image in zip(row.tokens, images, strict=True)]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_pieces_between_images(kind, template):
    tokenizer = KINDS[kind]
    text = "".join(p.text for p in get_template(template).render(TALK, tokenizer.eos_token))
    assert text.count(IMAGE_MARK) == 2
    assert ids_of(row_of(tokenizer, template)) == reference_ids(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_decode_to_the_answers_and_their_ends(kind):
    tokenizer = KINDS[kind]
    row = row_of(tokenizer, "vicuna_v1")
    answers = tokenizer.decode(row.tokens[row.kind == TokenKind.ANSWER])
    end = tokenizer.eos_token
    words = answers.replace(" ", "")
    assert words == f"Acatonamat.{end}Twonaïvedogs…{end}"


def test_beginning_tokens_follow_the_tokenizer():
    begins = {kind: int(row_of(t, "vicuna_v1").tokens[0]) for kind, t in KINDS.items()}
    assert begins["sentencepiece with bos"] == 1
    assert begins["sentencepiece without bos"] != 1
    assert begins["byte level"] != 0


@pytest.mark.parametrize(
    ("kind", "jinja"),
    [
        ("byte level", CHATML),
        ("sentencepiece with bos", BRACKETS),
        ("sentencepiece without bos", BRACKETS),
    ],
)
def test_the_tokenizers_own_chat_template(kind, jinja):
    tokenizer = KINDS[kind]
    tokenizer.chat_template = jinja
    rounds = [
        {"role": role, "content": text}
        for turn in TALK.turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    text = tokenizer.apply_chat_template(rounds, tokenize=False)
    if "with bos" in kind:
        text = text.removeprefix("<s>")
    assert ids_of(row_of(tokenizer, "tokenizer")) == reference_ids(tokenizer, text)
    prompt = Sample("prompt", (Turn("How many?"),))
    asked = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    if "with bos" in kind:
        text = text.removeprefix("<s>")
    assert ids_of(row_of(tokenizer, "tokenizer", prompt)) == reference_ids(tokenizer, text)


def test_chat_templates_that_cannot_be_used():
    tokenizer = byte_level()
    with pytest.raises(UserError, match="no chat template"):
        get_template("tokenizer", tokenizer)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(UserError, match="changes what it wrote"):
        get_template("tokenizer", tokenizer)
