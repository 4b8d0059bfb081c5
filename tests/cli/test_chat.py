"""The conversation at the terminal, fed with lines in process."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moresjax.cli.chat import chat_at_terminal
from moresjax.data.check import check_data
from moresjax.data.llava import LlavaSource
from moresjax.data.templates import get_template
from moresjax.generation.engine import Engine
from moresjax.inference.chat import Chat
from moresjax.inference.model import Model
from moresjax.testing.models import randomised_tuning, talking_model
from moresjax.weights.adapter import save_adapter

NEW = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A model whose template has a place for a system prompt, with two adapters."""
    talking = talking_model("mores:positions=all")
    folders = {}
    for seed, name in enumerate(("one", "two")):
        randomised_tuning(talking.mllm, seed, 9.0)
        folders[name] = save_adapter(talking.mllm, tmp_path_factory.mktemp(name))
    processor = dataclasses.replace(talking.processor, template=get_template("vicuna_v1"))
    model = Model(talking.mllm, processor)
    model.load_adapters(folders)
    return model


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """A conversation of some lines: what was answered, and what else was told."""

    def run(*lines: str | type[BaseException], images=(), **options) -> tuple[list[str], str]:
        left = iter(lines)

        def read(_: str) -> str:
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        capsys.readouterr()
        chat_at_terminal(model, "runs/it", images, {"max_new_tokens": NEW} | options)
        assert next(left, None) is None
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err

    return run


@pytest.fixture
def photo(tmp_path) -> str:
    path = tmp_path / "a photo.png"
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    return str(path)


def answers(model, *questions, images=((), ()), **options) -> list[str]:
    chat = Chat(model, **{"max_new_tokens": NEW, "adapter": "one"} | options)
    return ["".join(chat.ask(q, own)) for q, own in zip(questions, images, strict=False)]


def test_a_banner_says_what_answers(talk):
    said, told = talk("/help", "/quit", system="Be brief.")
    assert said == []
    for words in ("runs/it\n  llm: 2 layers", "tuning: mores:positions=all", "adapters: one, two"):
        assert words in told
    assert "template: vicuna_v1/phi/gemma\n  system prompt: Be brief.\n  answering: one" in told
    commands = ("image", "system", "adapter", "reset", "save", "help", "quit")
    assert all(f"\n/{name}" in told for name in commands)


def test_mistakes_cost_nothing_of_the_conversation(model, talk, photo, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    mistakes = {
        "/imgae x.png": "unknown command '/imgae'; choose from: /image, /system",
        f"/image {tmp_path}/none.png": "none.png does not exist",
        f"/image '{photo}' {tmp_path}/text.png": "text.png cannot be read: it is no image file",
        f"/image {tmp_path}/a 'photo": "/image: No closing quotation",
        "/image": "/image needs the path of an image",
        "/adapter three": "unknown adapter 'three'; choose from: one, two, base",
        "/system a <image>": "a system prompt must be a text without <image>",
        "/save": "/save needs the name of a file",
        f"/save {photo}": "exists already; save under another name",
        f"/save {photo}/x.json": "cannot be written",
        "is <image> a two ?": "1 <image> but 0 images",
        "is " * 3000: "do not fit the model's",
        "": "",
    }
    said, told = talk("how many ?", *mistakes, KeyboardInterrupt, "and two ?")
    assert said == answers(model, "how many ?", "and two ?")
    for told_here in (*mistakes.values(), "Ctrl-D or /quit ends the conversation"):
        assert told_here in told
    assert "there is no answer to save yet" in talk(f"/save {tmp_path}/new.json")[1]
    assert not (tmp_path / "new.json").exists()


def test_images_are_of_the_next_question(model, talk, photo):
    asked = ("what is it ?", "how many ?")
    seen = answers(model, *asked, images=([photo], ()))
    assert talk(*asked, images=[photo])[0] == seen
    assert talk(f"/image '{photo}'", *asked)[0] == seen
    assert talk(f"/image '{photo}'", "/reset", *asked)[0] == answers(model, *asked) != seen


def test_lines_that_end_in_a_backslash_go_on(model, talk):
    whole = answers(model, "how many ?\nare there", "/or two")
    assert talk("how many ?\\", "are there", "//or two")[0] == whole
    dropped = talk("what is\\", KeyboardInterrupt, "how many ?\\", "are there", "/or\\")
    assert dropped[0] == whole[:1]
    assert "unknown command '/or'" in dropped[1]


def test_an_answer_that_is_stopped_leaves_the_conversation_as_it_was(model, talk, monkeypatch):
    calls, stop_at, advance = [], [0], Engine.advance

    def counted(self, *args):
        calls.append(args)
        if len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return advance(self, *args)

    monkeypatch.setattr(Engine, "advance", counted)
    whole = answers(model, "two ?", "how", chunk=1)
    first = len(calls)
    answers(model, "two ?", chunk=1)
    stop_at[0] = len(calls) + (len(calls) - first) + 1
    said, told = talk("two ?", "how", "the", chunk=1)
    assert "stopped; the conversation is as it was before the question\n" in told
    assert whole[1].startswith(said[1])
    assert said[1] != whole[1]
    assert [said[0], said[2]] == answers(model, "two ?", "the")


def test_adapter_and_system_prompt_change_on_the_way(model, talk):
    said, told = talk(
        "how many ?", "/adapter two", "two ?", "/reset", "how many ?", "/adapter base", "/reset",
        "/system two .", "how many ?", "/system", "/reset", "how many ?", "/adapter",
    )  # fmt: skip
    one, two, base, plain = (
        answers(model, "how many ?", **changed)[0]
        for changed in (
            {},
            {"adapter": "two"},
            {"adapter": None, "system": "two ."},
            {"adapter": None},
        )
    )
    assert (said[0], *said[2:]) == (one, two, base, plain)
    assert len({one, two, base, plain}) == 4
    chat = Chat(model, max_new_tokens=NEW, adapter="one")
    list(chat.ask("how many ?"))
    chat.adapter, chat._held = "two", None  # read anew
    assert "".join(chat.ask("two ?")) == said[1]
    assert told.endswith("adapter: base of one, two, base\n")


def test_a_saved_conversation_is_data(model, talk, photo, tmp_path):
    away, home = tmp_path / "elsewhere" / "talk.json", tmp_path / "talk.json"
    asked = ("what is <image> here ?", "how many ?")
    lines = f"/image '{photo}'", asked[0], f"/save {home}", asked[1], f"/save {home}"
    said, told = talk("/system two .", *lines, f"/save {away}")
    assert f"{home}: 2 questions and answers" in told
    for file, image in ((home, "a photo.png"), (away, "talk-images/0-a photo.png")):
        (record,) = json.loads(file.read_text())
        assert record["image"] == image
        source = LlavaSource(str(file), str(file.parent))
        report = check_data(
            source,
            functools.partial(lambda p: p, model.processor),
            max_seq_len=300,
            images_per_row=1,
            num_workers=1,
            progress=False,
        )
        assert (report.samples, report.bad, report.too_long, report.cut) == (1, {}, {}, {})
        assert source[0].system == "two ."
        assert [turn.answer for turn in source[0].turns] == said
        assert Path(source[0].images[0]).read_bytes() == Path(photo).read_bytes()


def test_scores_and_logits_are_those_of_the_system_prompt(model):
    asked, own = "is there a two ?", {"system": "two .", "adapters": "one"}
    (answer,) = model.generate([asked], details=True, logprobs=True, max_new_tokens=1, **own)
    logits = model.logits(asked, **own)
    assert int(logits[0, -1].argmax()) == answer.tokens[0]
    text = model.prompts.tokenizer.decode(answer.tokens)
    (scored,) = model.score(asked, [text], **own)
    np.testing.assert_allclose(scored.logprob, answer.logprobs[0], atol=1e-5)
    assert model.logits(asked, adapters="one").shape[1] != logits.shape[1]
