"""From official files to the scores of a task, with the commands and the paths of the configs."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest

from moresjax.cli import main
from moresjax.data.digits import build_tokenizer
from moresjax.evaluation.benchmarks import iconqa, scienceqa
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.runs.init_weights import trained_parameters
from moresjax.testing.benchmark_files import photo, task_files, write

# What a task is called when its test questions are asked in the words of its training file.
ASKED = {
    "scienceqa": "scienceqa_img_ft",
    "vizwiz": "vizwiz_ft",
    "iconqa_txt": "iconqa_txt",
    "iconqa_blank": "iconqa_blank",
}
DOWNLOADS = {"iconqa_txt": "iconqa", "iconqa_blank": "iconqa"}
# The configuration of LLaVA Steering with parts that a test can train.
TINY = """
from moresjax.configs import llava_steering

def get_config(arg=None):
    config = llava_steering.get_config(arg)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 2}
    config.model.llm = sizes | {"vocab_size": VOCABULARY}
    config.model.vision = sizes | {"image_size": 12, "patch_size": 4}
    config.dtype, config.remat, config.template = "", False, "bare"
    config.tokenizer, config.image_processor = "tokenizer", ""
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.batch_size, config.num_workers, config.tensorboard = 8, 1, False
    config.batching, config.buckets = "pad", ()
    config.max_seq_len, config.images_per_row = 96, 1
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the downloads, as the config of a task expects them, and stage pretrain."""
    folder = tmp_path_factory.mktemp("chain")
    with contextlib.chdir(folder):
        fill()
    return folder


@pytest.fixture
def here(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def fill() -> None:
    write(Path("data/tasks"), task_files())
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained("tokenizer")
    Path("tiny.py").write_text(TINY.replace("VOCABULARY", str(len(tokenizer))))
    captions = [
        {
            "id": "1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it ?"},
                {"from": "gpt", "value": "a two"},
            ],
        }
    ]
    for folder, name in (
        ("data/LLaVA-Pretrain", "blip_laion_cc_sbu_558k.json"),
        ("data/LLaVA-Tuning", "llava_v1_5_mix665k.json"),
    ):
        write(Path(folder), {name: captions * 8, "a.png": photo()})
    random = {"init__llm": "random", "init__vision": "random"}
    train("stage=pretrain", "runs/pretrain-3b", **random, **SHORT)


def run(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def train(arguments: str, workdir: str, **settings: object) -> None:
    changed = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    assert main(["train", "--config", f"tiny.py:{arguments}", "--workdir", workdir, *changed]) == 0


def build(capsys, task: str) -> dict:
    root, out = f"data/tasks/{DOWNLOADS.get(task, task)}", f"data/tasks/{task}_1000.json"
    return run(
        capsys, "data", "build", "--task", task, "--root", root, "--size", "1K", "--out", out
    )


def short_task(*args, **options) -> BenchmarkTask:
    return BenchmarkTask(*args, **options | {"max_new_tokens": 4})


SHORT = {"steps": 1, "log_every": 1, "optimizer__warmup": 0.0}
EARLIER = {"init__llm": "runs/pretrain-3b", "init__vision": "runs/pretrain-3b"}


def test_every_task_is_built_trained_and_evaluated(here, capsys, monkeypatch):
    """Stages pretrain, finetune and task, each from the run before."""
    for module in (iconqa, scienceqa):  # whose answers may have 1024 tokens
        monkeypatch.setattr(module, "BenchmarkTask", short_task)
    train("stage=finetune", "runs/mix", **EARLIER, **SHORT)
    again = SHORT | {"init__tuning": "runs/mix"}
    for task in ASKED:
        assert build(capsys, task) == {"available": 1, "written": 1}
        train(f"stage=task,task={task},samples=1000,start=runs/mix", f"runs/{task}", **again)
        before, after = (trained_parameters(Path("runs") / name) for name in ("mix", task))
        assert before.keys() == after.keys()
        assert any((before[name] != x).any() for name, x in after.items())
    places = ("--data-root", "data/tasks", "--limit", "1", "--out", "results")
    asked = ("--tasks", ",".join(ASKED.values()))
    found = run(capsys, "evaluate", "--model", "runs/vizwiz", *asked, *places)
    assert set(found["scores"]) == set(ASKED.values())
    assert all(score["n"] == 1 for score in found["scores"].values())


def test_a_task_goes_on_with_a_whole_tuned_llm(here, capsys):
    """The same stages with `full`, whose run holds the LLM itself."""
    train("stage=finetune,tuning=full", "runs/full", **EARLIER, **SHORT, optimizer__lr=0.03)
    build(capsys, "vizwiz")
    task = "stage=task,task=vizwiz,samples=1000,tuning=full,start=runs/full"
    train(task, "runs/full-task", **SHORT, optimizer__lr=1e-5)
    first, before, after = (
        trained_parameters(Path("runs") / name) for name in ("pretrain-3b", "full", "full-task")
    )
    assert before.keys() == after.keys() > first.keys()
    assert all(np.abs(before[name] - x).max() > 1e-2 for name, x in first.items())
    moved = [np.abs(before[name] - x).max() for name, x in after.items()]
    assert 0 < max(moved) < 1e-4  # one step from where the run before ended
    asked = ("--tasks", "vizwiz_ft", "--data-root", "data/tasks", "--limit", "1")
    found = run(capsys, "evaluate", "--model", "runs/full-task", *asked, "--out", "full-results")
    assert found["scores"]["vizwiz_ft"]["n"] == 1
