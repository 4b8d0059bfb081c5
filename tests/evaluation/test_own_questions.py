"""Questions of one's own: `--tasks questions.jsonl` and `--tasks my.py:NAME`."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.metrics.vqa import vqa_accuracy
from moresjax.evaluation.own_tasks import load_own
from moresjax.evaluation.presets import table
from moresjax.evaluation.questions import chosen_letter, load_questions
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import score_task
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.statistics import clustered_stderr
from moresjax.evaluation.tasks import load_tasks
from moresjax.testing.models import talking_model

EXACT = {"question": "how many ?", "answer": "Two"}


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def scores(path: Path, *predictions: str | None) -> dict:
    """The entry of a file's task for predictions in the order of its questions."""
    task = load_questions(path)
    pairs = zip(task.examples, predictions, strict=True)
    found = {example.id: text for example, text in pairs if text is not None}
    return score_task(task, found).scores[task.name]


@pytest.fixture(scope="module")
def model():
    return talking_model("none")


def test_a_file_is_asked_scored_continued_and_scored_again(model, tmp_path, capsys):
    for number in range(2):
        pixels = np.full((12, 12, 3), 99 * number, np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    images = ["0.png", "0.png", "1.png", "none.png", "../secret.png"]
    records = [
        {"id": f"q{i}", "image": image, "group": "ab"[i % 2], **EXACT}
        for i, image in enumerate(images)
    ]
    name = str(write(tmp_path / "mine.jsonl", *records))
    options = {"image_root": tmp_path / "photos", "out": tmp_path / "out", "batch_size": 2}
    result = evaluate(model, [name], **options)
    entry = result.scores["mine"]
    assert (entry["n"], entry["missing"], entry["benchmark"]) == (5, 2, name)
    assert "none.png does not exist" in entry["errors"]["q3"]
    assert "outside of the image root" in entry["errors"]["q4"]
    rows = [json.loads(x) for x in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2"]
    assert rows[0]["prompt"] == "<image>\nhow many ?"
    saved = tmp_path / "out" / "predictions.jsonl"
    again = rescore(name, saved, image_root=tmp_path / "photos").scores["mine"]
    assert again == {key: value for key, value in entry.items() if key != "errors"}
    command = ["evaluate", "--tasks", name, "--image-root", str(tmp_path / "photos")]
    command += ["--predictions", str(saved), "--out", str(tmp_path / "again")]
    assert main(command) == 0
    assert "majority 1.000" in capsys.readouterr().out
    assert evaluate(model, name, limit=1, **options).scores["mine"]["n"] == 1


def test_exact_match_forgives_case_blanks_and_a_period_and_nothing_else(tmp_path):
    path = write(tmp_path / "e.json", *[EXACT] * 4, EXACT | {"answer": ["2", "two"]})
    entry = scores(path, " two.", "TWO", "2", "-two", "2.")
    assert (entry["metric"], entry["score"]) == ("exact match", 3 / 5)
    path = write(tmp_path / "e.jsonl", EXACT | {"answer": -5}, EXACT | {"answer": "A"})
    assert scores(path, "5", "the")["score"] == 0
    assert scores(path, "-5", "a")["score"] == 1


def test_answers_of_people_score_by_vqa_accuracy(tmp_path):
    people = ["blue"] * 3 + ["red"] * 7
    path = write(tmp_path / "v.json", {"question": "?", "answers": people})
    entry = scores(path, "Blue")
    assert entry["metric"] == "VQA accuracy"
    assert entry["score"] == vqa_accuracy("Blue", people) == pytest.approx(0.9)
    assert entry["details"]["majority"] == vqa_accuracy("red", people) == 1
    # Of five people, three of the others agree with whoever said otherwise.
    path = write(tmp_path / "v.json", {"question": "?", "answers": [*["blue"] * 3, "red", "x"]})
    assert scores(path, "blue")["score"] == pytest.approx((3 * 2 / 3 + 2) / 5)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("b.", "B"), ("(B)", "B"), ("B. tea", "B"), ("B) x", "B"), ("Tea", "B")),
        *(("The answer is (A).", "A"), ("A dog", None), ("D", None), ("e.g. tea", None)),
        ("", None),
    ],
)
def test_a_letter_is_read_where_it_is_one(text, letter):
    assert chosen_letter(text, ["salt", "tea", "a cup"]) == letter


def test_choices_are_asked_with_letters(tmp_path):
    record = {"question": "Which?", "choices": ["salt", "tea"]}
    path = write(tmp_path / "c.jsonl", *(record | {"answer": x} for x in ("B", "Tea", 1, "a")))
    (first, *others) = load_questions(path).examples
    assert first.prompt.startswith("Which?\nA. salt\nB. tea\nAnswer with the option's letter")
    assert [first.answer, *(e.answer for e in others)] == ["B", "B", "B", "A"]
    entry = scores(path, "B", "tea", "(A)", None)
    assert (entry["metric"], entry["score"], entry["missing"]) == ("multiple choice", 0.5, 1)
    assert entry["details"]["majority"] == 0.75


def test_images_may_be_urls_that_hold_them_and_none_is_fetched(tmp_path):
    urls = "data:image/png;base64,iVBORw==", "https://example.org/a.png"
    path = write(tmp_path / "u.jsonl", *(EXACT | {"image": url} for url in urls))
    here, away = (example.images[0] for example in load_questions(path).examples)
    assert here == b"\x89PNG"
    assert "question 1: image https://example.org/a.png is not fetched" in away.reason


def test_groups_have_scores_with_intervals_by_image_and_baselines(tmp_path):
    right = [1.0, 1.0, 0.0, 0.0, 1.0]
    records = [
        {"image": f"{i // 2}.png", "question": "?", "answer": "x" if i else "y", "group": group}
        for i, group in enumerate(["one", "one", "one", "one", 2])
    ]
    path = write(tmp_path / "g.jsonl", *records)
    said = [r["answer"] if good else "z" for r, good in zip(records, right, strict=True)]
    entry = scores(path, *said)
    assert (entry["clusters"], entry["details"]["majority"]) == (3, 0.8)
    assert entry["stderr"] == clustered_stderr(right, [0, 0, 1, 1, 2])
    one, two = entry["details"]["groups"].values()
    assert (one["score"], one["n"], one["clusters"], one["majority"]) == (0.5, 4, 2, 0.75)
    assert one["stderr"] == clustered_stderr(right[:4], [0, 0, 1, 1]) == pytest.approx(0.5)
    assert (two["score"], two["stderr"], two["interval95"]) == (1, None, None)
    printed = table({"g": entry})
    assert "exact match, n = 5, standard error clustered by image in 3 groups" in printed
    assert "majority 0.800" in printed
    assert "one                    0.500 +- 0.500, 95% in 0.000 to 1.000  (n = 4, maj" in printed


def test_questions_of_all_kinds_have_one_score(tmp_path):
    choice = {"question": "?", "choices": ["salt", "tea"], "answer": "tea"}
    people = {"question": "?", "answers": ["x"] * 4}
    path = write(tmp_path / "all.jsonl", EXACT, choice, people)
    entry = scores(path, "two", "A", "x")
    assert (entry["metric"], entry["score"]) == ("accuracy", statistics.fmean([1, 0, 1]))


def test_without_answers_nothing_is_scored_and_the_table_says_so(model, tmp_path):
    llava = [{"question_id": i, "text": "<image>\nhow many ?", "image": "a.png"} for i in (7, 8)]
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    name = str(write(tmp_path / "llava.jsonl", *llava))
    result = evaluate(model, name, batch_size=2)
    entry = result.scores["llava"]
    assert (entry["score"], entry["stderr"], result.mean_accuracy) == (None, None, None)
    assert [(row["id"], row["score"]) for row in result.predictions] == [("7", None), ("8", None)]
    assert "no score  (exact match, n = 2, 2 without an answer: nothing is scored)" in table(
        result.scores
    )
    # Answers as LLaVA saves them.
    answers = [{"question_id": i, "text": "two"} for i in (7, 8)]
    saved = write(tmp_path / "answers.jsonl", *answers)
    write(Path(name), *(row | {"answer": "two"} for row in llava))
    assert rescore(name, saved).scores["llava"]["score"] == 1


def test_a_question_may_limit_its_answer(model, tmp_path):
    records = [EXACT | {"id": name, "max_new_tokens": n} for name, n in (("one", 1), ("three", 3))]
    path = write(tmp_path / "short.jsonl", *records, EXACT | {"category": "x"})
    assert load_questions(path).examples[2].metadata["group"] == "x"
    result = evaluate(model, str(path), out=tmp_path / "out", batch_size=4)
    texts = [model.generate(EXACT["question"], max_new_tokens=limit) for limit in (1, 3, 128)]
    assert [row["prediction"] for row in result.predictions] == texts
    assert len(texts[0]) < len(texts[1]) < len(texts[2])
    # A finished evaluation asks a question again whose limit is another one, and no other.
    write(path, records[0], records[1] | {"max_new_tokens": 2}, EXACT | {"category": "x"})
    asked = []
    service = type(model.service)
    original = service.generate_many
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            service,
            "generate_many",
            lambda s, rows, *a, **k: asked.append(len(rows)) or original(s, rows, *a, **k),
        )
        again = evaluate(model, str(path), out=tmp_path / "out", batch_size=4)
    assert asked == [1]
    shorter = model.generate(EXACT["question"], max_new_tokens=2)
    assert [row["prediction"] for row in again.predictions] == [texts[0], shorter, texts[2]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "must be an object, not str"),
        ({"conversations": []}, "is a conversation to train on"),
        ({"answer": "x"}, "has no question"),
        ({"question": "<image> <image> ?", "image": "a.png", "answer": "x"}, "2 <image> for 1"),
        ({"question": "?", "answer": True}, "answer must be a text or a number, got True"),
        ({"question": "?", "answers": ["a", "b"]}, "the answers of 2 people"),
        ({"question": "?", "answer": "a", "answers": ["b"] * 9}, "both `answer` and `answers`"),
        ({"question": "?", "image": 3}, "neither a path nor a list"),
        ({"question": "?", "choices": ["a"], "answer": "a"}, "has 1 choices"),
        ({"question": "?", "choices": ["x", "X."], "answer": "x"}, "two choices that are alike"),
        ({"question": "?", "choices": ["x", "y"], "answer": "C"}, "is none of the choices x, y"),
        ({"question": "?", "choices": ["B", "A"], "answer": "A"}, "may be several of the choices"),
        ({"question": "?", "id": 0}, "has the id '0' of record 0"),
        ({"question": "?", "max_new_tokens": 0}, "must be a whole number above 0, got 0"),
    ],
)
def test_a_wrong_record_is_named(record, message, tmp_path):
    path = write(tmp_path / "wrong.jsonl", EXACT, record)
    with pytest.raises(UserError, match=r"^record 1 of .*wrong.jsonl") as caught:
        load_questions(path)
    assert message in str(caught.value)
    assert len(load_questions(path, limit=1).examples) == 1


def test_files_in_lists_and_objects_are_read_and_others_refused(tmp_path):
    for content in ([EXACT] * 2, {"data": [EXACT] * 2}):
        (tmp_path / "q.json").write_text(json.dumps(content))
        assert [e.id for e in load_questions(tmp_path / "q.json").examples] == ["0", "1"]
    both = [str(write(tmp_path / folder / "q.jsonl", EXACT)) for folder in "ab"]
    for names, options, message in (
        ([str(tmp_path / "none.jsonl")], {}, "none.jsonl does not exist"),
        (both, {}, "both have a task 'q'"),
        (both[:1], {"split": "val"}, "has no splits"),
        (both[:1], {"image_root": str(tmp_path / "none")}, "none is not a folder"),
        (["digits"], {"image_root": str(tmp_path)}, "no task is one"),
    ):
        with pytest.raises(UserError, match=message):
            load_tasks(names, None, 1, options.get("split"), options.get("image_root"))


OWN = """
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask

snow = BenchmarkTask("snow", [Example("1", "is it ?", "no"), Example("2", "how many ?", "two")])


def several(split="test"):
    return [snow, BenchmarkTask(split, snow.examples)]


def broken():
    raise KeyError("x")


twice = BenchmarkTask("twice", [Example("1", "?"), Example("1", "?")])
"""


def test_python_makes_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("MORESJAX_PLUGINS", "")
    file = tmp_path / "own_tasks_of_a_test.py"
    file.write_text(OWN)
    (task,) = load_tasks([f"{file}:snow"], None, 1, None)
    assert (task.name, task.benchmark, len(task.examples)) == ("snow", f"{file}:snow", 1)
    assert [task.name for task in load_own(f"{file}:several", split="winter")] == ["snow", "winter"]
    for name, options, message in (
        (f"{file}:snows", {}, "unknown name in .*'snows'; choose from: snow, several, broken, twi"),
        (f"{file}:broken", {}, "broken fails: KeyError: 'x'"),
        (f"{file}:twice", {}, "two examples with the id '1'"),
        (f"{file}:OWN", {}, "unknown name"),
        (f"{file}:BenchmarkTask", {}, "BenchmarkTask fails: TypeError"),
        (f"{file}:snow", {"split": "val"}, "takes no split; leave --split out"),
        (f"{file}:several", {"image_root": str(tmp_path)}, "leave --image-root out"),
        (str(file), {}, "needs the name of a task in it"),
        (f"{tmp_path}/none.py:snow", {}, "none.py does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_own(name, split=options.get("split"), image_root=options.get("image_root"))
