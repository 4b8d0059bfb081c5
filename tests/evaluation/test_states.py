"""Hidden states of answers to benchmarks: what is asked, the command, its folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moresjax.analysis.states import States
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.states import Selection, task_states
from moresjax.testing.models import talking_model

BASE = Path(__file__).parents[1] / "fixtures" / "v0_1" / "base"


@pytest.mark.parametrize(
    ("text", "answer", "chosen"),
    [
        ("answer~yes", "Yes.", True),
        ("answer~yes;maybe", ["no", "maybe", "maybe"], True),
        ("answer=yes", "yes it is", False),
        ("answer=no;yes", "YES", True),
        ("prompt~two", None, True),
        ("id=7", None, True),
        ("kind=count", None, True),
        ("kind~x", None, False),
    ],
)
def test_questions_are_selected_by_a_field(text, answer, chosen):
    example = Example("7", "Is there a TWO?", answer, metadata={"kind": "count"})
    assert Selection.parse(text)(example) == chosen


def test_a_wrong_selection_is_told():
    for text in ("answer", "~yes", "answer~", "answer~ ; "):
        with pytest.raises(UserError, match="--select is FIELD~WORD;WORD"):
            Selection.parse(text)
    with pytest.raises(UserError, match="field of question 7 'type'; choose from: id, prompt, "):
        Selection.parse("type=a")(Example("7", "?", metadata={"kind": "count"}))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    asked = [
        ("1", "a.png", "how many digits ?", "red"),
        ("2", "a.png", "what is the sum ?", "seven"),
        ("3", "broken.png", "what is the sum ?", "red and blue"),
        ("4", "a.png", "is there a two ?", "BLUE"),
    ]
    names = ("id", "image", "question", "answer")
    lines = [json.dumps(dict(zip(names, one, strict=True))) for one in asked]
    (folder / "q.jsonl").write_text("\n".join(lines))
    return folder / "q.jsonl"


def test_the_command_writes_a_folder_that_it_goes_on_with(questions, tmp_path, capsys, caplog):
    out = tmp_path / "s"
    command = ["analyze", "states", "--model", str(BASE), "--tasks", str(questions), "--json"]
    command += ["--class", "colors", "--layers", "deep", "--max-new-tokens", "2"]
    command += ["--batch-size", "4", "--store-dtype", "float16", "--out", str(out)]
    for _ in range(2):
        assert main(command) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (shown["states"], shown["found"]) == (2, 2)
    assert "item 3 is left out: " in caplog.text
    states = States(out)
    assert sorted(states.ids) == ["1", "4"]
    assert states.matrix(layer=states.layers[-1]).dtype == np.float16
    row = states.index[states.ids.index("1")]
    assert row["answers"] == "red"
    assert row["metadata"]["task"] == states.meta["tasks"][0]
    assert (states.meta["class"], states.meta["take"], states.meta["seed"]) == (
        "colors",
        "prompt",
        0,
    )
    assert main([*command, "--take", "answer"]) == 2
    assert "holds states with" in capsys.readouterr().err


def test_a_list_of_words_is_what_is_taken(tmp_path):
    (tmp_path / "w.txt").write_text("two\nseven\n")
    model, words = talking_model(), str(tmp_path / "w.txt")
    options = {"words": words, "take": "token", "max_new_tokens": 2, "batch_size": 16}
    states = task_states(model, ["digits"], sample=8, seed=1, **options)
    assert states.meta["take"] == "token(two;seven)"
    assert len(states.sites) == 1
    assert {row["metadata"]["task"] for row in states.index} == set(
        name.partition("/")[0] for name in states.ids
    )
    for row in states.index:
        assert any(word in row["answers"] for word in ("two", "seven"))
        assert row["found"] == any(w in row["prediction"].split() for w in ("two", "seven"))
    with pytest.raises(UserError, match=r"no question of .* is selected"):
        task_states(model, ["digits"], limit=2, select=["answer=zebra"])
