"""MM-Vet (Yu et al. 2023): open questions that need several skills, graded by an LLM.

Files in `mm_vet/`, from https://github.com/yuweihao/MM-Vet (`mm-vet.zip`): `mm-vet.json` and
`images/`. The predictions are also written in the format of the benchmark's own evaluator.
"""

import json
from collections.abc import Sequence

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
from moresjax.evaluation.metrics.judge_prompts import MM_VET_ATTEMPTS, MM_VET_RETRY
from moresjax.evaluation.metrics.judged import (
    mm_vet_answer,
    mm_vet_summary,
    parse_mm_vet,
    rule_mm_vet,
)
from moresjax.evaluation.scoring import JudgeScorer, Predictions
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

SIZE = 218


def _details(
    examples: Sequence[Example], predictions: Predictions, grades: Sequence[float]
) -> dict[str, float]:
    runs = {example.id: [grade] for example, grade in zip(examples, grades, strict=True)}
    return mm_vet_summary(
        runs, {example.id: example.metadata["capability"] for example in examples}
    )


@benchmark("mm_vet")
def load(
    data_root: DataRoot = None, limit: int | None = None, split: str = "test"
) -> list[BenchmarkTask]:
    """Mean grade, also per skill; without a judge a rule counts the parts of the answer."""
    folder = benchmark_folder("mm_vet", data_root)
    check_split("mm_vet", split, ("test",))
    rows = list(read_json(folder, "mm-vet.json").items())
    examples = [
        Example(
            name,
            llava_prompt(row["question"], ""),
            row["answer"],
            (image_file(folder / "images", row["imagename"], name),),
            metadata={"capability": row["capability"]},
        )
        for name, row in limit_rows(rows, limit, "mm_vet", SIZE, strict=False)
    ]
    scorer = JudgeScorer(
        "mm_vet",
        parse_mm_vet,
        rule=rule_mm_vet,
        fields=lambda example: {"answer": mm_vet_answer(example.answer)},
        details=_details,
        name="grade",
        attempts=MM_VET_ATTEMPTS,
        retry=MM_VET_RETRY,
    )
    return [
        BenchmarkTask(
            "mm_vet",
            examples,
            max_new_tokens=1024,
            scorer=scorer,
            read=result_reader("question_id", "text"),
            submissions={"mm_vet-submission.json": json.dumps},
        )
    ]
