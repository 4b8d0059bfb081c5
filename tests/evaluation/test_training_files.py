"""The paper's task files: prompts to the letter, targets by the rule, draws by the seed."""

import collections
import csv
import json
import random

import pytest

from moresjax.core.errors import UserError
from moresjax.data.llava import LlavaSource
from moresjax.data.task_names import TASK_NAMES
from moresjax.evaluation.benchmarks import flickr30k
from moresjax.evaluation.tasks import load_benchmark
from moresjax.evaluation.training_files import (
    SIZES,
    build_training_file,
    subset,
    trainable_names,
)

SHORT = "Answer the question using a single word or phrase."


def write(root, files: dict):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def build(root, name, **options) -> list[dict]:
    """The records of a task, read back from its file."""
    out = root / "out" / f"{name}.json"
    counts = build_training_file(name, root, out, image_root=root, **options)
    records = json.loads(out.read_text())
    assert counts["written"] == len(records) <= counts["available"]
    # The file can be read as it is, except that these downloads have no pictures.
    source = LlavaSource(str(out), str(root))
    assert all(source[i].images[0].is_relative_to(root) for i in range(len(source)))
    return records


def parts(record: dict) -> tuple[str, str, str, str]:
    """Id, image, question without its mark, and answer."""
    human, gpt = record["conversations"]
    assert (human["from"], gpt["from"]) == ("human", "gpt")
    mark, _, question = human["value"].partition("\n")
    assert mark == "<image>"
    return record["id"], record["image"], question, gpt["value"]


def test_scienceqa(tmp_path):
    problem = {"question": "Which one?", "choices": ["salt", "a rock", "tea"], "answer": 1}
    problem |= {"split": "train"}
    problems = {
        "2": problem | {"image": "image.png", "split": "val"},
        "3": problem | {"image": "image.png"},
        "5": problem | {"image": None},
        "8": problem | {"image": "image.png", "answer": 2},
    }
    splits = {"train": ["8", "5", "3"], "val": ["2"], "minitrain": ["3"], "trainval": ["3", "2"]}
    write(tmp_path, {"problems.json": problems, "pid_splits.json": splits})
    question = "Which one? A.salt, B.a rock, C.tea"
    assert [parts(r) for r in build(tmp_path, "scienceqa")] == [
        ("8", "train/8/image.png", question, "C"),
        ("3", "train/3/image.png", question, "B"),
    ]

    def images(split):
        return [parts(r)[1] for r in build(tmp_path, "scienceqa", split=split)]

    assert images("val") == ["val/2/image.png"]
    assert images("minitrain") == ["train/3/image.png"]
    assert images("trainval") == ["train/3/image.png", "val/2/image.png"]


def test_vizwiz(tmp_path):
    def item(number, answerable, *answers):
        pairs = [{"answer": a, "answer_confidence": c} for a, c in answers]
        name = f"VizWiz_train_{number:08d}.jpg"
        asked = {"image": name, "question": "What is it?", "answers": pairs}
        return asked | {"answerable": answerable}

    mixed = (("can", "yes"), ("tin", "maybe"), ("cup", "no"), ("unanswerable", "yes"))
    items = [
        item(0, 0, ("can", "yes")),
        item(1, 1, ("cup", "no"), ("unanswerable", "yes")),
        *(item(number, 1, *mixed) for number in range(2, 1202)),
    ]
    write(tmp_path, {"Annotations/train.json": items})
    found = [parts(record) for record in build(tmp_path, "vizwiz")]
    assert {question for _, _, question, _ in found} == {
        'What is it? When the information is insufficient, respond with "Unanswerable". ' + SHORT
    }
    assert found[0][1] == "train/VizWiz_train_00000000.jpg"
    assert [answer for *_, answer in found[:2]] == ["Unanswerable"] * 2
    counts = collections.Counter(answer for *_, answer in found[2:])
    assert set(counts) == {"can", "tin"}
    # Three to one, within four standard deviations.
    assert abs(counts["can"] - 900) < 60
    assert [parts(record) for record in build(tmp_path, "vizwiz")] == found


def test_iconqa(tmp_path):
    choice = {"question": "What shape is this?", "choices": ["oval", "cone"]}
    write(
        tmp_path,
        {
            "train/choose_txt/10/data.json": choice | {"answer": "cone"},
            "train/choose_txt/9/data.json": choice | {"answer": 0},
            "train/fill_in_blank/7/data.json": {"question": "There are (_) dots.", "answer": 5},
        },
    )
    question = (
        "What shape is this? Choices: oval, cone. "
        "Choose an option from the choices to answer the question."
    )
    assert [parts(r) for r in build(tmp_path, "iconqa_txt")] == [
        ("9", "train/choose_txt/9/image.png", question, "oval"),
        ("10", "train/choose_txt/10/image.png", question, "cone"),
    ]
    assert parts(build(tmp_path, "iconqa_blank")[0]) == (
        "7",
        "train/fill_in_blank/7/image.png",
        "There are (_) dots. Fill in the blanks in (_) or answer this question",
        "5",
    )


def write_coco(root, prefix, count=1, **annotation):
    questions = [
        {"image_id": 42 + i, "question": "What is it?", "question_id": 420 + i}
        for i in range(count)
    ]
    # Annotations stand in another order than the questions.
    annotations = [annotation | {"question_id": q["question_id"]} for q in reversed(questions)]
    name = f"{prefix}OpenEnded_mscoco_train2014_questions.json"
    write(root, {name: {"questions": questions}})
    write(root, {f"{prefix}mscoco_train2014_annotations.json": {"annotations": annotations}})


def test_vqav2(tmp_path):
    write_coco(tmp_path, "v2_", multiple_choice_answer="a cat", answers=[{"answer": "dog"}])
    image = "train2014/COCO_train2014_000000000042.jpg"
    wanted = ("420", image, f"What is it? {SHORT}", "a cat")
    assert parts(build(tmp_path, "vqav2")[0]) == wanted


ANSWERED = {
    "multiple_choice_answer": "a cat",
    "answers": [{"answer": "dog"}],
    "answer_type": "other",
    "question_type": "what",
}


def test_photos_of_coco_are_those_of_evaluations(tmp_path):
    (tmp_path / "coco" / "train2014").mkdir(parents=True)
    root, out = tmp_path / "vqav2", tmp_path / "vqav2.json"
    write_coco(root, "v2_", **ANSWERED)
    build_training_file("vqav2", root, out)
    (record,) = json.loads(out.read_text())
    assert record["image"] == "coco/train2014/COCO_train2014_000000000042.jpg"
    (task,) = load_benchmark("vqav2", data_root=tmp_path, limit=1, split="train")
    assert LlavaSource(str(out), str(tmp_path))[0].images == task.examples[0].images
    with pytest.raises(UserError, match="420: its photo is in the folder `coco` beside the down"):
        build_training_file("vqav2", root, out, image_root=root)


def test_okvqa(tmp_path):
    write_coco(tmp_path, "", 400, answers=[{"answer": "dog"}] * 5 + [{"answer": "cat"}] * 5)
    found = [parts(record) for record in build(tmp_path, "okvqa")]
    image = "train2014/COCO_train2014_000000000042.jpg"
    assert found[0][:3] == ("420", image, "What is it?")
    counts = collections.Counter(answer for *_, answer in found)
    assert set(counts) == {"dog", "cat"}
    assert abs(counts["cat"] - 200) < 40


def test_flickr30k(tmp_path):
    captions = [f"caption {i}" for i in range(5)]
    with (tmp_path / "flickr_annotations_30k.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for number in range(300):
            split = "test" if number % 10 == 0 else "train"
            writer.writerow([json.dumps(captions), "[]", split, f"{number}.jpg", number])
    found = [parts(record) for record in build(tmp_path, "flickr30k")]
    assert len(found) == 270
    assert found[0][:2] == ("1", "flickr30k-images/1.jpg")
    assert {answer for *_, answer in found} == set(captions)
    assert {question for _, _, question, _ in found} == set(flickr30k.REQUESTS)
    assert len(set(flickr30k.REQUESTS)) == 9
    assert len(build(tmp_path, "flickr30k", split="test")) == 30


def test_textcaps(tmp_path):
    rows = [
        {"image_id": name, "caption_str": text, "reference_strs": ["a sign", "a red sign"]}
        for name in ("a1", "b2")
        for text in ("a sign", "a red sign")
    ]
    words = [{"image_id": "a1", "ocr_tokens": ["STOP", "ALL"]}]
    write(
        tmp_path,
        {
            "TextCaps_0.1_train.json": {"data": rows},
            "TextVQA_Rosetta_OCR_v0.2_train.json": {"data": words},
        },
    )
    found = [parts(record) for record in build(tmp_path, "textcaps")]
    request = "Provide a one-sentence caption for the provided image.\nReference OCR token: "
    assert [f[:3] for f in found] == [
        ("a1", "train_images/a1.jpg", request + "STOP, ALL"),
        ("b2", "train_images/b2.jpg", request),
    ]
    assert {answer for *_, answer in found} <= {"a sign", "a red sign"}


# ---- Sizes.


def test_a_subset_has_as_many_as_there_are():
    records = [{"id": str(i)} for i in range(6218)]
    assert SIZES == {"1K": 1000, "5K": 5000, "10K": 10000}
    for size in SIZES.values():
        chosen = subset(records, size)
        assert len({record["id"] for record in chosen}) == len(chosen) == min(size, 6218)
        assert chosen == subset(records, size)
        assert chosen == random.Random(42).sample(records, min(size, 6218))


@pytest.mark.parametrize(("size", "written"), [("", 30), ("7", 7), ("1K", 30)])
def test_sizes_of_a_file(tmp_path, size, written):
    write_coco(tmp_path, "v2_", 30, multiple_choice_answer="a cat")
    assert len(build(tmp_path, "vqav2", size=size)) == written


# ---- Mistakes.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "coco",
            {},
            "unknown task 'coco'; choose from: flickr30k, iconqa_blank, iconqa_txt, okvqa",
        ),
        ("vqav2", {"size": "2K"}, "unknown size '2K'; choose from: 1K, 5K, 10K, a number"),
        ("vqav2", {"size": "0"}, "unknown size '0'"),
        (
            "vqav2",
            {},
            r"v2_OpenEnded_mscoco_train2014_questions\.json does not exist; it belongs to",
        ),
        ("flickr30k", {}, r"flickr_annotations_30k\.csv does not exist"),
        ("iconqa_txt", {}, "has no samples of split 'train'"),
    ],
)
def test_mistakes_are_told(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        build_training_file(name, tmp_path, tmp_path / "out.json", **options)
    assert not (tmp_path / "out.json").exists()


def test_a_download_that_is_broken_is_told(tmp_path):
    write(tmp_path, {"Annotations/train.json": "[{"})
    with pytest.raises(UserError, match=r"train\.json cannot be used: it is not JSON"):
        build_training_file("vizwiz", tmp_path, tmp_path / "out.json")
    write_coco(tmp_path, "v2_", multiple_choice_answer="a cat")
    write(tmp_path, {"v2_mscoco_train2014_annotations.json": {"annotations": []}})
    with pytest.raises(UserError, match="question 420 has no annotation in"):
        build_training_file("vqav2", tmp_path, tmp_path / "out.json")
    with pytest.raises(UserError, match=r"data root .*nowhere is not a folder"):
        build_training_file("vqav2", tmp_path / "nowhere", tmp_path / "out.json")


@pytest.mark.parametrize("name", ["iconQA-txt", "iconQA_txt", "IconQA-txt", "iconqa_txt"])
def test_a_task_has_one_name(tmp_path, name):
    with pytest.raises(UserError, match=r"^task iconqa_txt: .* no samples"):
        build_training_file(name, tmp_path, tmp_path / "out.json")


def test_image_paths_start_from_one_folder_for_all_tasks(tmp_path):
    problem = {"question": "?", "choices": ["a"], "answer": 0, "split": "train", "image": "i.png"}
    write(tmp_path, {"tasks/scienceqa/problems.json": {"7": problem}})
    write(tmp_path, {"tasks/scienceqa/pid_splits.json": {"train": ["7"]}})
    root, out = tmp_path / "tasks" / "scienceqa", tmp_path / "tasks" / "scienceqa_10000.json"

    def image(**options) -> str:
        build_training_file("scienceqa", root, out, **options)
        return json.loads(out.read_text())[0]["image"]

    assert image() == "scienceqa/train/7/i.png"
    assert image(image_root=root) == "train/7/i.png"
    assert image(image_root=tmp_path) == "tasks/scienceqa/train/7/i.png"
    with pytest.raises(
        UserError, match=r"scienceqa is not below .*elsewhere, where .*--image-root"
    ):
        build_training_file("scienceqa", root, tmp_path / "elsewhere" / "out.json")
    assert not (tmp_path / "elsewhere").exists()
    write(root, {"problems.json": {"7": problem | {"image": "../../../secret.png"}}})
    before = out.read_text()
    with pytest.raises(UserError, match=r"^sample 7: image .*secret\.png is outside of the image"):
        build_training_file("scienceqa", root, out)
    assert out.read_text() == before


def test_the_papers_tasks_are_there():
    assert set(TASK_NAMES) == set(trainable_names())
