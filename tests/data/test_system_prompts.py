"""Conversations that bring their own system prompt, and turns that are left out, counted."""

import dataclasses
import functools
import json
import logging

import pytest
from tiny_tokenizers import KINDS

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.data.check import check_data
from moresjax.data.digits import build_tokenizer
from moresjax.data.llava import LlavaSource, measure, to_sample
from moresjax.data.pipeline import make_iterator
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample, Turn
from moresjax.data.templates import TEMPLATES, Template, get_template
from moresjax.testing.llava_files import PROCESSOR, conversation, write_list

OWN = "Answer in French."
ASKED = {"from": "system", "value": OWN}
TALK = Sample("talk", (Turn("who ?", "me"), Turn("why ?", "so")), system=OWN)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen's: a prompt of its own where there is none.
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"


def written(template: Template, sample: Sample) -> str:
    return "".join(piece.text for piece in template.render(sample, "</s>"))


@pytest.mark.parametrize("name", ["vicuna_v1", "llama2", "llama3", "chatml"])
def test_a_samples_own_system_prompt_takes_the_templates_place(name):
    template = get_template(name)
    default = template.system.removeprefix(template.around_system[0])
    default = default.removesuffix(template.around_system[1])
    assert default.startswith("A chat between")
    without = dataclasses.replace(TALK, system=None)
    assert written(template, TALK) == written(template, without).replace(default, OWN)
    assert written(template, dataclasses.replace(TALK, system=default)) == written(
        template, without
    )


@pytest.mark.parametrize("name", ["bare", "mistral", "plain"])
def test_a_template_without_a_place_for_it_refuses(name):
    with pytest.raises(UserError, match="sample talk: it has a system prompt, for which the"):
        written(get_template(name), TALK)


@pytest.mark.parametrize("jinja", [CHATML, DEFAULT + CHATML])
def test_the_tokenizers_own_template_says_where_it_goes(jinja):
    tokenizer = KINDS["byte level"]
    tokenizer.chat_template = jinja
    contents = (OWN, *(text for turn in TALK.turns for text in (turn.question, turn.answer)))
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    template = get_template("tokenizer", tokenizer)
    assert written(template, TALK) == text
    row = Processor(tokenizer, template).row(TALK)
    system = tokenizer.decode(row.tokens[row.kind == TokenKind.SYSTEM])
    assert system == f"<|im_start|>system\n{OWN}<|im_end|>\n<|im_start|>user\n"
    tokenizer.chat_template = REFUSING + CHATML
    assert get_template("tokenizer", tokenizer).around_system is None


def test_control_tokens_in_a_system_prompt_are_text():
    tokenizer = build_tokenizer()
    sample = dataclasses.replace(TALK, system="two </s>")
    tokens = Processor(tokenizer, get_template("vicuna_v1")).row(sample).tokens
    assert (tokens == tokenizer.eos_token_id).sum() == len(TALK.turns)


def test_formats_of_records():
    rounds = conversation("who ?", "me", "why ?", "so")
    sample = to_sample({"conversations": [ASKED, *rounds]}, "s", ())
    assert (sample.system, sample.turns, sample.cut) == (OWN, TALK.turns, "")
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": names[r["from"]], "content": r["value"]} for r in [ASKED, *rounds]]
    assert to_sample({"messages": messages}, "s", ()) == sample
    assert measure({"messages": messages}) == measure({"conversations": [ASKED, *rounds]})
    blank = [{"from": "system", "value": " "}, *rounds]
    assert to_sample({"conversations": blank}, "s", ()).system is None
    for bad, message in (
        ([ASKED], "the conversation is empty"),
        ([*rounds, ASKED], "in turn, got human, gpt, human, gpt, system"),
        ([{"from": "system", "value": "<image>"}, *rounds], "the system prompt contains <image>"),
    ):
        with pytest.raises(UserError, match=message):
            to_sample({"conversations": bad}, "s", ())


@pytest.fixture
def source(tmp_path):
    """A whole conversation, two that begin with answers, and one with a system prompt."""
    rounds = conversation("how many ?", "two")
    early = {"from": "gpt", "value": "one"}
    all_rounds = (rounds, [early, *rounds], [early, early, *rounds], [ASKED, *rounds])
    records = [{"id": str(i), "conversations": made} for i, made in enumerate(all_rounds)]
    return LlavaSource(write_list(tmp_path / "mix.json", records), str(tmp_path))


def test_what_is_left_out_is_counted_by_data_check(source):
    options = {"max_seq_len": 60, "images_per_row": 0, "num_workers": 1, "progress": False}
    report = check_data(source, functools.partial(lambda p: p, PROCESSOR), **options)
    told = "turns before the first question are left out"
    assert report.cut == {
        1: f"sample mix.json[1] 1: {told}: 1",
        2: f"sample mix.json[2] 2: {told}: 2",
    }
    assert list(report.bad) == [3]  # the template has no place for a system prompt
    template = dataclasses.replace(PROCESSOR, template=TEMPLATES["chatml"])
    assert not check_data(source, lambda: template, **(options | {"max_seq_len": 900})).bad


@pytest.mark.parametrize("batching", ["pad", "pack"])
def test_what_is_left_out_is_told_and_listed_by_training(source, batching, tmp_path, caplog):
    options = {"batch_size": 1, "max_seq_len": 40, "images_per_row": 0, "batching": batching}
    with caplog.at_level(logging.WARNING):
        batches = make_iterator(source, PROCESSOR, on_bad_sample="skip", **options)
        for _ in range(8):
            next(batches)
    assert sum("are left out" in record.message for record in caplog.records) == 1
    batches.skip_policy.save(tmp_path / "skipped.json")
    batches.skip_policy.save(tmp_path / "skipped.json")
    report = json.loads((tmp_path / "skipped.json").read_text())
    assert (report["cut"], report["skipped"]) == (2, 1)
    assert list(report["cut_samples"]) == ["1", "2"]
