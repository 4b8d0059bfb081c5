"""Result files as benchmarks' authors publish them, in miniature, and files with odd contents."""

import ast
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moresjax.core.errors import UserError
from moresjax.data.images import UnusableImage
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.tasks import load_benchmark
from moresjax.testing import benchmark_files as downloads
from moresjax.testing.benchmark_files import photo, write

LIMIT = 100


def score(name: str, root, content, file: str = "predictions.json") -> dict:
    write(root, {file: content})
    return rescore(name, root / file, data_root=root, limit=LIMIT).scores[name]


def test_numbers_of_choices_of_iconqa(tmp_path):
    """`results/choose_txt/exp_patch_transformer_ques_bert.json` of lupantech/IconQA: 6,316 numbers,
    75.19 percent; `results/fill_in_blank/...`: 3,638 texts."""
    write(tmp_path, downloads.iconqa())
    for number, right in ((1, 1), (0, 0), (9, 0), (-1, 0)):
        saved = {
            "accuracy": 75.19,
            "args": {"task": "choose_txt"},
            "results": {"5": number, "7": 0},
        }
        entry = score("iconqa_txt", tmp_path, saved)
        assert (entry["score"], entry["missing"]) == (right, 0), number
    for text, right in (("3", 1), (3, 1), ("o'clock", 0)):
        saved = {"accuracy": 83.6, "args": {}, "results": {"8": text, "20": "8,488"}}
        assert score("iconqa_blank", tmp_path, saved)["score"] == right
    with pytest.raises(UserError, match="no prediction for any question of iconqa_txt"):
        score("iconqa_txt", tmp_path, {"results": {"88": 1}})


@pytest.mark.parametrize("name", ["scienceqa", "scienceqa_img", "scienceqa_img_ft"])
def test_numbers_of_choices_of_scienceqa(name, tmp_path):
    """`results/gpt3/*.json` of lupantech/ScienceQA and what LLaVA's `eval_science_qa.py` writes."""
    write(tmp_path, downloads.scienceqa())
    saved = {"acc": 50, "correct": 1, "count": 2, "results": {"4": 1, "6": 1}}
    saved["outputs"] = {"4": "The answer is B. BECAUSE: ...", "6": "The answer is B."}
    assert score(name, tmp_path, saved)["score"] == (0.5 if name == "scienceqa" else 1)
    for number in (-1, 4, 99):  # LLaVA writes -1 where it finds no letter
        assert score(name, tmp_path, saved | {"results": {"4": number}})["score"] == 0


def test_the_sample_of_hallusionbench(tmp_path):
    """`HallusionBench_result_sample.json` has 254 of 1,129 rows in another order, without true
    answers, and with `visual_input` 1 everywhere."""
    files = downloads.hallusionbench()
    rows = files["hallusionbench/HallusionBench.json"]
    write(tmp_path, files)
    sample = [
        {key: value for key, value in row.items() if key not in ("gt_answer", "filename")}
        | {"visual_input": "1", "question": f"{row['question']} ", "model_prediction": text}
        for row, text in ((rows[2], "No."), (rows[0], "No."))
    ]
    entry = score("hallusionbench", tmp_path, sample)
    assert (entry["score"], entry["n"], entry["missing"]) == (pytest.approx(1 / 3), 3, 1)
    sample[0]["question"] = "Is it larger?"
    with pytest.raises(
        UserError, match=r"row 0 of .*'Is it larger\?', but that .* 'Is it equal\?'"
    ):
        score("hallusionbench", tmp_path, sample)
    # Without these fields the order is all there is.
    texts = [{"model_prediction": text} for text in ("Yes", "Yes", "No")]
    assert score("hallusionbench", tmp_path, texts)["score"] == 1
    with pytest.raises(UserError, match="2 predictions for the 3 questions"):
        score("hallusionbench", tmp_path, texts[:2])


@pytest.mark.parametrize("ending", ["", ",", ",\n"])
@pytest.mark.parametrize("name", ["seed_bench", "seed_bench_rank"])
def test_lines_of_seed_bench_end_in_commas(name, ending, tmp_path):
    """`evaluate_result/SEED-Bench-1/GPT-4V.json` of AILab-CVC/SEED-Bench: one object per line."""
    write(tmp_path, downloads.seed_bench())
    rows = [
        {"question_id": number, "prediction": text, "gt_answer": "C"}
        for number, text in (("1", "C"), ("2", "A"), ("v4614", "A"))
    ]
    saved = ",\n".join(map(json.dumps, rows)) + ending
    assert score(name, tmp_path, saved, "GPT-4V.json")["score"] == 0.5


def test_a_mark_of_mmmu_without_an_image_is_text(tmp_path):
    files = downloads.mmmu()
    name = "mmmu/Math/validation-00000-of-00001.parquet"
    row = pq.read_table(io.BytesIO(files[name])).to_pylist()[0]
    # As in `validation_Math_7`, whose options are marks of images that it does not have.
    options = ["<image 7>", "<image 8>", "<image 12>", "<image 30>"]
    odd = row | {"question": "Which is like <image 1>?", "options": str(options)}
    empty = odd | {"image_1": {"bytes": None, "path": "x"}, "id": "validation_Math_9"}
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([odd, empty]), table)
    write(tmp_path, files | {name: table.getvalue()})
    (task,) = load_benchmark("mmmu", data_root=tmp_path, limit=LIMIT)
    example = next(example for example in task.examples if example.id == row["id"])
    assert example.images == (photo(1),)
    assert example.prompt.startswith("<image>\nWhich is like?\n\n(A) <image 7>\n(B) <image 8>\n")
    assert "(C) <image 12>\n(D) <image 30>\n" in example.prompt
    assert example.metadata["options"] == dict(
        zip("ABCD", ast.literal_eval(str(options)), strict=True)
    )
    (image,) = next(e.images for e in task.examples if e.id == "validation_Math_9")
    assert isinstance(image, UnusableImage)


def test_the_file_for_the_tool_of_mme_scores_as_here(tmp_path):
    """Blanks and dots at the beginning count: the tool looks at the first four characters."""
    write(tmp_path, downloads.mme())
    (task,) = load_benchmark("mme", data_root=tmp_path, limit=LIMIT)
    for text in ("Yes", " Yes", "  Yes", "\n\nYes", "\tyes", "Y.", "y", ".yes", "..yes", "\r\nno"):
        said = dict.fromkeys((example.id for example in task.examples), text)
        right = 0
        for write_file in task.submissions.values():
            rows = [line.split("\t") for line in io.StringIO(write_file(said), newline=None)]
            for _, _, gold, column in rows:
                label = next((x for x in ("yes", "no") if x in column.lower()[:4]), "other")
                right += label == gold.lower()
        found = task.scorer(task.examples, list(said.values()))
        assert sum(found.per_example) == right, text
