"""`--roi` and `--mark` on the command line: a tuning of a region and of a word, everywhere."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moresjax.cli import main
from moresjax.inference.analyze import attention_map
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.testing.models import randomised_tuning
from moresjax.weights.adapter import save_adapter

BASE = str(Path(__file__).parents[1] / "fixtures" / "v0_1" / "base")
SPEC = "noreft:site=connector.out,rank=2,positions=roi/noreft:rank=2,positions=mark(n)"
PROMPT, LEFT, TWO = "is there a two ?", "0,0,0.5,1", {"n": "two"}
REGION = [0.0, 0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pointing")


@pytest.fixture(scope="module")
def images(folder) -> list[str]:
    rng, paths = np.random.default_rng(0), [str(folder / name) for name in ("a.png", "b.png")]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def model(folder) -> Model:
    """The tuned model, saved as the adapter that the commands load."""
    model = load(BASE, tuning=SPEC)
    randomised_tuning(model.mllm, 0, 4.0)
    save_adapter(model.mllm, folder / "adapter")
    return model


@pytest.fixture(scope="module")
def loaded():
    """The loader, which reads the folder once for every `--roi`."""
    return functools.cache(load)


@pytest.fixture
def run(model, folder, loaded, capsys, monkeypatch):
    """Runs a command with the adapter: its code, and what it prints or the error."""
    monkeypatch.setattr("moresjax.inference.load.load", loaded)

    def command(*words: object) -> tuple[int, str]:
        options = ["--model", BASE, "--adapter", folder / "adapter"]
        code = main([*map(str, [*words, *options])])
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out

    return command


def test_a_prompt_is_answered_about_its_region_and_mark(run, model, images, folder):
    options = {"max_new_tokens": 1, "details": True, "logprobs": True}
    asked = ["generate", "--max-new-tokens", 1, "--logprobs", "--json"]
    pairs = [(REGION, "two"), ([0.5, 0, 1, 1], "two"), (REGION, "there")]
    found = [
        model.generate(PROMPT, images[0], roi=roi, marks={"n": mark}, **options)
        for roi, mark in pairs
    ]
    assert len({one.logprobs[0] for one in found}) == 3
    _, text = run(
        *asked, "--image", images[0], "--prompt", PROMPT, "--roi", LEFT, "--mark", "n=two"
    )
    np.testing.assert_allclose(json.loads(text)["logprobs"], found[0].logprobs, atol=1e-5)


def test_a_chat_is_told_of_the_next_question(run, model, images, folder, monkeypatch, capsys):
    saved = folder / "talk.json"
    lines = ["/roi middle", "/mark two", PROMPT, f"/roi {LEFT}", "/mark n=two", PROMPT]
    lines += ["how many ?", f"/save {saved}"]
    left = iter(lines)
    monkeypatch.setattr("builtins.input", lambda _: next(left, "/quit"))
    command = ["--model", BASE, "--adapter", str(folder / "adapter"), "--image", images[0]]
    assert main(["generate", "--max-new-tokens", "1", *command]) == 0
    printed = capsys.readouterr()
    wanted = model.generate(PROMPT, images[0], roi=REGION, marks=TWO, max_new_tokens=1)
    assert printed.out.splitlines()[0] == wanted
    for told in (
        "unknown roi 'middle'",
        "/mark takes NAME=TEXT, got 'two'",
        "acts on mark(n), but nothing is marked",
        "marked in the next question: n=two",
    ):
        assert told in printed.err
    # What was said is of one question: the last has no mark.
    (record,) = json.loads(saved.read_text())
    assert record["roi"] == [[REGION]]
    assert record["marks"] == {"n": [[0, 19, 22]]}


def test_the_option_holds_for_all_prompts_of_a_file(run, model, images, folder):
    pairs = [([0.5, 0, 1, 1], "two"), (REGION, "there")]
    options = {"max_new_tokens": 1, "details": True, "logprobs": True}
    marks = [{"n": mark} for _, mark in pairs]
    wanted = model.generate([PROMPT] * 2, [images[0]] * 2, roi=[REGION] * 2, marks=marks, **options)
    record = {"prompt": PROMPT, "images": ["a.png"]}
    rows = [record | {"roi": roi, "marks": {"n": mark}} for roi, mark in pairs]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["generate", "--max-new-tokens", 1, "--logprobs", "--roi", LEFT]
    code, text = run(*asked, "--prompts", folder / "in.jsonl", "--out", folder / "out.jsonl")
    assert code == 0, text
    for line, one in zip((folder / "out.jsonl").open(), wanted, strict=True):
        np.testing.assert_allclose(json.loads(line)["logprobs"], one.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mark", "n=two"], "acts on a region of interest (roi), but nothing is said of it"),
        (["--roi", LEFT], "acts on mark(n), but nothing is marked"),
        (["--roi", LEFT, "--mark", "n=nine"], "mark 'n' is not in the text: no question has"),
        (["--roi", LEFT, "--mark", "two"], "--mark takes NAME=TEXT, got 'two'"),
        (["--roi", "0,0,2,1", "--mark", "n=two"], "must lie in the image"),
        (["--roi", "middle", "--mark", "n=two"], "unknown roi 'middle'"),
    ],
)
def test_what_is_missing_or_wrong_is_told_in_a_sentence(run, images, options, message, tmp_path):
    for command in (["generate"], ["analyze", "lens", "--out", tmp_path / "out"]):
        code, text = run(*command, "--image", images[0], "--prompt", PROMPT, *options)
        assert code == 2
        assert message in text
        assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_question_is_analysed_at_its_region_and_mark(run, model, images, tmp_path):
    """`analyze lens`, `attribute` and `patch` read what `Model.logits` reads, and draw it."""
    six = "is there a six ?"
    found = [
        np.asarray(model.logits(text, image, roi=roi, marks=marks))[0, -1]
        for text, image, roi, marks in (
            (PROMPT, images[0], REGION, TWO),
            (PROMPT, images[0], "all", TWO),
            (six, images[1], REGION, {"n": "six"}),
        )
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-3
    two, three = model.prompts.tokenizer.convert_tokens_to_ids(["two", "three"])
    first, _, second = (float(one[two] - one[three]) for one in found)
    wanted = found[0] - np.logaddexp.reduce(found[0])

    def analyze(kind: str, *options: object) -> dict:
        asked = ["analyze", kind, "--image", images[0], "--prompt", PROMPT, "--json", *options]
        asked += ["--roi", LEFT, "--mark", "n=two", "--out", tmp_path / kind]
        code, text = run(*asked)
        assert code == 0, text
        return json.loads(text)

    lens = analyze("lens", "--words", "two")
    assert lens["word_logprobs"][-1][-1] == pytest.approx([wanted[two]], abs=1e-4)
    attributed = analyze("attribute", "--answer", "two", "--against", "three")
    assert attributed["parts"]["logit"] == pytest.approx(first, abs=1e-4)
    assert attributed["value"] == pytest.approx(first, abs=1e-4)
    for kind in ("lens", "attribute"):
        assert (tmp_path / kind / "image1.png").is_file()
    # Another prompt has marks of its own.
    options = ["--other-image", images[1], "--answers", "two,three"]
    patched = analyze("patch", *options, "--other-prompt", six, "--other-mark", "n=six")
    assert patched["clean_score"] == pytest.approx(first, abs=1e-4)
    assert patched["corrupt_score"] == pytest.approx(second, abs=1e-4)


def test_attention_of_questions_has_their_regions_and_marks(run, model, images, tmp_path):
    """Also the maps of answers, which are read again; `--roi` holds for all questions."""
    file, options = Path(images[0]).parent / "own.jsonl", {"marks": TWO, "max_new_tokens": 1}
    own = attention_map(model, PROMPT, images[0], roi=REGION, **options)
    record = {"image": "a.png", "question": PROMPT, "answer": "yes", "max_new_tokens": 1}
    file.write_text(json.dumps(record | {"roi": [0.5, 0, 1, 1], "marks": TWO}))
    asked = ["evaluate", "--tasks", file, "--attention", "--out", tmp_path / "out"]
    code, text = run(*asked, "--roi", LEFT)
    assert code == 0, text
    with np.load(tmp_path / "out" / "attention_maps.npz") as arrays:
        np.testing.assert_allclose(arrays["0.grid"], own.grid.mean(1), atol=1e-4)
    file.write_text(json.dumps(record))
    code, text = run("evaluate", "--tasks", file, "--out", tmp_path / "none")
    assert code == 2
    assert "no question of task own could be asked: sample 0: the tuning acts on mark(n)" in text
