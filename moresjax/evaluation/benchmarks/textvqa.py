"""TextVQA (Singh et al. 2019): questions about the text in photos, ten answers each.

Files in `textvqa/`, from https://textvqa.org/dataset/: `TextVQA_0.5.1_val.json`,
`TextVQA_Rosetta_OCR_v0.2_val.json`, and `train_images/` (which holds the photos of val too); for
the server the two files of `test` and `test_images/`. As LLaVA-1.5 does, prompts list the tokens
an OCR system found.

`textvqa_judged` scores the most frequent answer by MRT's judge.
"""

import json
from collections import Counter
from collections.abc import Mapping

from moresjax.data.generators import read_json
from moresjax.evaluation.examples import Item
from moresjax.evaluation.files import ask, choose_split, first, folder_of, read_rows
from moresjax.evaluation.metrics.judged import rule_mrt
from moresjax.evaluation.metrics.vqa import m4c_accuracy
from moresjax.evaluation.scoring import by_item, same_answer
from moresjax.evaluation.tasks import VisualTask, benchmark

SIZES = {"val": 5_000, "test": None}


def ocr_lines(folder, split: str) -> dict[str, str]:
    """The line that lists an image's OCR tokens, by image."""
    found = read_json(folder, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"]
    return {
        row["image_id"]: f"Reference OCR token: {', '.join(row['ocr_tokens'])}" for row in found
    }


def _items(name: str, data_root, limit: int | None, split: str) -> list[Item]:
    folder = folder_of("textvqa", data_root)
    choose_split(name, split, list(SIZES))
    rows = read_json(folder, f"TextVQA_0.5.1_{split}.json")["data"]
    lines = ocr_lines(folder, split)
    photos = folder / ("test_images" if split == "test" else "train_images")
    return [
        Item(
            str(row["question_id"]),
            ask(f"{row['question']}\n{lines.get(row['image_id'], 'Reference OCR token: ')}"),
            row.get("answers"),
            (photos / f"{row['image_id']}.jpg",),
        )
        for row in first(rows, limit, f"{name} {split}", SIZES[split])
    ]


def _submission(predictions: Mapping[str, str]) -> str:
    return json.dumps(
        [{"question_id": int(name), "answer": text} for name, text in predictions.items()]
    )


@benchmark("textvqa")
def load(data_root=None, limit: int | None = None, split: str = "val") -> list[VisualTask]:
    """VQA accuracy of M4C's evaluator on `val`; `test` makes the file for the EvalAI server."""
    items = _items("textvqa", data_root, limit, split)
    score, read = by_item(m4c_accuracy, name="VQA accuracy"), read_rows("question_id", "answer")
    submit = {"textvqa-submission.json": _submission} if split == "test" else None
    return [VisualTask("textvqa", items, score=score, read=read, submissions=submit)]


@benchmark("textvqa_judged")
def load_judged(data_root=None, limit: int | None = None, split: str = "val") -> list[VisualTask]:
    """Share of answers that a judge finds equal to the most frequent one."""
    choose_split("textvqa_judged", split, ("val",))
    items = [
        Item(item.id, item.prompt, Counter(item.answer).most_common(1)[0][0], item.images)
        for item in _items("textvqa_judged", data_root, limit, split)
    ]
    score = same_answer(lambda text, answer: float(rule_mrt(text, answer) == "Yes"))
    read = read_rows("question_id", "answer")
    return [VisualTask("textvqa_judged", items, score=score, read=read)]
