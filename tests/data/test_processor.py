"""Samples to rows: one tokenisation for ids and kinds, branches, images, templates, errors."""

import copy
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind, loss_mask
from moresjax.core.row import FIELDS
from moresjax.data.digits import DigitsSource, build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK, Sample, Turn
from moresjax.data.templates import TEMPLATES, get_template
from moresjax.inference.model import Model
from moresjax.testing.models import tiny_model

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
VISUAL = 9
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: kinds can be read off letter by letter."""
    characters = {chr(i): i for i in range(32, 127)} | {"\n": 10, "?": 63}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrapped(tokenizer)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding without word borders: tokens run across roles, questions and answers."""
    tokenizer = Tokenizer(models.BPE())
    texts = [
        SYSTEM + "USER: what is it ? ASSISTANT: it is a cat",
        "ASSISTANT: yes",
        "ASSISTANT: no",
    ]
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=180, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 4, trainer)
    return wrapped(tokenizer)


CHARACTERS, MERGING, DIGITS = character_tokenizer(), merging_tokenizer(), build_tokenizer()


def processor(tokenizer=CHARACTERS, template="vicuna_v1", visual=VISUAL) -> Processor:
    return Processor(tokenizer, get_template(template), ImageProcessor(12), visual)


def text_of(sample: Sample, template: str, eos="</s>") -> str:
    return "".join(piece.text for piece in get_template(template).render(sample, eos))


def spans(sample: Sample, template: str) -> list[tuple[int, int, str]]:
    """Kind, branch and text of neighbouring pieces that agree in the first two."""
    pieces = get_template(template).render(sample, "</s>")
    groups = itertools.groupby(pieces, lambda piece: (piece.kind, piece.branch))
    return [(*key, "".join(piece.text for piece in group)) for key, group in groups]


def words(row, kind, tokenizer=CHARACTERS) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(row.tokens[row.kind == kind]))


# Templates


TALK = Sample("talk", (Turn("<image>\nwho ?", "me"), Turn("why ?", "so")), (PHOTO,))
BRANCHES = Sample(
    "branches", (Turn("who ?", "me"), Turn("why ?", "so")), (PHOTO,), "<image>\n", independent=True
)


@pytest.mark.parametrize("template", ["vicuna_v1", "phi", "gemma"])
def test_text_of_a_conversation(template):
    assert text_of(TALK, template) == (
        SYSTEM + "USER: <image>\nwho ? ASSISTANT: me</s>USER: why ? ASSISTANT: so</s>"
    )
    assert text_of(TALK, template, "<|endoftext|>").endswith(" ASSISTANT: so<|endoftext|>")


ANSWER = TokenKind.ANSWER
CHATS = {
    "llama2": (
        f"[INST] <<SYS>>\n{SYSTEM.strip()}\n<</SYS>>\n\n<image>\nwho ? [/INST] me </s>"
        "<s>[INST] why ? [/INST] so </s>"
    ),
    "mistral": "[INST] <image>\nwho ? [/INST] me</s>[INST] why ? [/INST] so</s>",
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM.strip()}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwho ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nme<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhy ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nso<|eot_id|>"
    ),
    "chatml": (
        f"<|im_start|>system\n{SYSTEM.strip()}<|im_end|>\n"
        "<|im_start|>user\n<image>\nwho ?<|im_end|>\n<|im_start|>assistant\nme<|im_end|>\n"
        "<|im_start|>user\nwhy ?<|im_end|>\n<|im_start|>assistant\nso<|im_end|>"
    ),
}


@pytest.mark.parametrize("template", CHATS)
def test_text_of_the_chat_versions(template):
    assert text_of(TALK, template) == CHATS[template]
    answers = [text for kind, _, text in spans(TALK, template) if kind == ANSWER]
    end = {"llama2": " </s>", "mistral": "</s>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
    assert [text.removesuffix(end[template]).strip() for text in answers] == ["me", "so"]
    # What the model is asked with is what it was trained after.
    prompt = Sample("prompt", (*TALK.turns[:1], Turn("why ?")), (PHOTO,))
    assert CHATS[template].startswith(text_of(prompt, template))


def test_generation_ends_at_the_templates_own_end_token():
    ends = processor(template="vicuna_v1").eos_ids
    assert ends == (CHARACTERS.eos_token_id,)
    tokenizer = copy.deepcopy(CHARACTERS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    own = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor(tokenizer, "chatml").eos_ids == tuple(sorted((*ends, own)))


def test_text_of_a_prompt_ends_where_the_answer_starts():
    prompt = Sample("prompt", (Turn("who ?", "me"), Turn("why ?")))
    assert text_of(prompt, "vicuna_v1") == (
        SYSTEM + "USER: who ? ASSISTANT: me</s>USER: why ? ASSISTANT:"
    )
    assert text_of(prompt, "bare") == "who ? me</s>why ?"


def test_text_of_connector_pretraining():
    sample = Sample("caption", (Turn("<image>\nDescribe it.", "a cat"),), (PHOTO,))
    assert text_of(sample, "plain") == "<image>a cat\n"
    two = Sample("caption", (Turn(None, "two cats"),), (PHOTO, PHOTO))
    assert text_of(two, "plain") == "<image><image>two cats\n"


def test_a_prompt_for_a_caption_has_no_answer():
    prompt = Sample("prompt", (Turn("<image>\nDescribe it."),), (PHOTO,))
    assert text_of(prompt, "plain") == "<image>"


def test_text_without_markers():
    assert text_of(TALK, "bare") == "<image>\nwho ? me</s>why ? so</s>"
    assert text_of(BRANCHES, "bare") == "<image>\nwho ? me</s>\nwhy ? so</s>"
    goes_on = Sample("text", (Turn(None, "and on"), Turn("why ?", "so")), context="once ")
    assert text_of(goes_on, "bare") == "once and on\nwhy ? so</s>"


def test_independent_questions_have_no_marker_between_them():
    assert text_of(BRANCHES, "vicuna_v1") == (
        SYSTEM + "USER: <image>\nwho ? ASSISTANT: me</s>\nwhy ? ASSISTANT: so</s>"
    )


def test_segments_and_branches_of_pieces():
    assert [(kind, branch) for kind, branch, _ in spans(BRANCHES, "vicuna_v1")] == [
        (TokenKind.SYSTEM, 0),
        (TokenKind.QUESTION, 0),
        (TokenKind.QUESTION, 1),
        (TokenKind.ANSWER, 1),
        (TokenKind.QUESTION, 2),
        (TokenKind.ANSWER, 2),
    ]


def test_unknown_template():
    with pytest.raises(UserError, match=r"unknown template 'v2'; choose from: vicuna_v1, phi"):
        get_template("v2")


def test_minigpt_writes_around_images_and_says_the_task():
    def written(question: str, context: str = "", images: int = 1) -> str:
        turns = (Turn(question, "me"), Turn("why ?", "so"))
        return text_of(Sample("1", turns, (PHOTO,) * images, context), "minigpt_v2")

    later = " [/INST] me</s>[INST] [vqa] why ? [/INST] so</s>"
    asked = f"[INST] <Img>{IMAGE_MARK}</Img> [vqa] who ?"
    assert written(f"{IMAGE_MARK}\nwho ?") == written(" who ?", f"{IMAGE_MARK}\n") == asked + later
    both = f"[INST] see <Img>{IMAGE_MARK}</Img> <Img>{IMAGE_MARK}</Img> [vqa] who ?"
    assert written(f"see {IMAGE_MARK} {IMAGE_MARK}who ?", images=2) == both + later
    bare = later.replace("[vqa] ", "")
    assert written("who ?", images=0) == f"[INST] who ?{bare}"
    caption = get_template("minigpt_v2_caption").render(
        Sample("1", (Turn(f"{IMAGE_MARK} it"),), (PHOTO,)), ""
    )
    assert "".join(piece.text for piece in caption).endswith("</Img> [caption] it [/INST]")
    # The system's text goes on up to the image; marks stay on their words.
    sample = Sample("1", (Turn(f"{IMAGE_MARK}\nwho is it ?", "me"),), (PHOTO,))
    row = dataclasses.replace(processor(template="minigpt_v2"), marks=("word(2)",)).row(sample)
    assert words(row, TokenKind.SYSTEM) == "[INST] <Img>"
    assert row.marks is not None
    assert "".join(CHARACTERS.convert_ids_to_tokens(row.tokens[row.marks > 0])) == "is"


# One tokenisation

PROSE = st.text("abc ?:SIANT", min_size=1, max_size=12)
CONVERSATIONS = st.lists(st.tuples(PROSE, PROSE), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS, st.sampled_from(sorted(TEMPLATES)))
def test_ids_are_those_of_the_joined_text(turns, template):
    sample = Sample("sample", tuple(Turn(q, a) for q, a in turns))
    for tokenizer in (CHARACTERS, MERGING):
        row = processor(tokenizer, template).row(sample)
        joined = text_of(sample, template)
        assert row.tokens.tolist() == tokenizer(joined)["input_ids"]
        assert {len(x) for x in row.fields.values()} == {len(row)}
        np.testing.assert_array_equal(row.position, np.arange(len(row)))


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS)
def test_answers_and_nothing_else_are_answers(turns):
    sample = Sample("sample", tuple(Turn(q, a) for q, a in turns))
    row = processor().row(sample)
    assert words(row, TokenKind.ANSWER) == "".join(f" {a}</s>" for _, a in turns)
    assert words(row, TokenKind.SYSTEM) == SYSTEM + "USER: "
    asked = "USER: ".join(f"{q} ASSISTANT:" for q, _ in turns)
    assert words(row, TokenKind.QUESTION) == asked


def merged_and_by_character(sample: Sample):
    """Row with merged tokens, the characters' kinds, and each token's first and last one."""
    row, by_character = processor(MERGING).row(sample), processor().row(sample).kind
    tokens = MERGING.convert_ids_to_tokens(row.tokens)
    ends = np.cumsum([1 if token == "</s>" else len(token) for token in tokens])
    return row, by_character, np.concatenate([[0], ends[:-1]]), ends - 1


@settings(max_examples=60, deadline=None)
@given(CONVERSATIONS)
def test_a_token_across_a_border_belongs_to_its_last_character(turns):
    sample = Sample("sample", tuple(Turn(q, a) for q, a in turns))
    row, by_character, _, last = merged_and_by_character(sample)
    np.testing.assert_array_equal(row.kind, by_character[last])


def test_merged_tokens_do_cross_borders():
    sample = Sample("sample", (Turn("what is it ?", "yes"),))
    row, by_character, first, last = merged_and_by_character(sample)
    crossing = by_character[first] != by_character[last]
    assert (crossing & (row.kind == TokenKind.ANSWER)).any()


def test_the_loss_is_on_the_answer_alone():
    p = processor()
    row = p.row(Sample("sample", (Turn("who ?", "me"), Turn("why ?", "so"))))
    batch = p.batch([p.pad(row, len(row) + 3, 0)])
    predicted = np.roll(np.asarray(loss_mask(batch.layout)), 1, axis=1)
    spoken = CHARACTERS.convert_ids_to_tokens(batch.tokens[predicted])
    assert "".join(spoken) == " me</s> so</s>"


def test_bos_is_the_systems():
    row = processor(DIGITS, "bare").row(Sample("sample", (Turn("what is at top-left ?", "two"),)))
    assert DIGITS.decode(row.tokens) == "<s> what is at top-left ? two </s>"
    assert row.kind.tolist() == [TokenKind.SYSTEM] + [TokenKind.QUESTION] * 5 + [
        TokenKind.ANSWER,
        TokenKind.ANSWER,
    ]


# Images


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("ab ", max_size=4), min_size=1, max_size=4), PROSE)
def test_images_stand_where_their_marks_are(texts, answer):
    count = len(texts) - 1
    images = tuple(np.full((12, 12, 3), 10 * i, np.uint8) for i in range(count))
    sample = Sample("sample", (Turn(IMAGE_MARK.join(texts), answer),), images)
    row = processor(visual=3).row(sample)
    shown, kind = row.image, row.kind
    np.testing.assert_array_equal(shown >= 0, kind == TokenKind.IMAGE)
    np.testing.assert_array_equal(shown[shown >= 0], np.arange(3 * count))
    np.testing.assert_array_equal(row.position, np.arange(len(shown)))
    # Without the visual tokens it is the text without its marks, image by image in place.
    marked, last = "", 0
    for place in np.flatnonzero((shown >= 0) & (shown % 3 == 0)):
        marked += "".join(CHARACTERS.convert_ids_to_tokens(row.tokens[last:place])) + IMAGE_MARK
        last = place + 3
    marked += "".join(CHARACTERS.convert_ids_to_tokens(row.tokens[last:]))
    assert marked == text_of(sample, "vicuna_v1")
    if count:
        assert row.pixels.shape == (count, 12, 12, 3)
        expected = [10 * i / 127.5 - 1 for i in range(count)]
        np.testing.assert_allclose(row.pixels[:, 0, 0, 0], expected, atol=1e-6)
    else:
        assert row.pixels is None


def test_padding():
    p = processor()
    row = p.row(TALK)
    length = len(row)
    padded = p.pad(row, length + 5, 2)
    for name in FIELDS:
        assert padded.fields[name].dtype == np.int32
        np.testing.assert_array_equal(padded.fields[name][:length], row.fields[name])
    assert (padded.kind[length:] == TokenKind.PAD).all()
    assert (padded.image[length:] == -1).all()
    assert padded.pixels.shape == (2, 12, 12, 3)
    np.testing.assert_array_equal(padded.pixels[0], row.pixels[0])
    assert (padded.pixels[1] == 0).all()
    batch = p.batch([padded, p.pad(p.row(Sample("text", (Turn("a", "b"),))), length + 5, 2)])
    assert batch.layout.shape == batch.tokens.shape == (2, length + 5)
    assert batch.layout.visual_tokens == VISUAL
    assert (batch.pixels[1] == 0).all()


# Branches


@pytest.fixture(scope="module")
def digits_model() -> Model:
    return Model(tiny_model(vocab_size=37), processor(DIGITS, "bare"))


def logits_of(model: Model, rows, length: int) -> np.ndarray:
    p = model.processor
    batch = p.batch([p.pad(row, length, 1) for row in rows])
    run = jax.jit(lambda mllm, batch: mllm.llm.logits(mllm(batch).hidden))
    return np.asarray(run(model.mllm, batch))


def test_independent_questions_do_not_see_each_other(digits_model):
    p = digits_model.processor
    sample = DigitsSource("instruct", "test", questions=4)[2]
    together = p.row(sample)
    alone = [p.row(dataclasses.replace(sample, turns=(turn,))) for turn in sample.turns]
    logits = logits_of(digits_model, [together, *alone], len(together) + 2)
    trunk = np.flatnonzero(together.branch == 0)
    assert (together.kind[trunk] == TokenKind.IMAGE).sum() == VISUAL
    for number, row in enumerate(alone, start=1):
        places = np.concatenate([trunk, np.flatnonzero(together.branch == number)])
        for name in ("tokens", "kind", "image", "position", "document"):
            shown = together.fields[name][places]
            np.testing.assert_array_equal(shown, row.fields[name], err_msg=name)
        difference = logits[0, places] - logits[number, : len(places)]
        assert np.abs(difference).max() <= 1e-5
    # The questions themselves do matter.
    first, second = (np.flatnonzero(together.branch == n)[-1] for n in (1, 2))
    assert np.abs(logits[0, first] - logits[0, second]).max() > 1e-2


def test_rounds_of_a_conversation_do_see_each_other():
    row = processor().row(TALK)
    assert (row.branch == 0).all()
    row = processor().row(BRANCHES)
    assert sorted(set(row.branch)) == [0, 1, 2]
    for branch in (1, 2):
        own = row.position[row.branch == branch]
        trunk = (row.branch == 0).sum()
        np.testing.assert_array_equal(own, np.arange(trunk, trunk + len(own)))


# Errors


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("who ?", (PHOTO,), "sample s-7: the text has 0 <image> but 1 images"),
        ("<image>\nwho ?", (), "sample s-7: the text has 1 <image> but 0 images"),
        ("<image><image>", (PHOTO,), "sample s-7: the text has 2 <image> but 1 images"),
    ],
)
def test_marks_and_images_must_agree(text, images, message):
    with pytest.raises(UserError, match=message):
        processor().row(Sample("s-7", (Turn(text, "me"),), images))


def test_a_row_that_is_too_long_is_not_cut():
    p = processor()
    row = p.row(Sample("s-7", (Turn("who ?", "me"),)))
    length = len(row)
    assert len(p.pad(row, length, 0)) == length
    with pytest.raises(
        UserError, match=f"sample s-7: {length} tokens do not fit into {length - 1}"
    ):
        p.pad(row, length - 1, 0)


def test_too_many_images_for_a_row():
    p = processor()
    row = p.row(Sample("s-7", (Turn("<image><image>", "me"),), (PHOTO, PHOTO)))
    with pytest.raises(UserError, match="sample s-7: 2 images, but rows hold 1"):
        p.pad(row, 500, 1)


def test_images_that_cannot_be_read(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        processor().row(Sample("s-7", (Turn("<image>", "me"),), (broken,)))
    with pytest.raises(UserError, match=r"missing\.png does not exist"):
        processor().row(Sample("s-7", (Turn("<image>", "me"),), (tmp_path / "missing.png",)))


def test_a_text_model_takes_no_images():
    text_only = Processor(CHARACTERS, get_template("vicuna_v1"))
    assert text_only.row(Sample("s-7", (Turn("who ?", "me"),))).pixels is None
    with pytest.raises(UserError, match="sample s-7: this model takes no images"):
        text_only.row(Sample("s-7", (Turn("<image>", "me"),), (PHOTO,)))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast"):
        Processor(Slow(), get_template("bare"))


def test_prompts_of_a_model(digits_model):
    row = digits_model.prompt("what is at top-left ?", [PHOTO])
    assert (row.kind == TokenKind.IMAGE).sum() == VISUAL
    assert DIGITS.decode(row.tokens[row.kind == TokenKind.QUESTION]) == "what is at top-left ?"
    assert not (row.kind == TokenKind.ANSWER).any()
    with pytest.raises(UserError, match="the prompt is empty"):
        digits_model.prompt("  ")
    with pytest.raises(UserError, match="the text has 1 <image> but 2 images"):
        digits_model.prompt("<image> ?", [PHOTO, PHOTO])
    with pytest.raises(UserError, match="2 prompts but 1 entries of images"):
        digits_model.generate(["a", "b"], [[]])
    with pytest.raises(UserError, match="at least 1, got 0"):
        digits_model.generate(["what ?"], max_new_tokens=0)
