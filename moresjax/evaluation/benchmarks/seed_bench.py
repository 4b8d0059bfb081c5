"""SEED-Bench (Li et al. 2023): multiple choice about images and videos, in twelve types.

Files in `seed_bench/`, from https://huggingface.co/datasets/AILab-CVC/SEED-Bench:
`SEED-Bench.json`, `SEED-Bench-image/`, and the middle frame of every video as
`SEED-Bench-video-image/TYPE_ID.png`, with the numbers of question type and question (LLaVA's
`extract_video_frames.py` makes them).

`seed_bench` asks for a letter, as LLaVA-1.5 does; `seed_bench_rank` takes the choice whose text is
likeliest (summed over its tokens), as the benchmark's authors do. The letters are also written for
the benchmark's leaderboard.
"""

import json
from collections.abc import Mapping, Sequence

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    PICK_LETTER,
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
    with_options,
)
from moresjax.evaluation.metrics.choices import seed_correct, seed_summary
from moresjax.evaluation.scoring import Predictions, example_scorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 19_242


def _details(
    examples: Sequence[Example], predictions: Predictions, scores: Sequence[float]
) -> dict[str, float]:
    return seed_summary(
        (example.metadata["type"], example.metadata["data"], bool(score))
        for example, score in zip(examples, scores, strict=True)
    )


def _submission(predictions: Mapping[str, str]) -> str:
    rows = ({"question_id": i, "prediction": text.strip()} for i, text in predictions.items())
    return "".join(json.dumps(row) + "\n" for row in rows)


def _tasks(
    name: str, rank: bool, data_root: DataRoot, limit: int | None, split: str
) -> list[BenchmarkTask]:
    folder = benchmark_folder("seed_bench", data_root)
    check_split(name, split, ("test",))
    data = read_json(folder, "SEED-Bench.json")
    types = {number: kind for kind, number in data["question_type"].items()}
    examples = []
    for row in limit_rows(data["questions"], limit, name, SIZE, strict=False):
        options = [row[f"choice_{letter}"] for letter in "abcd"]
        image = image_file(folder / "SEED-Bench-image", row["data_id"], row["question_id"])
        if row["data_type"] == "video":
            frame = f"{row['question_type_id']}_{row['question_id']}.png"
            image = image_file(folder / "SEED-Bench-video-image", frame, row["question_id"])
        question = row["question"]
        asked = (
            llava_prompt(question, "")
            if rank
            else llava_prompt(with_options(question, options), PICK_LETTER)
        )
        metadata = {"type": types[row["question_type_id"]], "data": row["data_type"]}
        choices = tuple(options) if rank else ()
        examples.append(
            Example(str(row["question_id"]), asked, row["answer"], (image,), choices, metadata)
        )
    scorer = example_scorer(seed_correct, _details)
    read = result_reader("question_id", "prediction")
    submissions = {f"{name}-submission.jsonl": _submission}
    return [BenchmarkTask(name, examples, scorer=scorer, read=read, submissions=submissions)]


@benchmark("seed_bench")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy of generated letters, by question type."""
    return _tasks("seed_bench", False, data_root, limit, split)


@benchmark("seed_bench_rank")
def load_rank(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy of ranked choices, by question type."""
    return _tasks("seed_bench_rank", True, data_root, limit, split)
