"""What every benchmark promises: size, prompts, and a sentence for files that are missing."""

import inspect
import sys
from collections.abc import Callable

import pytest
from benchmark_helpers import LETTER, SHORT, official

from moresjax.core.errors import UserError
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.tasks import (
    benchmark_loader,
    benchmark_names,
    load_benchmark,
)
from moresjax.testing import benchmark_files as downloads
from moresjax.testing.benchmark_files import write

# Benchmark and split (the default first), published number of questions, most new tokens, metric,
# and how the first prompt ends: as LLaVA and LLaVA Steering ask, where they do.
CAPTION = "Provide a one-sentence caption for the provided image."
CHOOSE = "Choose an option from the choices to answer the question."
CONTRACTS = [
    ("vqav2", "val", 214_354, 128, "VQA accuracy", SHORT),
    ("vqav2", "test", 447_793, 128, "VQA accuracy", SHORT),
    ("vqav2", "test-dev", 107_394, 128, "VQA accuracy", SHORT),
    ("okvqa", "val", 5_046, 128, "VQA accuracy", SHORT),
    ("gqa", "testdev_balanced", 12_578, 128, "accuracy", SHORT),
    ("vizwiz", "val", 4_319, 128, "VQA accuracy", SHORT),
    ("vizwiz", "test", 8_000, 128, "VQA accuracy", SHORT),
    ("vizwiz_ft", "val", 4_319, 128, "VQA accuracy", f'"Unanswerable". {SHORT}'),
    ("textvqa", "val", 5_000, 128, "VQA accuracy", f"STOP, 4\n{SHORT}"),
    ("textvqa_judged", "val", 5_000, 128, "accuracy", f"STOP, 4\n{SHORT}"),
    ("scienceqa", "test", 4_241, 1024, "accuracy", LETTER),
    ("scienceqa", "minitest", 424, 1024, "accuracy", LETTER),
    ("scienceqa_img", "test", 2_017, 1024, "accuracy", LETTER),
    ("scienceqa_img_ft", "test", 2_017, 1024, "accuracy", "A.salt, B.tea"),
    ("iconqa_txt", "test", 6_316, 1024, "accuracy", CHOOSE),
    ("iconqa_blank", "test", 3_638, 1024, "accuracy", "answer this question"),
    ("mmmu", "validation", 900, 1024, "accuracy", f"(B) y\n\n{LETTER}"),
    ("mmmu", "test", 10_500, 1024, "accuracy", f"(B) y\n\n{LETTER}"),
    ("seed_bench", "test", 19_242, 128, "accuracy", LETTER),
    ("seed_bench_rank", "test", 19_242, 128, "accuracy", "Where?"),
    ("pope", "test", 3_000, 128, "accuracy", f"in the image?\n{SHORT}"),
    ("pope_judged", "test", 3_000, 128, "accuracy", f"in the image?\n{SHORT}"),
    ("mme", "test", 2_374, 128, "perception + cognition", f"Is it a cat?\n{SHORT}"),
    ("mme_sampled", "test", 2_374, 8, "perception + cognition", f"Is it a cat?\n{SHORT}"),
    ("hallusionbench", "test", 1_129, 512, "aAcc", "\nIs it equal?"),
    ("vsr", "zeroshot_test", 1_222, 128, "accuracy", "Please answer yes or no."),
    ("snli_ve", "test", 17_901, 128, "accuracy", SHORT),
    ("cifar10", "test", 10_000, 16, "accuracy", SHORT),
    ("cifar100", "test", 10_000, 16, "accuracy", SHORT),
    ("mnist", "test", 10_000, 16, "accuracy", SHORT),
    ("mm_vet", "test", 218, 1024, "grade", "\nWho?"),
    ("mmhal", "test", 96, 512, "rating", "\nWhat colour is the cup?"),
    ("coco_caption", "test", 5_000, 25, "CIDEr", CAPTION),
    ("flickr30k", "test", 1_000, 64, "CIDEr", CAPTION),
    ("textcaps", "val", None, 1024, "CIDEr", f"{CAPTION}\nReference OCR token: STOP, 4"),
    ("textcaps", "test", None, 1024, "CIDEr", f"{CAPTION}\nReference OCR token: STOP, 4"),
    ("chair", "val", 500, 512, "CHAIRs", "describe this image in detail."),
    ("digits", "test", None, 2, "accuracy", "?"),
    ("digits_text", "test", None, 2, "accuracy", "?"),
    ("digits_pope", "test", None, 2, "accuracy", "?"),
    ("digits_hallusion", "test", None, 2, "aAcc", "?"),
]


@pytest.mark.parametrize(
    ("name", "split", "questions", "tokens", "metric", "ending"),
    CONTRACTS,
    ids=[f"{row[0]}-{row[1]}" for row in CONTRACTS],
)
def test_contract(tmp_path, caplog, name, split, questions, tokens, metric, ending):
    write(tmp_path, downloads.DOWNLOADS[name]())
    for task in load_benchmark(name, data_root=tmp_path, limit=1, split=split):
        assert task.max_new_tokens == tokens
        assert task.scorer(task.examples, [""] * len(task.examples)).metric == metric
        assert task.examples[0].prompt.endswith(ending)
    if questions is not None:
        # Another number is an error, or a warning where the published one is quoted from memory.
        message = ""
        try:
            load_benchmark(name, data_root=tmp_path, limit=None, split=split)
        except UserError as error:
            message = str(error)
        assert f"the published set {questions:,d};" in message + caplog.text


def packaged() -> list[tuple[str, Callable]]:
    """The benchmarks of the package, without those that other tests have registered."""
    loaders = {name: benchmark_loader(name) for name in benchmark_names()}
    return [
        (name, load)
        for name, load in loaders.items()
        if load.__module__.startswith("moresjax.evaluation.benchmarks.")
    ]


def test_every_benchmark_has_a_contract_that_names_its_default_split():
    defaults = {name: split for name, split, *_ in reversed(CONTRACTS)}
    assert defaults == {
        name: inspect.signature(load).parameters["split"].default for name, load in packaged()
    }


NEEDS = {name: name for name in benchmark_names() if not name.startswith("digits")} | {
    "vizwiz_ft": "vizwiz",
    "scienceqa_img": "scienceqa",
    "scienceqa_img_ft": "scienceqa",
    "iconqa_txt": "iconqa",
    "iconqa_blank": "iconqa",
    "textvqa_judged": "textvqa",
    "pope_judged": "pope",
    "mme_sampled": "mme",
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
    write(tmp_path, downloads.okvqa())
    with pytest.raises(UserError, match=r"okvqa val: the files hold 2 questions.*5,046"):
        load_benchmark("okvqa", data_root=tmp_path, limit=None)
    row = {"imagename": "a", "question": "?", "answer": "b", "capability": ["rec"]}
    write(tmp_path, {"mm_vet/mm-vet.json": {"v1_0": row}})
    load_benchmark("mm_vet", data_root=tmp_path, limit=None)
    assert "mm_vet: the files hold 1 questions, the published set 218" in caplog.text


def test_saved_predictions_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, downloads.okvqa())
    with pytest.raises(UserError, match=r"predictions\.json does not exist"):
        rescore("okvqa", tmp_path / "predictions.json", data_root=tmp_path, limit=2)
    with pytest.raises(UserError, match=r"row 0 of .* has no field 'answer'"):
        official("okvqa", tmp_path, [{"question_id": 1}])
    with pytest.raises(UserError, match="no prediction for any question of okvqa"):
        official("okvqa", tmp_path, [{"question_id": 1, "answer": "x"}])
    with pytest.raises(UserError, match=r"line 2 of .* it is not JSON"):
        official("okvqa", tmp_path, '{"question_id": 1, "answer": "x"}\n{]\n', "a.jsonl")


def test_every_benchmark_says_where_its_files_come_from():
    for name, load in packaged():
        assert name.startswith("digits") or "https://" in sys.modules[load.__module__].__doc__, name
