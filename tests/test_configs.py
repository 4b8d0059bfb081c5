"""Every run that configs/README.md lists is a configuration that can be built."""

import re
import subprocess
from pathlib import Path

import pytest

from moresjax.core.errors import UserError
from moresjax.data.templates import get_template
from moresjax.models.count import count_parameters
from moresjax.models.zoo import ENCODERS
from moresjax.runs.architecture import model_config
from moresjax.runs.config import differences, load_config, read_config, save_config
from moresjax.runs.sources import with_sources

ROOT = Path(__file__).parents[1]
STEERING, MRT = (str(ROOT / "configs" / name) for name in ("llava_steering.py", "mrt.py"))
SHIFT = str(ROOT / "configs" / "shift.py")
METHODS = ("full", "lora", "adapter", "oft", "ia3", "mores-base", "mores-large", "mores-huge")


def counted(config):
    return count_parameters(model_config(config), config.tuning, config.also_train)


@pytest.mark.parametrize("size", ["3b", "7b", "13b"])
def test_the_methods_of_llava_steering(size):
    trained = {}
    for method in METHODS:
        config = load_config(f"{STEERING}:size={size},stage=finetune,tuning={method}")
        trained[method] = counted(config).trainable_in_llm
        assert config.optimizer.lr == (2e-5 if method == "full" else 2e-4)
        get_template(config.template)
    expected = {"3b": 163_872, "7b": 262_176, "13b": 409_640}[size]
    assert trained["mores-base"] == expected
    assert trained["mores-huge"] == 4 * expected
    assert trained["full"] > trained["lora"] > trained["ia3"] > trained["mores-base"]


def test_pretraining_trains_the_connector_on_728_tokens():
    config = load_config(f"{STEERING}:size=3b,stage=pretrain")
    report = counted(config)
    assert (report.trainable, report.trainable_in_llm) == (9_507_840, 0)
    assert model_config(config).visual_tokens == 728
    assert config.optimizer.lr == 1e-3


@pytest.mark.parametrize("task", ["iconQA-txt", "iconQA_txt", "iconqa_txt"])
def test_a_task_has_one_name_and_starts_from_any_run(task):
    config = load_config(f"{STEERING}:stage=task,task={task},start=../mores")
    assert config.data["files"] == "data/tasks/iconqa_txt_10000.json"
    assert {config.init.llm, config.init.vision, config.init.connector} == {"../mores"}
    with pytest.raises(UserError, match="unknown task 'iconqa'; choose from: scienceqa, vizwiz"):
        load_config(f"{STEERING}:stage=task,task=iconqa")


def test_mrt_and_its_baselines():
    assert counted(load_config(f"{MRT}:tuning=mrt-paper")).trainable == 2_429_328
    assert counted(load_config(f"{MRT}:tuning=mrt-code")).trainable == 2_417_034
    assert counted(load_config(f"{MRT}:tuning=lora")).trainable == 44_175_360
    # The editors of 39 blocks of 1408 features, of the connector's output and of the LLM.
    editors = 39 * (2 * 1408 * 6 + 6) + (2 * 4096 * 6 + 6) + 2_097_408
    config = load_config(f"{MRT}:base=minigpt-v2")
    assert (counted(config).trainable, config.template) == (editors, "minigpt_v2")
    assert model_config(config).visual_tokens == 256
    with pytest.raises(UserError, match="unknown base 'minigpt'; choose from: llava-v1-7b"):
        load_config(f"{MRT}:base=minigpt")


def test_the_tunings_of_representation_shift_take_all_parts_from_where_they_start():
    base = ROOT / "tests" / "fixtures" / "v0_1" / "base"
    config = load_config(f"{SHIFT}:task=place,rank=4,start={base}")
    assert config.data["files"] == "data/shift/place.json"
    whole = with_sources(config, ROOT)
    model = model_config(whole)
    assert (model.llm.num_layers, model.visual_tokens, model.llm.hidden_size) == (2, 16, 8)
    report = count_parameters(model, whole.tuning, whole.also_train)
    assert report.trainable == report.trainable_in_llm == 2 * 7 * 4 * (8 + 8)
    with pytest.raises(UserError, match="unknown task 'colors'; choose from: color, place, senti"):
        load_config(f"{SHIFT}:task=colors")


@pytest.mark.parametrize(
    ("llm", "layers", "hidden", "mlp"),
    [("vicuna-7b", 32, 4096, 11_008), ("vicuna-13b", 40, 5120, 13_824)],
)
def test_representation_shift_has_all_sizes_of_llava(llm, layers, hidden, mlp):
    parts = [f"model.llm={llm}", "model.vision=clip-l-14-336", "model.connector=mlp2x_gelu"]
    report = counted(load_config(f"{SHIFT}:task=color", parts))
    lora = layers * 16 * (4 * 2 * hidden + 3 * (hidden + mlp))
    assert report.trainable == report.trainable_in_llm == lora


def test_the_main_model_of_representation_shift():
    """CLIP-L/14 and OPT-6.7B; the transformer between them trains first, and then LoRA alone."""
    captions, color = (
        load_config(f"{SHIFT}:base=opt-6.7b,task={x}") for x in ("captions", "color")
    )
    assert (captions.init.llm, color.init.llm) == ("checkpoints/opt-6.7b", "../shift-captions")
    assert captions.image_processor == color.image_processor == captions.init.vision
    first, second = counted(captions), counted(color)
    assert model_config(captions).visual_tokens == model_config(color).visual_tokens == 32
    assert first.components["llm"].total == 6_658_473_984
    assert first.trainable == first.components["connector"].total
    assert second.trainable == 32 * 16 * (4 * 2 * 4096 + 2 * 5 * 4096)
    with pytest.raises(UserError, match="task captions trains the connector of"):
        load_config(f"{SHIFT}:task=captions")


def test_every_argument_of_the_readme_is_one():
    text = (ROOT / "configs" / "README.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `((?:size|tuning|stage)=[^`]+)`", text, re.M)
    assert len(rows) > 8
    for arguments in rows:
        file = STEERING if "size=" in arguments else MRT
        arguments = arguments.replace("tuning=M", "tuning=ia3").replace("task=T", "task=vizwiz")
        model_config(load_config(f"{file}:{arguments}"))


def test_configurations_survive_their_file(tmp_path):
    for name in (STEERING, MRT, str(ROOT / "configs" / "forkme.py")):
        config = load_config(name)
        save_config(config, tmp_path / "config.json")
        assert differences(read_config(tmp_path / "config.json").to_dict(), config.to_dict()) == []


def test_the_last_vision_blocks_are_counted_alone():
    config = load_config(f"{STEERING}:size=7b,tuning=none", ["also_train=('vision:last4',)"])
    block = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    report = counted(config)
    assert report.trainable == 4 * block
    whole = count_parameters(model_config(load_config(f"{STEERING}:size=7b")), "none", ())
    assert report.total == whole.total
    with pytest.raises(UserError, match="last 23 of 23 vision blocks"):
        counted(load_config(f"{STEERING}:size=7b", ["also_train=('vision:last23',)"]))


def test_unknown_arguments():
    for arguments, message in (("size=9b", "size '9b'"), ("stage=x", "stage 'x'")):
        with pytest.raises(UserError, match=message):
            load_config(f"{STEERING}:{arguments}")
    assert "clip-l-14-336" in ENCODERS


# Launch scripts

SCRIPTS = sorted((ROOT / "launch").glob("*/run.sh"))
STUB = '#!/bin/sh\necho "$(basename $0)" "$@" >> "$CALLS"\n'


def run_script(script, tmp_path, *arguments, **environment):
    """Runs a script with stubs for the commands of clusters; what they were called with."""
    for name in ("gcloud", "xpk", "srun", "pip"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "moresjax").write_text(STUB)
    (venv / "moresjax").chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "HOME": str(tmp_path)}
    env |= {"VENV": str(tmp_path / "venv")} | environment
    done = subprocess.run(
        ["bash", str(script), *arguments], env=env, cwd=ROOT, capture_output=True, text=True
    )
    return done, calls.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_scripts_are_short_and_say_how_they_are_used(script, tmp_path):
    assert len(script.read_text().splitlines()) <= 50
    assert (script.parent / "README.md").is_file()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    done, calls = run_script(script, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert calls == ""


# Machines of a cluster start minutes apart.
JOINED = "train --distributed --join-timeout {} --config c.py:size=3b --workdir runs/x"
RUNS = {
    "gpu": ({}, "moresjax train --config c.py:size=3b --workdir runs/x --config.steps=5"),
    "slurm": ({}, f"{JOINED.format(120)} --config.steps=5"),
    "tpu-vm": (
        {"TPU": "pod", "ZONE": "us-west4-a"},
        f"{JOINED.format(120)} --config.steps=5",
    ),
    "gke-xpk": (
        {"CLUSTER": "big", "TPU_TYPE": "v5litepod-16", "IMAGE": "image"},
        f"{JOINED.format(600)} --config.steps=5",
    ),
}


@pytest.mark.parametrize("target", RUNS)
def test_scripts_call_the_same_command(target, tmp_path):
    environment, expected = RUNS[target]
    arguments = ("c.py:size=3b", "runs/x", "--config.steps=5")
    script = ROOT / "launch" / target / "run.sh"
    done, calls = run_script(script, tmp_path, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert expected in calls
    if target == "gke-xpk":
        assert calls.startswith("xpk config set send-telemetry false")
    if target == "tpu-vm":
        assert calls.count("--worker=all") == 2
