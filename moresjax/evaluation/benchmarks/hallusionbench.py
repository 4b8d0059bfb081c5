"""HallusionBench (Guan et al. 2024): yes/no questions about figures, some of them altered.

Files in `hallusionbench/`, from https://github.com/tianyi-lab/HallusionBench: `HallusionBench.json`
and `hallusion_bench/` (of `hallusion_bench.zip`). The predictions are also written into the rows of
the former, for the benchmark's own `evaluation.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    ResultReader,
    SavedPredictions,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    load_results,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.hallusionbench import (
    hallusionbench_summary,
    is_correct,
    parse_verdict,
    rule_verdict,
)
from moresjax.evaluation.scoring import JudgeScorer
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 1_129
NO_FIGURE = "0"
# The fields that say which question a row is; `visual_input` does not tell altered figures apart in
# the authors' sample of results.
PLACE = ("category", "subcategory", "set_id", "figure_id", "question_id")
TEXT = "model_prediction"


def _example(folder: Path, number: int, row: dict) -> Example:
    shown = str(row["visual_input"]) != NO_FIGURE
    images = (image_file(folder, row["filename"], number),) if shown else ()
    prompt = llava_prompt(row["question"], "", len(images))
    return Example(str(number), prompt, str(row["gt_answer"]), images, metadata=row)


def _place(row: Mapping) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in PLACE)


def _reader(examples: Sequence[Example]) -> ResultReader:
    """A reader of the rows of `HallusionBench.json` with predictions, of which some may lack."""
    ids = {_place(example.metadata): example for example in examples}

    def read(path: Path) -> SavedPredictions:
        rows = load_results(path)
        if not isinstance(rows, list) or not all(
            isinstance(row, Mapping) and {*PLACE, "question", TEXT} <= set(row) for row in rows
        ):
            return result_reader(None, TEXT)(path)  # in the order of the questions
        found = {}
        for number, row in enumerate(rows):
            example = ids.get(_place(row))
            if example is None:
                continue
            question = example.metadata["question"]
            if row["question"].split() != question.split():
                raise UserError(
                    f"row {number} of {path} answers {row['question']!r}, but that question of "
                    f"hallusionbench is {question!r}"
                )
            found[example.id] = str(row[TEXT])
        return found

    return read


@benchmark("hallusionbench")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Accuracy per question, figure and pair; without a judge a `yes` anywhere means yes."""
    folder = benchmark_folder("hallusionbench", data_root)
    check_split("hallusionbench", split, ("test",))
    rows = limit_rows(read_json(folder, "HallusionBench.json"), limit, "hallusionbench", SIZE)
    examples = [_example(folder, number, row) for number, row in enumerate(rows)]

    def submission(predictions: Mapping[str, str]) -> str:
        filled = [dict(example.metadata, **{TEXT: predictions[example.id]}) for example in examples]
        return json.dumps(filled, indent=1)

    scorer = JudgeScorer(
        "hallusionbench",
        parse_verdict,
        rule=rule_verdict,
        fields=lambda example: {"answer": example.metadata["gt_answer_details"]},
        to_scores=lambda examples, grades: [
            float(is_correct(example.metadata, int(grade)))
            for example, grade in zip(examples, grades, strict=True)
        ],
        details=lambda examples, texts, grades: hallusionbench_summary(
            [example.metadata for example in examples], [int(grade) for grade in grades]
        ),
        name="aAcc",
    )
    return [
        BenchmarkTask(
            "hallusionbench",
            examples,
            max_new_tokens=512,
            scorer=scorer,
            read=_reader(examples),
            submissions={"hallusionbench-submission.json": submission},
        )
    ]
