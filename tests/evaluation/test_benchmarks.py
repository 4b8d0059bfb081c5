"""Every benchmark from its official files to its score, with given predictions and known scores."""

import csv
import gzip
import io
import json
import random
import sys

import numpy as np
import pytest
from PIL import Image

from moresjax.data.samples import IMAGE_MARK
from moresjax.errors import UserError
from moresjax.evaluation.metrics.hallusionbench import parse_verdict
from moresjax.evaluation.metrics.yes_no import COGNITION, PERCEPTION
from moresjax.evaluation.run import rescore
from moresjax.evaluation.tasks import BENCHMARKS, load_benchmark

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LIMIT = 100  # a part of a benchmark need not have the published number of questions


def write(root, files: dict) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def the_task(name: str, root, **options):
    (task,) = load_benchmark(name, data_root=root, limit=LIMIT, **options)
    return task


def official(name: str, root, content, file: str = "predictions.json", **options) -> dict:
    """Scores of a result file in the benchmark's own format."""
    write(root, {file: content})
    result = rescore(name, root / file, data_root=root, limit=LIMIT, **options)
    return result.scores


def ten(*pairs: tuple[str, int]) -> list[dict]:
    return [{"answer": text, "answer_confidence": "yes"} for text, n in pairs for _ in range(n)]


def vqa_files(folder: str, prefix: str) -> dict:
    questions = [
        {"image_id": 9, "question": "What colour?", "question_id": 91},
        {"image_id": 12, "question": "How many?", "question_id": 120},
    ]
    answers = [
        {"answers": ten(("red", 8), ("blue", 2)), "answer_type": "other", "question_type": "what"},
        {"answers": ten(("2", 10)), "answer_type": "number", "question_type": "how many"},
    ]
    annotations = [
        answer | {"question_id": question["question_id"]}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return {
        f"{folder}/{prefix}OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
        f"{folder}/{prefix}mscoco_val2014_annotations.json": {"annotations": annotations},
    }


def test_vqav2(tmp_path):
    write(tmp_path, vqa_files("vqav2", "v2_"))
    task = the_task("vqav2", tmp_path)
    assert task.items[0].prompt == f"<image>\nWhat colour?\n{SHORT}"
    assert task.items[0].images == (tmp_path / "coco/val2014/COCO_val2014_000000000009.jpg",)
    rows = [{"question_id": 91, "answer": "Blue."}, {"question_id": 120, "answer": "2"}]
    entry = official("vqav2", tmp_path, rows)["vqav2"]
    # Two of ten agree on blue: 0.6; one annotator's "blue" leaves one other: 1/3, twice.
    assert entry["score"] == pytest.approx((0.6 + 1) / 2)
    assert entry["details"]["number"] == 100
    assert entry["missing"] == 0


def test_vqav2_submissions_answer_every_question_of_the_test_set(tmp_path):
    asked = [{"image_id": 3, "question": "Is it?", "question_id": number} for number in (31, 32)]
    name = "vqav2/v2_OpenEnded_mscoco_{}2015_questions.json"
    write(tmp_path, {name.format("test"): {"questions": asked}})
    write(tmp_path, {name.format("test-dev"): {"questions": asked[1:]}})
    write(tmp_path, {"saved.json": [{"question_id": 32, "answer": "The Yes."}]})
    options = {"data_root": tmp_path, "limit": 5, "split": "test-dev"}
    result = rescore("vqav2", tmp_path / "saved.json", **options)
    assert json.loads(result.submissions["vqav2-submission.json"]) == [
        {"question_id": 31, "answer": ""},
        {"question_id": 32, "answer": "yes"},
    ]
    assert result.scores["vqav2"]["score"] is None
    assert "coco/test2015/COCO_test2015_000000000003.jpg" in str(
        the_task("vqav2", tmp_path, split="test-dev").items[0].images[0]
    )


def test_okvqa_counts_missing_predictions_as_wrong(tmp_path):
    write(tmp_path, vqa_files("okvqa", ""))
    entry = official("okvqa", tmp_path, [{"question_id": 120, "answer": "2"}])["okvqa"]
    assert (entry["score"], entry["n"], entry["missing"]) == (0.5, 2, 1)
    assert entry["details"] == {"what": 0, "how many": 100}


def test_gqa(tmp_path):
    def row(question, answer, kind):
        types = {"structural": kind}
        return {"question": question, "answer": answer, "imageId": "n5", "types": types}

    rows = {"1": row("Is it red?", "yes", "verify"), "2": row("Who?", "man", "query")}
    write(tmp_path, {"gqa/testdev_balanced_questions.json": rows})
    assert the_task("gqa", tmp_path).items[1].prompt == f"<image>\nWho?\n{SHORT}"
    saved = [{"questionId": "1", "prediction": "no"}, {"questionId": "2", "prediction": "Man."}]
    entry = official("gqa", tmp_path, saved)["gqa"]
    assert entry["score"] == 0.5
    assert entry["details"] == {"binary": 0, "open": 100}


def test_vizwiz(tmp_path):
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?"}
    full = row | {"answers": ten(("Can", 7), ("tin", 3)), "answer_type": "other", "answerable": 1}
    write(tmp_path, {"vizwiz/Annotations/val.json": [full], "vizwiz/Annotations/test.json": [row]})
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert the_task("vizwiz", tmp_path).items[0].prompt == (
        f"<image>\nWhat is it?\n{hint}\n{SHORT}"
    )
    hint = 'When the information is insufficient, respond with "Unanswerable".'
    assert the_task("vizwiz_ft", tmp_path).items[0].prompt == (
        f"<image>\nWhat is it? {hint} {SHORT}"
    )
    saved = [{"image": row["image"], "answer": "TIN"}]
    assert official("vizwiz", tmp_path, saved)["vizwiz"]["score"] == pytest.approx(0.9)
    write(tmp_path, {"saved.json": saved})
    sent = rescore("vizwiz", tmp_path / "saved.json", data_root=tmp_path, limit=LIMIT, split="test")
    assert json.loads(sent.submissions["vizwiz-submission.json"]) == [
        {"image": row["image"], "answer": "tin"}
    ]


def test_scienceqa(tmp_path):
    common = {"choices": ["salt", "tea"], "grade": "grade3", "subject": "natural science"}
    problems = {
        "4": common | {"question": "Which?", "answer": 1, "hint": "Look.", "image": "image.png"},
        "6": common | {"question": "What?", "answer": 0, "hint": "", "image": None},
    }
    splits = {"test": ["6", "4"]}
    write(tmp_path, {"scienceqa/problems.json": problems, "scienceqa/pid_splits.json": splits})
    task = the_task("scienceqa", tmp_path)
    assert [item.prompt for item in task.items] == [
        f"What?\nA. salt\nB. tea\n{LETTER}",
        f"<image>\nContext: Look.\nWhich?\nA. salt\nB. tea\n{LETTER}",
    ]
    assert task.items[1].images == (tmp_path / "scienceqa/test/4/image.png",)
    assert task.max_new_tokens == 1024
    saved = lines([{"question_id": "4", "text": "B. tea"}, {"question_id": "6", "text": "B"}])
    entry = official("scienceqa", tmp_path, saved, "a.jsonl")["scienceqa"]
    assert entry["score"] == 0.5
    assert entry["details"]["IMG"] == 100
    entry = official("scienceqa_img", tmp_path, saved, "a.jsonl")["scienceqa_img"]
    assert (entry["score"], entry["n"]) == (1, 1)
    (item,) = the_task("scienceqa_img_ft", tmp_path).items
    assert (item.prompt, item.answer) == ("<image>\nWhich? A.salt, B.tea", "B")


def ocr(folder: str, split: str = "val") -> dict:
    found = {"data": [{"image_id": "aa", "ocr_tokens": ["STOP", "4"]}]}
    return {f"{folder}/TextVQA_Rosetta_OCR_v0.2_{split}.json": found}


def test_textvqa(tmp_path):
    row = {"question": "What does it say?", "question_id": 7, "image_id": "aa"}
    answers = ["stop"] * 9 + ["halt"]
    write(
        tmp_path,
        ocr("textvqa") | {"textvqa/TextVQA_0.5.1_val.json": {"data": [row | {"answers": answers}]}},
    )
    (item,) = the_task("textvqa", tmp_path).items
    assert item.prompt == f"<image>\nWhat does it say?\nReference OCR token: STOP, 4\n{SHORT}"
    assert item.images == (tmp_path / "textvqa/train_images/aa.jpg",)
    saved = [{"question_id": 7, "answer": "Halt"}]
    assert official("textvqa", tmp_path, saved)["textvqa"]["score"] == pytest.approx(0.3)
    saved = [{"question_id": 7, "answer": "It says stop."}]
    entry = official("textvqa_judged", tmp_path, saved)["textvqa_judged"]
    assert (entry["score"], entry["judge"]) == (1, {"name": "rule", "comparable": False})


class WordJudge:
    """Replies in turn, and remembers what it was asked."""

    name, settings = "words", {"temperature": 0}

    def __init__(self, *replies: str):
        self.replies, self.prompts, self.attempts = list(replies), [], []

    def __call__(self, prompt: str, attempt: int) -> str:
        self.prompts.append(prompt)
        self.attempts.append(attempt)
        return self.replies.pop(0)


def test_mm_vet_with_and_without_a_judge(tmp_path):
    row = {"imagename": "v1_0.png", "question": "Who?", "answer": "Ann<AND>Bob", "capability": []}
    rows = {"v1_0": row | {"capability": ["rec", "ocr"]}, "v1_1": row | {"capability": ["ocr"]}}
    write(tmp_path, {"mm_vet/mm-vet.json": rows})
    assert the_task("mm_vet", tmp_path).items[0].prompt == "<image>\nWho?"
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


def test_pope_kinds_are_scored_apart_and_silence_is_wrong(tmp_path):
    rows = [
        {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "label": "yes"},
        {"question_id": 2, "image": "COCO_val2014_000000000001.jpg", "label": "no"},
    ]
    asked = lines(row | {"text": "Is there a dog in the image?"} for row in rows)
    kinds = ("random", "popular", "adversarial")
    write(tmp_path, {f"pope/coco_pope_{kind}.json": asked for kind in kinds})
    task = load_benchmark("pope", data_root=tmp_path, limit=LIMIT)[0]
    assert task.items[0].prompt == f"<image>\nIs there a dog in the image?\n{SHORT}"
    assert task.items[0].images[0].parent == tmp_path / "coco/val2014"
    answers = {"random": ("Yes", "No, none"), "popular": ("yes", "yes"), "adversarial": ("no", "")}
    for kind, texts in answers.items():
        rows = lines({"question": "?", "answer": text} for text in texts)
        write(tmp_path, {f"saved/pope_{kind}.jsonl": rows})
    scores = rescore("pope", tmp_path / "saved", data_root=tmp_path, limit=LIMIT).scores
    assert [entry["score"] for entry in scores.values()] == [1, 0.5, 0]
    assert list(scores) == [f"pope_{kind}" for kind in kinds]
    assert scores["pope_popular"]["details"]["yes_ratio"] == 1
    silent = task.score(task.items, [None, None])
    assert silent.value == silent.details["accuracy"] == 0


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_mmmu(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moresjax.evaluation.metrics.mmmu import DOMAINS

    none = {f"image_{number}": None for number in range(1, 8)}

    def row(subject, number, kind, question, options, answer, *images):
        shown = {f"image_{i}": {"bytes": b, "path": "x"} for i, b in enumerate(images, 1)}
        return {
            "id": f"validation_{subject}_{number}",
            "question_type": kind,
            "question": question,
            "options": str(options),
            "answer": answer,
            **none,
            **shown,
        }

    for subjects in DOMAINS.values():
        for subject in subjects:
            rows = [row(subject, 1, "multiple-choice", "Pick <image 1>", ["x", "y"], "B", png(1))]
            if subject == "Math":
                rows += [
                    row(subject, 2, "open", "Sum?<image 2>", [], "['7', 'seven']", *2 * [png(2)])
                ]
            folder = tmp_path / "mmmu" / subject
            folder.mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    items = {item.id: item for item in the_task("mmmu", tmp_path).items}
    assert len(items) == 31
    assert items["validation_Art_1"].prompt == f"<image>\nPick\n\n(A) x\n(B) y\n\n{LETTER}"
    assert items["validation_Art_1"].images == (png(1),)
    assert items["validation_Math_2"].prompt == f"<image>\nSum?\n\n{SHORT}"
    saved = {name: "(B)" for name in items} | {
        "validation_Math_1": "A",
        "validation_Math_2": "The answer is 7.",
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
    assert entry["score"] == pytest.approx((29 - 1 + art) / 31)


def test_iconqa(tmp_path):
    text = {"question": "Which?", "choices": ["one", "two"], "answer": "two"}
    blank = {"question": "There are (_) cats.", "answer": 3}
    write(
        tmp_path,
        {
            "iconqa/test/choose_txt/5/data.json": text,
            "iconqa/test/fill_in_blank/8/data.json": blank,
        },
    )
    (item,) = the_task("iconqa_txt", tmp_path).items
    assert item.prompt == (
        "<image>\nWhich? Choices: one, two. Choose an option from the choices to answer the "
        "question."
    )
    assert item.images == (tmp_path / "iconqa/test/choose_txt/5/image.png",)
    saved = lines([{"question_id": "5", "text": " two"}, {"question_id": "8", "text": "three"}])
    assert official("iconqa_txt", tmp_path, saved, "a.jsonl")["iconqa_txt"]["score"] == 1
    assert official("iconqa_blank", tmp_path, saved, "a.jsonl")["iconqa_blank"]["score"] == 0


def test_hallusionbench(tmp_path):
    def row(visual, figure, answer):
        return {
            "category": "VD",
            "subcategory": "math",
            "visual_input": visual,
            "set_id": "0",
            "figure_id": figure,
            "question_id": "0",
            "question": "Is it equal?",
            "gt_answer": answer,
            "gt_answer_details": "They differ.",
            "filename": None if visual == "0" else f"./hallusion_bench/VD/math/0_{figure}.png",
        }

    rows = [row("1", "1", "1"), row("2", "2", "0")]
    write(tmp_path, {"hallusionbench/HallusionBench.json": rows})
    task = the_task("hallusionbench", tmp_path)
    assert task.items[0].prompt == "<image>\nIs it equal?"
    assert task.items[0].images[0] == tmp_path / "hallusionbench/hallusion_bench/VD/math/0_1.png"
    answers = ("Yes, they are.", "Yes again")
    saved = [row | {"model_prediction": text} for row, text in zip(rows, answers, strict=True)]
    entry = official("hallusionbench", tmp_path, saved)["hallusionbench"]
    assert entry["score"] == 0.5
    assert (entry["details"]["easy aAcc"], entry["details"]["hard aAcc"]) == (100, 0)
    judge = WordJudge("incorrect", "correct")
    score = task.score(task.items, answers, judge)
    assert list(score.items) == [0, 1]
    assert score.details["hard aAcc"] == 100
    assert "They differ." in judge.prompts[0]
    assert parse_verdict("unclear") == 2


def test_text_only_questions_of_hallusionbench_have_no_image(tmp_path):
    row = {"visual_input": "0", "question": "Is it?", "gt_answer": "1", "filename": None}
    write(tmp_path, {"hallusionbench/HallusionBench.json": [row]})
    (item,) = the_task("hallusionbench", tmp_path).items
    assert (item.prompt, item.images) == ("Is it?", ())


def test_mme(tmp_path):
    for subtask in PERCEPTION + COGNITION:
        pairs = (("cat", "Yes"), ("dog", "No"))
        text = "".join(f"Is it a {it}? Please answer yes or no.\t{gold}\n" for it, gold in pairs)
        nested = subtask == "posters"
        folder = "questions_answers_YN/" if nested else ""
        image = "images/" if nested else ""
        write(
            tmp_path,
            {
                f"mme/{subtask}/{folder}7.txt": text,
                f"mme/{subtask}/{image}7.jpg": b"",
            },
        )
    task = the_task("mme", tmp_path)
    assert task.items[0].prompt == f"<image>\nIs it a cat?\n{SHORT}"
    assert len(task.items) == 28
    asked = [line.split("\t") for line in text.splitlines()]
    for subtask in PERCEPTION + COGNITION:
        second = "Yes" if subtask in COGNITION else "no."
        rows = zip(asked, ("Yes", second), strict=True)
        saved = "".join(f"7.jpg\t{q}\t{gold}\t{text}\n" for (q, gold), text in rows)
        write(tmp_path, {f"results/{subtask}.txt": saved})
    entry = rescore("mme", tmp_path / "results", data_root=tmp_path, limit=LIMIT).scores["mme"]
    assert entry["details"]["perception"] == 2000
    assert entry["details"]["cognition"] == 4 * 50
    assert (entry["score"], entry["stderr"]) == (2200, None)


def test_vsr_and_its_judge(tmp_path):
    rows = [
        {"image": "000000000001.jpg", "caption": "The cat is on the mat.", "label": label}
        for label in (1, 0)
    ]
    write(tmp_path, {"vsr/data/splits/zeroshot/test.jsonl": lines(rows)})
    task = the_task("vsr", tmp_path)
    assert task.items[0].prompt == "<image>\nThe cat is on the mat. Please answer yes or no."
    saved = lines({"prediction": text} for text in ("Yes.", "yes or no"))
    assert official("vsr", tmp_path, saved, "a.jsonl")["vsr"]["score"] == 0.5
    judge = WordJudge("yes", "Yes, the same")
    assert task.score(task.items, ["Yes.", "It is not."], judge).value == 1
    assert IMAGE_MARK not in judge.prompts[0]


def test_snli_ve(tmp_path):
    rows = [
        {"pairID": f"p{i}", "sentence2": "Men eat.", "Flickr30K_ID": "11", "gold_label": label}
        for i, label in enumerate(("neutral", "-", "contradiction"))
    ]
    write(tmp_path, {"snli_ve/snli_ve_test.jsonl": lines(rows)})
    task = the_task("snli_ve", tmp_path)
    assert "Statement: Men eat.\n" in task.items[0].prompt
    assert task.items[0].images == (tmp_path / "flickr30k/flickr30k-images/11.jpg",)
    saved = [{"pairID": "p0", "prediction": "Neutral"}, {"pairID": "p2", "prediction": "neutral"}]
    entry = official("snli_ve", tmp_path, saved)["snli_ve"]
    assert (entry["score"], entry["n"]) == (0.5, 2)


def test_cifar(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    records = [
        bytes([label]) + image.tobytes() for label, image in zip((1, 0, 1), images, strict=True)
    ]
    write(
        tmp_path,
        {
            "cifar10/test_batch.bin": b"".join(records),
            "cifar10/batches.meta.txt": "airplane\nautomobile\n\n",
            # The superclass comes first.
            "cifar100/test.bin": b"".join(b"\x09" + record for record in records),
            "cifar100/fine_label_names.txt": "apple\naquarium_fish\n",
        },
    )
    task = the_task("cifar10", tmp_path)
    assert task.items[0].prompt == (
        f"<image>\nWhat is the object in the image? Choose from: airplane, automobile.\n{SHORT}"
    )
    np.testing.assert_array_equal(task.items[2].images[0][5, 6], images[2, :, 5, 6])
    saved = lines({"prediction": text} for text in ("Automobile", "an airplane", "airplane"))
    assert official("cifar10", tmp_path, saved, "a.jsonl")["cifar10"]["score"] == pytest.approx(
        2 / 3
    )
    assert [item.answer for item in the_task("cifar100", tmp_path).items] == [
        "aquarium fish",
        "apple",
        "aquarium fish",
    ]
    write(tmp_path, {"cifar10/test_batch.bin": b"12345"})
    with pytest.raises(UserError, match=r"test_batch.bin is damaged: it has 5 bytes"):
        the_task("cifar10", tmp_path)


def test_mnist(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(2, 28, 28)
    header = b"\0\0\x08\x03" + np.asarray((2, 28, 28), ">i4").tobytes()
    write(
        tmp_path,
        {
            "mnist/t10k-images-idx3-ubyte.gz": gzip.compress(header + images.tobytes()),
            "mnist/t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x02\x07\x03",
        },
    )
    task = the_task("mnist", tmp_path)
    assert [item.answer for item in task.items] == ["7", "3"]
    np.testing.assert_array_equal(task.items[1].images[0][..., 2], images[1])
    saved = lines({"prediction": text} for text in ("7", "It is 37"))
    assert official("mnist", tmp_path, saved, "a.jsonl")["mnist"]["score"] == 0.5
    write(tmp_path, {"mnist/t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x05\x07"})
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged"):
        the_task("mnist", tmp_path)


def test_seed_bench_generated_and_ranked(tmp_path):
    options = {f"choice_{letter}": f"text {letter}" for letter in "abcd"}
    common = {"question": "Where?", "answer": "C", **options}
    rows = [
        common
        | {"question_id": "1", "data_id": "10_1", "data_type": "image", "question_type_id": 1},
        common
        | {"question_id": "2", "data_id": "v.mp4", "data_type": "video", "question_type_id": 2},
    ]
    kinds = {"Scene": 1, "Action": 2}
    write(tmp_path, {"seed_bench/SEED-Bench.json": {"questions": rows, "question_type": kinds}})
    task = the_task("seed_bench", tmp_path)
    listed = "A. text a\nB. text b\nC. text c\nD. text d"
    assert task.items[0].prompt == f"<image>\nWhere?\n{listed}\n{LETTER}"
    assert [item.images[0].name for item in task.items] == ["10_1", "2_2.png"]
    saved = lines([{"question_id": 1, "prediction": "C"}, {"question_id": 2, "prediction": "C."}])
    entry = official("seed_bench", tmp_path, saved, "a.jsonl")["seed_bench"]
    assert entry["details"] == {"Scene": 100, "image": 100, "Action": 0, "video": 0, "total": 50}
    ranked = the_task("seed_bench_rank", tmp_path)
    assert ranked.items[0].prompt == "<image>\nWhere?"
    requests = ranked.construct_requests(ranked.items[0], None)
    assert [request.args[1] for request in requests] == list(options.values())
    replies = [(-3.0, False), (-2.5, False), (-2.0, True), (-2.0, False)]
    assert ranked.prediction(ranked.items[0], replies) == "C"


def captions_score(name, root, saved):
    return official(name, root, saved)[name]["score"]


# Identical captions of three and of four tokens score 7.5 and 10 (of the official scorer).
THREE, FOUR = "a red kite", "two dogs run home"


def test_coco_caption(tmp_path):
    def row(number, split, text):
        place = {"filepath": "val2014", "filename": f"{number}.jpg"}
        sentences = [{"raw": text}]
        return {"cocoid": number, "split": split, "sentences": sentences, **place}

    rows = [row(1, "test", THREE), row(2, "val", "no"), row(3, "test", FOUR)]
    write(tmp_path, {"coco_caption/dataset_coco.json": {"images": rows}})
    task = the_task("coco_caption", tmp_path)
    assert task.items[0].prompt == "<image>\nProvide a one-sentence caption for the provided image."
    assert task.items[1].images == (tmp_path / "coco/val2014/3.jpg",)
    saved = [{"image_id": 1, "caption": "A red kite."}, {"image_id": 3, "caption": FOUR}]
    assert captions_score("coco_caption", tmp_path, saved) == pytest.approx(8.75)
    assert captions_score("coco_caption", tmp_path, saved[:1]) == pytest.approx(7.5 / 2)


def test_flickr30k(tmp_path):
    file = io.StringIO()
    table = csv.DictWriter(file, ["raw", "sentids", "split", "filename", "img_id"])
    table.writeheader()
    for number, text in enumerate((THREE, FOUR)):
        row = {"raw": json.dumps([text]), "split": "test", "filename": f"{number}.jpg"}
        table.writerow(row | {"img_id": number, "sentids": "[]"})
    write(tmp_path, {"flickr30k/flickr_annotations_30k.csv": file.getvalue()})
    saved = [{"image_id": 0, "caption": THREE}, {"image_id": 1, "caption": "a cat"}]
    assert captions_score("flickr30k", tmp_path, saved) == pytest.approx(7.5 / 2)


def test_textcaps(tmp_path):
    rows = [
        {"image_id": name, "reference_strs": [text], "caption_str": text}
        for name, text in (("aa", THREE), ("aa", THREE), ("bb", FOUR))
    ]
    bare = [{"image_id": "aa"}]
    write(
        tmp_path,
        ocr("textcaps")
        | ocr("textcaps", "test")
        | {
            "textcaps/TextCaps_0.1_val.json": {"data": rows},
            "textcaps/TextCaps_0.1_test.json": {"data": bare},
        },
    )
    task = the_task("textcaps", tmp_path)
    assert [item.id for item in task.items] == ["aa", "bb"]
    assert task.items[0].prompt.endswith("provided image.\nReference OCR token: STOP, 4")
    saved = [{"image_id": "aa", "caption": THREE}, {"image_id": "bb", "caption": FOUR}]
    assert captions_score("textcaps", tmp_path, saved) == pytest.approx(8.75)
    sent = rescore(
        "textcaps", tmp_path / "predictions.json", data_root=tmp_path, limit=9, split="test"
    )
    assert json.loads(sent.submissions["textcaps-submission.json"]) == saved[:1]


def test_chair(tmp_path):
    photos = [{"id": number} for number in (1, 2)]
    captions = [{"image_id": 1, "caption": "A puppy."}, {"image_id": 2, "caption": "Nothing."}]
    write(
        tmp_path,
        {
            "chair/synonyms.txt": "dog, puppy\ncat, kitten\nperson, man\n",
            "chair/captions_val2014.json": {"images": photos, "annotations": captions},
            "chair/instances_val2014.json": {
                "categories": [{"id": 17, "name": "cat"}],
                "annotations": [
                    {"image_id": 2, "category_id": 17},
                    {"image_id": 5, "category_id": 17},
                ],
            },
        },
    )
    task = the_task("chair", tmp_path)
    assert {item.id: item.answer for item in task.items} == {"1": ["dog"], "2": ["cat"]}
    assert task.items[0].prompt == "<image>\nPlease describe this image in detail."
    saved = lines(
        [{"image_id": 1, "caption": "Dogs and a man."}, {"image_id": 2, "caption": "A kitten."}]
    )
    entry = official("chair", tmp_path, saved, "a.jsonl")["chair"]
    assert entry["score"] == entry["details"]["CHAIRs"] == 0.5
    assert entry["details"]["CHAIRi"] == pytest.approx(1 / 3)
    assert (entry["details"]["lemmatiser"], entry["details"]["seed"]) == ("vocabulary", 42)
    assert not entry["fraction"]  # lower is better


def test_mmhal_needs_a_judge(tmp_path):
    row = {
        "question_type": "attribute",
        "image_src": "https://example.org/a/b.jpg",
        "image_content": ["cup", "table"],
        "question": "What colour is the cup?",
        "gt_answer": "Red.",
        "model_answer": "",
    }
    write(tmp_path, {"mmhal/response_template.json": [row, row | {"question_type": "other"}]})
    task = the_task("mmhal", tmp_path)
    assert task.items[0].images == (tmp_path / "mmhal/images/b.jpg",)
    saved = [row | {"model_answer": text} for text in ("Blue.", "It is red.")]
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
    assert [row["model_answer"] for row in filled] == ["Blue.", "It is red."]


NEEDS = {name: name for name in BENCHMARKS if name != "digits"} | {
    "vizwiz_ft": "vizwiz",
    "scienceqa_img": "scienceqa",
    "scienceqa_img_ft": "scienceqa",
    "iconqa_txt": "iconqa",
    "iconqa_blank": "iconqa",
    "textvqa_judged": "textvqa",
    "seed_bench_rank": "seed_bench",
}


@pytest.mark.parametrize("name", NEEDS)
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(UserError, match=f"task {NEEDS[name]} .*--data-root"):
        load_benchmark(name, data_root=None, limit=1)
    folder = tmp_path / NEEDS[name]
    with pytest.raises(UserError, match=f"{folder} does not exist; task {NEEDS[name]}"):
        load_benchmark(name, data_root=tmp_path, limit=1)
    folder.mkdir()
    with pytest.raises(UserError, match=rf"{folder}/\S+ (does not exist|has no )") as error:
        load_benchmark(name, data_root=tmp_path, limit=1)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"unknown split of \w+ 'nonsense'; choose from: \w+"):
        load_benchmark(name, data_root=tmp_path, limit=1, split="nonsense")


def test_incomplete_downloads_are_refused_unless_a_part_is_asked_for(tmp_path, caplog):
    write(tmp_path, vqa_files("okvqa", ""))
    with pytest.raises(UserError, match=r"okvqa val: the files hold 2 questions.*5,046"):
        load_benchmark("okvqa", data_root=tmp_path, limit=None)
    row = {"imagename": "a", "question": "?", "answer": "b", "capability": ["rec"]}
    write(tmp_path, {"mm_vet/mm-vet.json": {"v1_0": row}})
    load_benchmark("mm_vet", data_root=tmp_path, limit=None)
    assert "mm_vet: the files hold 1 questions, the published set 218" in caplog.text


def test_saved_predictions_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, vqa_files("okvqa", ""))
    with pytest.raises(UserError, match=r"predictions\.json does not exist"):
        rescore("okvqa", tmp_path / "predictions.json", data_root=tmp_path, limit=2)
    with pytest.raises(UserError, match=r"row 0 of .* has no field 'answer'"):
        official("okvqa", tmp_path, [{"question_id": 1}])
    with pytest.raises(UserError, match="no prediction for any question of okvqa"):
        official("okvqa", tmp_path, [{"question_id": 1, "answer": "x"}])
    with pytest.raises(UserError, match=r"line 2 of .* is not JSON"):
        official("okvqa", tmp_path, '{"question_id": 1, "answer": "x"}\n{]\n', "a.jsonl")


def test_every_benchmark_says_where_its_files_come_from():
    for name, load in BENCHMARKS.items():
        assert name == "digits" or "https://" in sys.modules[load.__module__].__doc__, name
