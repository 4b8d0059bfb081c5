"""Small runs on the digits, processes of their own, what is asked of directories; shared."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
from conftest import clean_environment

from moresjax.runs.config import load_config
from moresjax.runs.init_weights import trained_parameters

DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"
TINY = {
    **{f"model.llm.{key}_size": 8 for key in ("hidden", "intermediate")},
    **{f"model.{part}.num_heads": 2 for part in ("llm", "vision")},
    **{f"model.{part}.num_layers": 1 for part in ("llm", "vision")},
    **{f"model.vision.{key}_size": 8 for key in ("hidden", "intermediate")},
    **{f"init.{part}": "random" for part in ("llm", "vision", "connector")},
    "batch_size": 8,
    "tensorboard": False,
}
TEXT_ONLY = {key: value for key, value in TINY.items() if not key.startswith("model.vision.")}
# The head alone trains: the cheapest run there is.
HEAD = TEXT_ONLY | {"tuning": "none", "also_train": "llm.head", "steps": 4, "log_every": 4}
# Metrics that no two runs have in common.
RATES = {"step_seconds", "tokens_per_second", "label_tokens_per_second", "flops_per_second"}
MEASURED = RATES | {"host_memory_gib"}


def config_of(arg: str, settings: dict):
    return load_config(f"{DIGITS}:{arg}", [f"{key}={value}" for key, value in settings.items()])


def cli_arguments(arg: str, workdir: Path, settings: dict) -> list[str]:
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["train", "--config", f"{DIGITS}:{arg}", "--workdir", str(workdir), *overrides]


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def rewind(workdir: Path, step: int) -> None:
    """Makes of a finished run what it was when its checkpoint of `step` was its last."""
    for path in (workdir / "checkpoints").glob("[0-9]*"):
        if int(path.name) > step:
            shutil.rmtree(path)
    (workdir / "train.json").unlink()


def assert_equal_weights(found: Path, wanted: Path) -> None:
    found, wanted = trained_parameters(found), trained_parameters(wanted)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0, err_msg=name)


def assert_same_bits(found: Path, wanted: Path) -> None:
    found, wanted = trained_parameters(found), trained_parameters(wanted)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def compilations(caplog) -> list[str]:
    """The programs that XLA compiled, or took from its folder, below `jax.log_compiles`."""
    texts = [record.getMessage() for record in caplog.records]
    found = (re.match(r"Finished XLA compilation of (\S+)", text) for text in texts)
    return [match[1] for match in found if match]


def curve(workdir: Path, name: str) -> list[float]:
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").open())
    return [line[name] for line in lines if name in line]


def start(arguments: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=clean_environment(), **pipes)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def wait_for(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
