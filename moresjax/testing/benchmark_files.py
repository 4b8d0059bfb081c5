"""Small official downloads of every benchmark, with their images, shared by the tests."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moresjax.evaluation.metrics.mmmu import DOMAINS
from moresjax.evaluation.metrics.yes_no import COGNITION, PERCEPTION

# Identical captions of three and of four tokens score 7.5 and 10 (of the official scorer).
THREE, FOUR = "a red kite", "two dogs run home"
PAIRS = (("cat", "Yes"), ("dog", "No"))  # what MME asks about an image
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
DIGITS = np.arange(2 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(2, 28, 28)


def write(root: Path, files: dict) -> None:
    """Writes files by name: bytes, texts, or values as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def photo(colour: int = 90) -> bytes:
    """A small image in a file format of its own."""
    file = io.BytesIO()
    Image.new("RGB", (12, 12), (colour, 0, 255 - colour)).save(file, "PNG")
    return file.getvalue()


def ten(*pairs: tuple[str, int]) -> list[dict]:
    """Ten annotators' answers."""
    return [{"answer": text, "answer_confidence": "yes"} for text, n in pairs for _ in range(n)]


def coco_photos(*numbers: int, split: str = "val2014") -> dict:
    return {f"coco/{split}/COCO_{split}_{number:012d}.jpg": photo(number) for number in numbers}


def vqa(folder: str, prefix: str) -> dict:
    """Two questions in the VQA format."""
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
        **coco_photos(9, 12),
    }


def vqav2() -> dict:
    asked = [{"image_id": 3, "question": "Is it?", "question_id": number} for number in (31, 32)]
    name = "vqav2/v2_OpenEnded_mscoco_{}2015_questions.json"
    return {
        **vqa("vqav2", "v2_"),
        name.format("test"): {"questions": asked},
        name.format("test-dev"): {"questions": asked[1:]},
        **coco_photos(3, split="test2015"),
    }


def okvqa() -> dict:
    return vqa("okvqa", "")


def gqa() -> dict:
    def row(question, answer, kind):
        types = {"structural": kind}
        return {"question": question, "answer": answer, "imageId": "n5", "types": types}

    rows = {"1": row("Is it red?", "yes", "verify"), "2": row("Who?", "man", "query")}
    return {"gqa/testdev_balanced_questions.json": rows, "gqa/images/n5.jpg": photo()}


def vizwiz() -> dict:
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?"}
    facts = {"answers": ten(("Can", 7), ("tin", 3)), "answer_type": "other", "answerable": 1}
    bare = row | {"image": "VizWiz_test_00000000.jpg"}
    return {
        "vizwiz/Annotations/val.json": [row | facts],
        "vizwiz/Annotations/test.json": [bare],
        "vizwiz/val/VizWiz_val_00000000.jpg": photo(),
        "vizwiz/test/VizWiz_test_00000000.jpg": photo(),
    }


def scienceqa() -> dict:
    common = {"choices": ["salt", "tea"], "grade": "grade3", "subject": "natural science"}
    common |= {"split": "test"}
    problems = {
        "4": common | {"question": "Which?", "answer": 1, "hint": "Look.", "image": "image.png"},
        "6": common | {"question": "What?", "answer": 0, "hint": "", "image": None},
    }
    return {
        "scienceqa/problems.json": problems,
        "scienceqa/pid_splits.json": {"test": ["6", "4"], "minitest": ["4"]},
        "scienceqa/test/4/image.png": photo(),
    }


def ocr(folder: str, split: str) -> dict:
    found = {"data": [{"image_id": "aa", "ocr_tokens": ["STOP", "4"]}]}
    return {f"{folder}/TextVQA_Rosetta_OCR_v0.2_{split}.json": found}


def text_photos(folder: str) -> dict:
    """Photos of val and test: the former are with those of train."""
    names = ("train_images/aa", "train_images/bb", "test_images/aa")
    return {f"{folder}/{name}.jpg": photo(len(name)) for name in names}


def textvqa() -> dict:
    row = {"question": "What does it say?", "question_id": 7, "image_id": "aa"}
    answers = ["stop"] * 9 + ["halt"]
    return {
        **ocr("textvqa", "val"),
        **ocr("textvqa", "test"),
        "textvqa/TextVQA_0.5.1_val.json": {"data": [row | {"answers": answers}]},
        "textvqa/TextVQA_0.5.1_test.json": {"data": [row]},
        **text_photos("textvqa"),
    }


def mm_vet() -> dict:
    row = {"imagename": "v1_0.png", "question": "Who?", "answer": "Ann<AND>Bob", "capability": []}
    rows = {"v1_0": row | {"capability": ["rec", "ocr"]}, "v1_1": row | {"capability": ["ocr"]}}
    return {"mm_vet/mm-vet.json": rows, "mm_vet/images/v1_0.png": photo()}


def pope() -> dict:
    rows = [
        {"question_id": 1, "image": "COCO_val2014_000000000001.jpg", "label": "yes"},
        {"question_id": 2, "image": "COCO_val2014_000000000001.jpg", "label": "no"},
    ]
    asked = lines(row | {"text": "Is there a dog in the image?"} for row in rows)
    kinds = ("random", "popular", "adversarial")
    return {f"pope/coco_pope_{kind}.json": asked for kind in kinds} | coco_photos(1)


def mmmu() -> dict:
    """A question per subject; in two, one more that shows the second image or both."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    none = {f"image_{number}": None for number in range(1, 8)}

    def row(name, kind, question, options, answer, *images):
        shown = {f"image_{i}": {"bytes": b, "path": "x"} for i, b in enumerate(images, 1)}
        return {
            "id": name,
            "question_type": kind,
            "question": question,
            "options": str(options),
            "answer": answer,
            **none,
            **shown,
        }

    files = {}
    for split in ("validation", "test"):
        known = split == "validation"
        for subject in (name for subjects in DOMAINS.values() for name in subjects):
            name, answer = f"{split}_{subject}", "B" if known else "?"
            choice = "multiple-choice"
            rows = [row(f"{name}_1", choice, "Pick <image 1>", ["x", "y"], answer, photo(1))]
            asked = {"Math": "Sum?<image 2>", "Accounting": "Sum of <image 1> and <image 2>?"}
            if subject in asked:
                answer = "['7', 'seven']" if known else "?"
                rows += [row(f"{name}_2", "open", asked[subject], [], answer, photo(1), photo(2))]
            table = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), table)
            files[f"mmmu/{subject}/{split}-00000-of-00001.parquet"] = table.getvalue()
    return files


def iconqa() -> dict:
    text: dict[str, Any] = {"question": "Which?", "choices": ["one", "two"], "answer": "two"}
    blank = {"question": "There are (_) cats.", "answer": 3}
    return {
        "iconqa/test/choose_txt/5/data.json": text,
        "iconqa/test/choose_txt/5/image.png": photo(),
        "iconqa/test/fill_in_blank/8/data.json": blank,
        "iconqa/test/fill_in_blank/8/image.png": photo(),
    }


def hallusionbench() -> dict:
    """A figure, a question without one, and the altered figure."""

    def row(category, figure, answer):
        name = f"hallusion_bench/{category}/math/0_{figure}.png"
        return {
            "category": category,
            "subcategory": "math",
            "visual_input": figure,
            "set_id": "0",
            "figure_id": figure,
            "question_id": "0",
            "question": "Is it equal?",
            "gt_answer": answer,
            "gt_answer_details": "They differ.",
            "filename": None if figure == "0" else f"./{name}",
        }

    rows = [row("VD", "1", "1"), row("VS", "0", "1"), row("VD", "2", "0")]
    figures = [f"hallusionbench/{row['filename'][2:]}" for row in rows if row["filename"]]
    return {"hallusionbench/HallusionBench.json": rows} | dict.fromkeys(figures, photo())


def mme() -> dict:
    """Both layouts of a subtask's folder."""
    text = "".join(f"Is it a {it}? Please answer yes or no.\t{gold}\n" for it, gold in PAIRS)
    files = {}
    for subtask in PERCEPTION + COGNITION:
        nested = subtask == "posters"
        folder = "questions_answers_YN/" if nested else ""
        image = "images/" if nested else ""
        files |= {f"mme/{subtask}/{folder}7.txt": text, f"mme/{subtask}/{image}7.jpg": photo()}
    return files


def vsr() -> dict:
    rows = [
        {"image": "000000000001.jpg", "caption": "The cat is on the mat.", "label": label}
        for label in (1, 0)
    ]
    return {
        "vsr/data/splits/zeroshot/test.jsonl": lines(rows),
        "vsr/images/000000000001.jpg": photo(),
    }


def snli_ve() -> dict:
    rows = [
        {"pairID": f"p{i}", "sentence2": "Men eat.", "Flickr30K_ID": "11", "gold_label": label}
        for i, label in enumerate(("neutral", "-", "contradiction"))
    ]
    return {
        "snli_ve/snli_ve_test.jsonl": lines(rows),
        "flickr30k/flickr30k-images/11.jpg": photo(),
    }


def cifar() -> dict:
    records = [
        bytes([label]) + image.tobytes() for label, image in zip((1, 0, 1), COLOURS, strict=True)
    ]
    return {
        "cifar10/test_batch.bin": b"".join(records),
        "cifar10/batches.meta.txt": "airplane\nautomobile\n\n",
        # The superclass comes first.
        "cifar100/test.bin": b"".join(b"\x09" + record for record in records),
        "cifar100/fine_label_names.txt": "apple\naquarium_fish\n",
    }


def mnist() -> dict:
    header = b"\0\0\x08\x03" + np.asarray((2, 28, 28), ">i4").tobytes()
    return {
        "mnist/t10k-images-idx3-ubyte.gz": gzip.compress(header + DIGITS.tobytes()),
        "mnist/t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x02\x07\x03",
    }


def seed_bench() -> dict:
    """An image and a video."""
    options = {f"choice_{letter}": f"text {letter}" for letter in "abcd"}
    common = {"question": "Where?", "answer": "C", **options}
    rows = [
        common
        | {"question_id": "1", "data_id": "10_1", "data_type": "image", "question_type_id": 1},
        common
        | {"question_id": "2", "data_id": "v.mp4", "data_type": "video", "question_type_id": 2},
    ]
    kinds = {"Scene": 1, "Action": 2}
    return {
        "seed_bench/SEED-Bench.json": {"questions": rows, "question_type": kinds},
        "seed_bench/SEED-Bench-image/10_1": photo(),
        "seed_bench/SEED-Bench-video-image/2_2.png": photo(),
    }


def coco_caption() -> dict:
    def row(number, split, text):
        place = {"filepath": "val2014", "filename": f"{number}.jpg"}
        sentences = [{"raw": text}]
        return {"cocoid": number, "split": split, "sentences": sentences, **place}

    rows = [row(1, "test", THREE), row(2, "val", "no"), row(3, "test", FOUR)]
    return {
        "coco_caption/dataset_coco.json": {"images": rows},
        "coco/val2014/1.jpg": photo(),
        "coco/val2014/3.jpg": photo(3),
    }


def flickr30k() -> dict:
    file = io.StringIO()
    table = csv.DictWriter(file, ["raw", "sentids", "split", "filename", "img_id"])
    table.writeheader()
    for number, text in enumerate((THREE, FOUR)):
        row = {"raw": json.dumps([text]), "split": "test", "filename": f"{number}.jpg"}
        table.writerow(row | {"img_id": number, "sentids": "[]"})
    return {
        "flickr30k/flickr_annotations_30k.csv": file.getvalue(),
        "flickr30k/flickr30k-images/0.jpg": photo(),
        "flickr30k/flickr30k-images/1.jpg": photo(1),
    }


def textcaps() -> dict:
    rows = [
        {"image_id": name, "reference_strs": [text], "caption_str": text}
        for name, text in (("aa", THREE), ("aa", THREE), ("bb", FOUR))
    ]
    return {
        **ocr("textcaps", "val"),
        **ocr("textcaps", "test"),
        "textcaps/TextCaps_0.1_val.json": {"data": rows},
        "textcaps/TextCaps_0.1_test.json": {"data": [{"image_id": "aa"}]},
        **text_photos("textcaps"),
    }


def chair() -> dict:
    photos = [{"id": number} for number in (1, 2)]
    captions = [{"image_id": 1, "caption": "A puppy."}, {"image_id": 2, "caption": "Nothing."}]
    seen = [{"image_id": number, "category_id": 17} for number in (2, 5)]
    return {
        "chair/synonyms.txt": "dog, puppy\ncat, kitten\nperson, man\n",
        "chair/captions_val2014.json": {"images": photos, "annotations": captions},
        "chair/instances_val2014.json": {
            "categories": [{"id": 17, "name": "cat"}],
            "annotations": seen,
        },
        **coco_photos(1, 2),
    }


def mmhal() -> dict:
    row = {
        "question_type": "attribute",
        "image_src": "https://example.org/a/b.jpg",
        "image_content": ["cup", "table"],
        "question": "What colour is the cup?",
        "gt_answer": "Red.",
        "model_answer": "",
    }
    return {
        "mmhal/response_template.json": [row, row | {"question_type": "other"}],
        "mmhal/images/b.jpg": photo(),
    }


def task_files() -> dict:
    """Of each task of LLaVA Steering a question to train on, beside those to ask."""
    asked = {"image": "VizWiz_train_00000000.jpg", "question": "What is it?", "answerable": 1}
    problems, splits = "scienceqa/problems.json", "scienceqa/pid_splits.json"
    files = scienceqa() | vizwiz() | iconqa()
    known = files[problems]["4"] | {"split": "train"}
    training = {name.replace("/test/", "/train/"): x for name, x in iconqa().items()}
    return files | {
        problems: files[problems] | {"2": known},
        splits: files[splits] | {"train": ["2"]},
        "scienceqa/train/2/image.png": photo(1),
        "vizwiz/Annotations/train.json": [asked | {"answers": ten(("can", 10))}],
        "vizwiz/train/VizWiz_train_00000000.jpg": photo(2),
        **training,
    }


DOWNLOADS: dict[str, Callable[[], dict]] = {
    "chair": chair,
    "cifar10": cifar,
    "cifar100": cifar,
    "coco_caption": coco_caption,
    "digits": dict,  # built in
    "digits_hallusion": dict,  # built in
    "digits_pope": dict,  # built in
    "digits_text": dict,  # built in
    "flickr30k": flickr30k,
    "gqa": gqa,
    "hallusionbench": hallusionbench,
    "iconqa_blank": iconqa,
    "iconqa_txt": iconqa,
    "mm_vet": mm_vet,
    "mme": mme,
    "mme_sampled": mme,
    "mmhal": mmhal,
    "mmmu": mmmu,
    "mnist": mnist,
    "okvqa": okvqa,
    "pope": pope,
    "pope_judged": pope,
    "scienceqa": scienceqa,
    "scienceqa_img": scienceqa,
    "scienceqa_img_ft": scienceqa,
    "seed_bench": seed_bench,
    "seed_bench_rank": seed_bench,
    "snli_ve": snli_ve,
    "textcaps": textcaps,
    "textvqa": textvqa,
    "textvqa_judged": textvqa,
    "vizwiz": vizwiz,
    "vizwiz_ft": vizwiz,
    "vqav2": vqav2,
    "vsr": vsr,
}
