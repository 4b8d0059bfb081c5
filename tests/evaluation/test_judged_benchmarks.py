"""Benchmarks of captions, and those with a judge, from their official files to their scores."""

import json

import pytest
from benchmark_helpers import LIMIT, WordJudge, official, sent, the_task

from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.metrics.hallusionbench import parse_verdict
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.tasks import load_benchmark
from moresjax.testing import benchmark_files as downloads
from moresjax.testing.benchmark_files import FOUR, THREE, lines, write


def test_mm_vet_with_and_without_a_judge(tmp_path):
    write(tmp_path, downloads.mm_vet())
    assert the_task("mm_vet", tmp_path).examples[0].prompt == "<image>\nWho?"
    saved = {"v1_0": "ann", "v1_1": "Bob and Ann"}
    entry = official("mm_vet", tmp_path, saved)["mm_vet"]
    assert entry["score"] == 0.75
    assert entry["judge"] == {"name": "rule", "comparable": False}
    judge = WordJudge("no idea", "0.4", "1.0")
    result = rescore(
        "mm_vet", tmp_path / "predictions.json", data_root=tmp_path, limit=LIMIT, judge=judge
    )
    entry = result.scores["mm_vet"]
    assert entry["score"] == pytest.approx(0.7)
    assert entry["details"]["only_ocr"] == 100
    assert entry["details"]["ocr_rec"] == 40
    assert entry["judge"]["name"] == "words"
    assert entry["judge"]["settings"] == {"temperature": 0}
    assert len(entry["judge"]["prompt_hash"]) == 12
    assert judge.attempts == [0, 1, 0]
    assert judge.prompts[0].endswith("Who? | Ann <AND> Bob | ann | ")
    assert judge.prompts[1].startswith(judge.prompts[0])
    assert json.loads(result.submissions["mm_vet-submission.json"]) == saved


def test_hallusionbench(tmp_path):
    write(tmp_path, downloads.hallusionbench())
    task = the_task("hallusionbench", tmp_path)
    folder = tmp_path / "hallusionbench/hallusion_bench"
    assert task.examples[0].prompt == "<image>\nIs it equal?"
    assert task.examples[0].images == (folder / "VD/math/0_1.png",)
    assert (task.examples[1].prompt, task.examples[1].images) == ("Is it equal?", ())
    answers = ("Yes, they are.", "I cannot know.", "Yes again")
    rows = json.loads((folder.parent / "HallusionBench.json").read_text())
    saved = [row | {"model_prediction": text} for row, text in zip(rows, answers, strict=True)]
    entry = official("hallusionbench", tmp_path, saved)["hallusionbench"]
    assert entry["score"] == pytest.approx(1 / 3)
    assert (entry["details"]["easy aAcc"], entry["details"]["hard aAcc"]) == (50, 0)
    judge = WordJudge("incorrect", "unclear", "correct")
    score = task.scorer(task.examples, answers, judge)
    assert list(score.per_example) == [0, 1, 1]
    assert score.details["hard aAcc"] == 100
    assert "They differ." in judge.prompts[0]
    assert parse_verdict("unclear") == 2
    assert json.loads(sent("hallusionbench", tmp_path, saved)) == saved


def test_vsr_and_its_judge(tmp_path):
    write(tmp_path, downloads.vsr())
    task = the_task("vsr", tmp_path)
    assert task.examples[0].prompt == "<image>\nThe cat is on the mat. Please answer yes or no."
    saved = lines({"prediction": text} for text in ("Yes.", "yes or no"))
    assert official("vsr", tmp_path, saved, "a.jsonl")["vsr"]["score"] == 0.5
    judge = WordJudge("yes", "Yes, the same")
    assert task.scorer(task.examples, ["Yes.", "It is not."], judge).value == 1
    assert IMAGE_MARK not in judge.prompts[0]


def test_pope_and_its_judge(tmp_path):
    write(tmp_path, downloads.pope())
    tasks = load_benchmark("pope_judged", data_root=tmp_path, limit=LIMIT)
    assert [task.name for task in tasks] == [
        f"pope_judged_{kind}" for kind in ("random", "popular", "adversarial")
    ]
    task, answers = tasks[0], [example.answer for example in tasks[0].examples]
    assert task.scorer(task.examples, answers).value == 1
    judge = WordJudge(*["No."] * len(answers))
    score = task.scorer(task.examples, answers, judge)
    assert (score.value, score.judge["name"]) == (0, "words")


def captions_score(name, root, saved):
    return official(name, root, saved)[name]["score"]


def test_coco_caption(tmp_path):
    write(tmp_path, downloads.coco_caption())
    task = the_task("coco_caption", tmp_path)
    assert (
        task.examples[0].prompt == "<image>\nProvide a one-sentence caption for the provided image."
    )
    assert task.examples[1].images == (tmp_path / "coco/val2014/3.jpg",)
    saved = [{"image_id": 1, "caption": "A red kite."}, {"image_id": 3, "caption": FOUR}]
    assert captions_score("coco_caption", tmp_path, saved) == pytest.approx(8.75)
    assert captions_score("coco_caption", tmp_path, saved[:1]) == pytest.approx(7.5 / 2)


def test_flickr30k(tmp_path):
    write(tmp_path, downloads.flickr30k())
    saved = [{"image_id": 0, "caption": THREE}, {"image_id": 1, "caption": "a cat"}]
    assert captions_score("flickr30k", tmp_path, saved) == pytest.approx(7.5 / 2)


def test_textcaps(tmp_path):
    write(tmp_path, downloads.textcaps())
    task = the_task("textcaps", tmp_path)
    assert [example.id for example in task.examples] == ["aa", "bb"]
    assert task.examples[0].prompt.endswith("provided image.\nReference OCR token: STOP, 4")
    saved = [{"image_id": "aa", "caption": THREE}, {"image_id": "bb", "caption": FOUR}]
    assert captions_score("textcaps", tmp_path, saved) == pytest.approx(8.75)
    assert json.loads(sent("textcaps", tmp_path, saved, split="test")) == saved[:1]


def test_chair(tmp_path):
    write(tmp_path, downloads.chair())
    task = the_task("chair", tmp_path)
    assert {example.id: example.answer for example in task.examples} == {"1": ["dog"], "2": ["cat"]}
    assert task.examples[0].prompt == "<image>\nPlease describe this image in detail."
    saved = lines(
        [{"image_id": 1, "caption": "Dogs and a man."}, {"image_id": 2, "caption": "A kitten."}]
    )
    entry = official("chair", tmp_path, saved, "a.jsonl")["chair"]
    assert entry["score"] == entry["details"]["CHAIRs"] == 0.5
    assert entry["details"]["CHAIRi"] == pytest.approx(1 / 3)
    assert (entry["details"]["lemmatiser"], entry["details"]["seed"]) == ("vocabulary", 42)
    assert not entry["fraction"]  # lower is better


def test_mmhal_needs_a_judge(tmp_path):
    write(tmp_path, downloads.mmhal())
    task = the_task("mmhal", tmp_path)
    assert task.examples[0].images == (tmp_path / "mmhal/images/b.jpg",)
    rows = json.loads((tmp_path / "mmhal/response_template.json").read_text())
    texts = ("Blue.", "It is red.")
    saved = [row | {"model_answer": text} for row, text in zip(rows, texts, strict=True)]
    entry = official("mmhal", tmp_path, saved)["mmhal"]
    assert (entry["score"], entry["judge"]) == (None, {"name": "none"})
    judge = WordJudge("Wrong. Rating: 1", "Rating: 5")
    result = rescore(
        "mmhal", tmp_path / "predictions.json", data_root=tmp_path, limit=LIMIT, judge=judge
    )
    entry = result.scores["mmhal"]
    assert entry["score"] == 0.5
    assert entry["details"]["average_score"] == 3
    assert entry["details"]["hallucination_rate"] == 0.5
    assert "cup, table" in judge.prompts[0]
    filled = json.loads(result.submissions["mmhal-responses.json"])
    assert filled == saved
