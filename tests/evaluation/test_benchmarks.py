"""Every benchmark with short answers or choices, from its official files to its score."""

import json
import random

import numpy as np
import pytest
from benchmark_helpers import LETTER, LIMIT, SHORT, official, rescored, sent, the_task

from moresjax.core.errors import UserError
from moresjax.evaluation.lm import task_requests
from moresjax.evaluation.metrics.yes_no import COGNITION, PERCEPTION
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import write_results
from moresjax.evaluation.tasks import (
    choice_letter,
    load_benchmark,
)
from moresjax.testing import benchmark_files as downloads
from moresjax.testing.benchmark_files import lines, photo, write


def test_vqav2(tmp_path):
    write(tmp_path, downloads.vqav2())
    task = the_task("vqav2", tmp_path)
    assert task.examples[0].prompt == f"<image>\nWhat colour?\n{SHORT}"
    assert task.examples[0].images == (tmp_path / "coco/val2014/COCO_val2014_000000000009.jpg",)
    rows = [{"question_id": 91, "answer": "Blue."}, {"question_id": 120, "answer": "2"}]
    entry = official("vqav2", tmp_path, rows)["vqav2"]
    # Two of ten agree on blue: 0.6; one annotator's "blue" leaves one other: 1/3, twice.
    assert entry["score"] == pytest.approx((0.6 + 1) / 2)
    assert entry["details"]["number"] == 100
    assert entry["missing"] == 0


def test_vqav2_submissions_answer_every_question_of_the_test_set(tmp_path):
    write(tmp_path, downloads.vqav2())
    saved = [{"question_id": 32, "answer": "The Yes."}]
    result = rescored("vqav2", tmp_path, saved, "predictions.json", split="test-dev")
    assert json.loads(result.submissions["vqav2-submission.json"]) == [
        {"question_id": 31, "answer": ""},
        {"question_id": 32, "answer": "yes"},
    ]
    assert result.scores["vqav2"]["score"] is None
    assert "coco/test2015/COCO_test2015_000000000003.jpg" in str(
        the_task("vqav2", tmp_path, split="test-dev").examples[0].images[0]
    )


def test_okvqa_counts_missing_predictions_as_wrong(tmp_path):
    write(tmp_path, downloads.okvqa())
    entry = official("okvqa", tmp_path, [{"question_id": 120, "answer": "2"}])["okvqa"]
    assert (entry["score"], entry["n"], entry["missing"]) == (0.5, 2, 1)
    assert entry["details"] == {"what": 0, "how many": 100}


def test_gqa(tmp_path):
    write(tmp_path, downloads.gqa())
    assert the_task("gqa", tmp_path).examples[1].prompt == f"<image>\nWho?\n{SHORT}"
    saved = [{"questionId": "1", "prediction": "no"}, {"questionId": "2", "prediction": "Man."}]
    entry = official("gqa", tmp_path, saved)["gqa"]
    assert entry["score"] == 0.5
    assert entry["details"] == {"binary": 0, "open": 100}
    assert json.loads(sent("gqa", tmp_path, saved[1:])) == [
        {"questionId": "1", "prediction": ""},
        {"questionId": "2", "prediction": "man"},
    ]


def test_vizwiz(tmp_path):
    write(tmp_path, downloads.vizwiz())
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert the_task("vizwiz", tmp_path).examples[0].prompt == (
        f"<image>\nWhat is it?\n{hint}\n{SHORT}"
    )
    hint = 'When the information is insufficient, respond with "Unanswerable".'
    assert the_task("vizwiz_ft", tmp_path).examples[0].prompt == (
        f"<image>\nWhat is it? {hint} {SHORT}"
    )
    saved = [{"image": "VizWiz_val_00000000.jpg", "answer": "TIN"}]
    assert official("vizwiz", tmp_path, saved)["vizwiz"]["score"] == pytest.approx(0.9)
    saved = [{"image": "VizWiz_test_00000000.jpg", "answer": "TIN"}]
    assert json.loads(sent("vizwiz", tmp_path, saved, split="test")) == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "tin"}
    ]


def test_scienceqa(tmp_path):
    write(tmp_path, downloads.scienceqa())
    task = the_task("scienceqa", tmp_path)
    assert [example.prompt for example in task.examples] == [
        f"What?\nA. salt\nB. tea\n{LETTER}",
        f"<image>\nContext: Look.\nWhich?\nA. salt\nB. tea\n{LETTER}",
    ]
    assert task.examples[1].images == (tmp_path / "scienceqa/test/4/image.png",)
    # Missing answers and letters beyond the choices are wrong.
    for texts, hits in (
        (("A", "B"), [1, 1]),
        (("B", "A"), [0, 0]),
        (("C", None), [0, 0]),
        (("The answer is Z.", "C"), [0, 0]),
    ):
        assert list(task.scorer(task.examples, texts).per_example) == hits
    saved = lines([{"question_id": "4", "text": "B. tea"}, {"question_id": "6", "text": "B"}])
    entry = official("scienceqa", tmp_path, saved, "a.jsonl")["scienceqa"]
    assert entry["score"] == 0.5
    assert entry["details"]["IMG"] == 100
    entry = official("scienceqa_img", tmp_path, saved, "a.jsonl")["scienceqa_img"]
    assert (entry["score"], entry["n"]) == (1, 1)
    (example,) = the_task("scienceqa_img_ft", tmp_path).examples
    assert (example.prompt, example.answer) == ("<image>\nWhich? A.salt, B.tea", "B")


@pytest.mark.parametrize("name", ["scienceqa", "scienceqa_img", "scienceqa_img_ft"])
def test_small_splits_of_scienceqa_have_the_images_of_the_large_ones(tmp_path, name):
    write(tmp_path, downloads.scienceqa())
    (example,) = the_task(name, tmp_path, split="minitest").examples
    assert example.images == (tmp_path / "scienceqa/test/4/image.png",)
    assert example.images[0].is_file()


def test_textvqa(tmp_path):
    write(tmp_path, downloads.textvqa())
    (example,) = the_task("textvqa", tmp_path).examples
    assert example.prompt == f"<image>\nWhat does it say?\nReference OCR token: STOP, 4\n{SHORT}"
    assert example.images == (tmp_path / "textvqa/train_images/aa.jpg",)
    saved = [{"question_id": 7, "answer": "Halt"}]
    assert official("textvqa", tmp_path, saved)["textvqa"]["score"] == pytest.approx(0.3)
    saved = [{"question_id": 7, "answer": "It says stop."}]
    entry = official("textvqa_judged", tmp_path, saved)["textvqa_judged"]
    assert (entry["score"], entry["judge"]) == (1, {"name": "rule", "comparable": False})
    assert json.loads(sent("textvqa", tmp_path, saved, split="test")) == [
        {"question_id": 7, "answer": "It says stop."}
    ]


def test_pope_kinds_are_scored_apart_and_silence_is_wrong(tmp_path):
    write(tmp_path, downloads.pope())
    task = load_benchmark("pope", data_root=tmp_path, limit=LIMIT)[0]
    assert task.examples[0].prompt == f"<image>\nIs there a dog in the image?\n{SHORT}"
    assert task.examples[0].images[0].parent == tmp_path / "coco/val2014"
    answers = {"random": ("Yes", "No, none"), "popular": ("yes", "yes"), "adversarial": ("no", "")}
    for kind, texts in answers.items():
        rows = lines({"question": "?", "answer": text} for text in texts)
        write(tmp_path, {f"saved/pope_{kind}.jsonl": rows})
    scores = rescore("pope", tmp_path / "saved", data_root=tmp_path, limit=LIMIT).scores
    assert [entry["score"] for entry in scores.values()] == [1, 0.5, 0]
    assert list(scores) == [f"pope_{kind}" for kind in answers]
    assert scores["pope_popular"]["details"]["yes_ratio"] == 1
    silent = task.scorer(task.examples, [None, None])
    assert silent.value == silent.details["accuracy"] == 0


def test_mmmu(tmp_path):
    write(tmp_path, downloads.mmmu())
    examples = {example.id: example for example in the_task("mmmu", tmp_path).examples}
    assert len(examples) == 32
    assert examples["validation_Art_1"].prompt == f"<image>\nPick\n\n(A) x\n(B) y\n\n{LETTER}"
    assert examples["validation_Art_1"].images == (photo(1),)
    assert examples["validation_Math_2"].prompt == f"<image>\nSum?\n\n{SHORT}"
    assert examples["validation_Math_2"].images == (photo(2),)
    both = examples["validation_Accounting_2"]
    assert both.prompt == f"<image>\n<image>\nSum of and?\n\n{SHORT}"
    assert both.images == (photo(1), photo(2))
    saved = {name: "(B)" for name in examples} | {
        "validation_Math_1": "A",
        "validation_Math_2": "The answer is 7.",
        "validation_Accounting_2": "seven",
        "validation_Art_1": "neither",
    }
    del saved["validation_Music_1"]
    entry = official("mmmu", tmp_path, saved)["mmmu"]
    assert entry["details"]["Math"] == 0.5
    assert (entry["details"]["guessed"], entry["details"]["seed"]) == (1, 42)
    assert entry["details"]["Music"] == 0
    # The seeded guess for Art is the first draw.
    art = random.Random(42).choice(["A", "B"]) == "B"
    assert entry["details"]["Art"] == art
    assert entry["score"] == pytest.approx((29 + art) / 32)
    saved = {"test_Accounting_1": "(A)", "test_Accounting_2": "It is 7.", "test_Art_1": "B."}
    answers = json.loads(sent("mmmu", tmp_path, saved, split="test"))
    assert list(answers) == [name.replace("validation", "test") for name in examples]
    assert answers.items() >= (saved | {"test_Accounting_1": "A", "test_Art_1": "B"}).items()


def test_iconqa(tmp_path):
    write(tmp_path, downloads.iconqa())
    (example,) = the_task("iconqa_txt", tmp_path).examples
    assert example.prompt == (
        "<image>\nWhich? Choices: one, two. Choose an option from the choices to answer the "
        "question."
    )
    assert example.images == (tmp_path / "iconqa/test/choose_txt/5/image.png",)
    saved = lines([{"question_id": "5", "text": " two"}, {"question_id": "8", "text": "three"}])
    assert official("iconqa_txt", tmp_path, saved, "a.jsonl")["iconqa_txt"]["score"] == 1
    assert official("iconqa_blank", tmp_path, saved, "a.jsonl")["iconqa_blank"]["score"] == 0


def test_mme(tmp_path):
    write(tmp_path, downloads.mme())
    task = the_task("mme", tmp_path)
    assert task.examples[0].prompt == f"<image>\nIs it a cat?\n{SHORT}"
    assert len(task.examples) == 28
    asked = [(f"Is it a {it}? Please answer yes or no.", gold) for it, gold in downloads.PAIRS]
    for subtask in PERCEPTION + COGNITION:
        second = "Yes" if subtask in COGNITION else "no."
        rows = zip(asked, ("Yes", second), strict=True)
        saved = "".join(f"7.jpg\t{q}\t{gold}\t{text}\n" for (q, gold), text in rows)
        write(tmp_path, {f"results/{subtask}.txt": saved})
    result = rescore("mme", tmp_path / "results", data_root=tmp_path, limit=LIMIT)
    entry = result.scores["mme"]
    assert result.submissions == {
        f"mme-submission/{path.name}": path.read_text() for path in (tmp_path / "results").iterdir()
    }
    assert entry["details"]["perception"] == 2000
    assert entry["details"]["cognition"] == 4 * 50
    assert (entry["score"], entry["stderr"]) == (2200, None)
    write_results(result, tmp_path / "out")
    again = rescore("mme", tmp_path / "out/mme-submission", data_root=tmp_path, limit=LIMIT)
    assert again.scores == result.scores


def test_answers_of_several_lines_are_one_line_of_mme(tmp_path):
    write(tmp_path, downloads.mme())
    task = the_task("mme", tmp_path)
    said = dict.fromkeys((example.id for example in task.examples), "Yes,\n\tit is.\u2028")
    for name, content_of in task.submissions.items():
        assert [line.split("\t") for line in content_of(said).splitlines()] == [
            ["7.jpg", f"Is it a {it}? Please answer yes or no.", gold, "Yes,  it is. "]
            for it, gold in downloads.PAIRS
        ], name


def test_snli_ve(tmp_path):
    write(tmp_path, downloads.snli_ve())
    task = the_task("snli_ve", tmp_path)
    assert "Statement: Men eat.\n" in task.examples[0].prompt
    assert task.examples[0].images == (tmp_path / "flickr30k/flickr30k-images/11.jpg",)
    saved = [{"pairID": "p0", "prediction": "Neutral"}, {"pairID": "p2", "prediction": "neutral"}]
    entry = official("snli_ve", tmp_path, saved)["snli_ve"]
    assert (entry["score"], entry["n"]) == (0.5, 2)


def test_cifar(tmp_path):
    write(tmp_path, downloads.cifar())
    task = the_task("cifar10", tmp_path)
    assert task.examples[0].prompt == (
        f"<image>\nWhat is the object in the image? Choose from: airplane, automobile.\n{SHORT}"
    )
    np.testing.assert_array_equal(task.examples[2].images[0][5, 6], downloads.COLOURS[2, :, 5, 6])
    saved = lines({"prediction": text} for text in ("Automobile", "an airplane", "airplane"))
    assert official("cifar10", tmp_path, saved, "a.jsonl")["cifar10"]["score"] == pytest.approx(
        2 / 3
    )
    assert [example.answer for example in the_task("cifar100", tmp_path).examples] == [
        "aquarium fish",
        "apple",
        "aquarium fish",
    ]
    write(tmp_path, {"cifar10/test_batch.bin": b"12345"})
    with pytest.raises(UserError, match=r"test_batch.bin is damaged: it has 5 bytes"):
        the_task("cifar10", tmp_path)


def test_mnist(tmp_path):
    write(tmp_path, downloads.mnist())
    task = the_task("mnist", tmp_path)
    assert [example.answer for example in task.examples] == ["7", "3"]
    np.testing.assert_array_equal(task.examples[1].images[0][..., 2], downloads.DIGITS[1])
    saved = lines({"prediction": text} for text in ("7", "It is 37"))
    assert official("mnist", tmp_path, saved, "a.jsonl")["mnist"]["score"] == 0.5
    write(tmp_path, {"mnist/t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x05\x07"})
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged"):
        the_task("mnist", tmp_path)


def test_seed_bench_generated_and_ranked(tmp_path):
    write(tmp_path, downloads.seed_bench())
    task = the_task("seed_bench", tmp_path)
    listed = "A. text a\nB. text b\nC. text c\nD. text d"
    assert task.examples[0].prompt == f"<image>\nWhere?\n{listed}\n{LETTER}"
    assert [example.images[0].name for example in task.examples] == ["10_1", "2_2.png"]
    saved = lines([{"question_id": 1, "prediction": "C"}, {"question_id": 2, "prediction": "C."}])
    entry = official("seed_bench", tmp_path, saved, "a.jsonl")["seed_bench"]
    assert entry["details"] == {"Scene": 100, "image": 100, "Action": 0, "video": 0, "total": 50}
    assert sent("seed_bench", tmp_path, saved) == lines(
        {"question_id": name, "prediction": letter} for name, letter in (("1", "C"), ("2", "C."))
    )
    ranked = the_task("seed_bench_rank", tmp_path)
    assert ranked.examples[0].prompt == "<image>\nWhere?"
    requests = task_requests(ranked, ranked.examples[:1])
    assert [request.args[1] for request in requests] == [f"text {letter}" for letter in "abcd"]
    assert choice_letter([-3.0, -2.5, -2.0, -2.0]) == "C"
