"""Tokenizers of the kinds that LLMs have: the rows' ids and labels are the reference's.

`tiny_tokenizers` makes them.
"""

import numpy as np
import pytest
from tiny_tokenizers import KINDS, VISUAL, byte_level, reference_ids

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.data.templates import TEMPLATES, get_template

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


def row_of(tokenizer, template: str, sample: Sample = TALK):
    processor = Processor(tokenizer, get_template(template, tokenizer), ImageProcessor(12), VISUAL)
    return processor.row(sample)


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
