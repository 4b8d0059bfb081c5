"""Questions drawn from a benchmark, and the training splits that they are drawn from."""

import json

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import BenchmarkTask, draw_examples, load_benchmark
from moresjax.testing import benchmark_files
from moresjax.testing.models import talking_model

TASK = BenchmarkTask("t", [Example(str(number), "?", "") for number in range(50)])


def ids(sample: int | None, seed: int = 0) -> list[int]:
    (task,) = draw_examples([TASK], sample, seed)
    return [int(example.id) for example in task.examples]


def test_a_sample_is_drawn_once_each_and_again_by_its_seed():
    assert ids(None) == ids(99) == [*range(50)]
    for seed in range(3):
        assert len(set(ids(10, seed))) == 10
        assert ids(10, seed) == sorted(ids(10, seed)) == ids(10, seed)
    assert len({tuple(ids(10, seed)) for seed in range(3)}) == 3
    assert ids(10) != [*range(10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0, 0), "sample must be at least 1"),
        ((1, -1), "seed at least 0"),
        ((1, 0, 5), "limit takes the first examples and sample draws some"),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        draw_examples([TASK], *options)


def test_an_evaluation_of_a_sample_says_so_and_is_scored_again(tmp_path):
    model = talking_model("none")
    result = evaluate(model, ["digits"], sample=2, seed=3, batch_size=16, out=tmp_path)
    assert {score["n"] for score in result.scores.values()} == {2}
    saved = json.loads((tmp_path / "results.json").read_text())
    assert (saved["sample"], saved["sample_seed"]) == (2, 3)
    again = rescore("digits", tmp_path / "predictions.jsonl", sample=2, seed=3)
    assert {n: s["score"] for n, s in again.scores.items()} == {
        n: s["score"] for n, s in result.scores.items()
    }
    first = evaluate(model, ["digits"], limit=2, batch_size=16)
    assert [row["id"] for row in first.predictions] != [row["id"] for row in result.predictions]
    with pytest.raises(UserError, match="give one of them"):
        evaluate(model, ["digits"], sample=2, limit=2)


def test_training_splits_are_asked_like_the_others(tmp_path):
    files = {
        name.replace("val2014", "train2014"): content
        for name, content in benchmark_files.vqav2().items()
    }
    benchmark_files.write(tmp_path, files)
    (task,) = load_benchmark("vqav2", data_root=tmp_path, limit=2, split="train")
    photo = tmp_path / "coco/train2014/COCO_train2014_000000000009.jpg"
    assert task.examples[0].images == (photo,)
    (images,) = benchmark_files.coco_caption()["coco_caption/dataset_coco.json"].values()
    for row, split in zip(images, ("train", "test", "restval"), strict=True):
        row["split"] = split
    benchmark_files.write(tmp_path, {"coco_caption/dataset_coco.json": {"images": images}})
    (task,) = load_benchmark("coco_caption", data_root=tmp_path, limit=9, split="train")
    assert [example.id for example in task.examples] == ["1", "3"]
    with pytest.raises(UserError, match="the published set 113,287"):
        load_benchmark("coco_caption", data_root=tmp_path, split="train")
