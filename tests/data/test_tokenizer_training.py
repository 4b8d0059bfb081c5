"""Tokenizers trained on texts of one's own."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample, Turn
from moresjax.data.templates import get_template
from moresjax.data.tokenizer import ALGORITHMS, SPECIAL, read_texts, train_tokenizer

TEXTS = (Path(__file__).parents[2] / "README.md").read_text().splitlines()


@pytest.fixture(scope="module", params=ALGORITHMS)
def tokenizer(request):
    return train_tokenizer(TEXTS, 600, algorithm=request.param, add_tokens=("<|im_end|>",))


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_control_tokens_are_single_and_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read.convert_tokens_to_ids([*SPECIAL, "<|im_end|>"]) == [0, 1, 2, 3, 4]
    assert (read.pad_token_id, read.bos_token_id, read.eos_token_id) == (0, 1, 2)
    assert (
        read("the image encoder", add_special_tokens=False).input_ids
        == tokenizer("the image encoder").input_ids[1:]
    )
    assert len(read(TEXTS[0]).input_ids) < len(TEXTS[0])  # it has learned


def test_answers_are_labelled_to_the_letter(tokenizer):
    sample = Sample("one", (Turn("a red cübe ?", "blaü 🙂"),))
    row = Processor(tokenizer, get_template("vicuna_v1")).row(sample)
    answer = row.tokens[row.kind == TokenKind.ANSWER]
    assert tokenizer.decode(answer) == " blaü 🙂</s>"


def test_bpe_is_the_same_each_time():
    one, other = (train_tokenizer(TEXTS, 600).get_vocab() for _ in range(2))
    assert one == other


def test_from_files_by_the_command_line(tmp_path, capsys):
    turns = [{"from": "human", "value": "<image>\nwhich colour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": "1", "image": "missing.png", "conversations": turns}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.txt").write_text("first line\n\nsecond line\n")
    files = f"{tmp_path}/a.json;{tmp_path}/b.txt"
    assert list(read_texts(files)) == ["\nwhich colour? red", "first line", "second line"]
    command = ["data", "tokenizer", "--files", files, "--out", str(tmp_path / "tokenizer")]
    assert main([*command, "--vocab-size", "270", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == tokens <= 270
    for option, value, words in (
        ("--vocab-size", "100", "too small"),
        ("--algorithm", "wordpiece", "choose from"),
        ("--files", f"{tmp_path}/none.txt", "none.txt"),
    ):
        assert main([*command, option, value]) == 2
        assert words in capsys.readouterr().err


def test_no_text_is_one_sentence():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 300)
