"""MMHal-Bench (Sun et al. 2023): open questions that invite hallucinations, rated by an LLM.

Files in `mmhal/`, from https://huggingface.co/datasets/Shengcao1006/MMHal-Bench:
`response_template.json`, and `images/` with each image under the last part of its `image_src`. The
predictions are also written into the template, for the benchmark's own evaluator.
"""

import json
from collections.abc import Mapping, Sequence

from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import (
    DataRoot,
    benchmark_folder,
    check_split,
    image_file,
    limit_rows,
    llava_prompt,
    read_json,
    result_reader,
)
from moresjax.evaluation.metrics.judged import MMHAL_MAX, mmhal_summary, parse_mmhal
from moresjax.evaluation.scoring import JudgeScorer, Predictions
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 96


def _details(
    examples: Sequence[Example], predictions: Predictions, grades: Sequence[float]
) -> dict[str, float]:
    kinds = [example.metadata["question_type"] for example in examples]
    return mmhal_summary([int(grade) for grade in grades], kinds)


@benchmark("mmhal")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Mean rating as a share of the best one; without a judge there is no score."""
    folder = benchmark_folder("mmhal", data_root)
    check_split("mmhal", split, ("test",))
    rows = limit_rows(read_json(folder, "response_template.json"), limit, "mmhal", SIZE)
    examples = [
        Example(
            str(number),
            llava_prompt(row["question"], ""),
            row["gt_answer"],
            (image_file(folder / "images", row["image_src"].rpartition("/")[2], number),),
            metadata={
                "question_type": row["question_type"],
                "image_content": ", ".join(row["image_content"]),
            },
        )
        for number, row in enumerate(rows)
    ]

    def submission(predictions: Mapping[str, str]) -> str:
        filled = [
            row | {"model_answer": predictions[example.id]}
            for row, example in zip(rows, examples, strict=True)
        ]
        return json.dumps(filled, indent=1)

    scorer = JudgeScorer(
        "mmhal",
        parse_mmhal,
        fields=lambda example: {"image_content": example.metadata["image_content"]},
        to_scores=lambda examples, grades: [grade / MMHAL_MAX for grade in grades],
        details=_details,
        name="rating",
    )
    return [
        BenchmarkTask(
            "mmhal",
            examples,
            max_new_tokens=512,
            scorer=scorer,
            read=result_reader(None, "model_answer"),
            submissions={"mmhal-responses.json": submission},
        )
    ]
