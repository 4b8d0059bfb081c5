"""Small runs on the digits, and what is asked of their directories; shared by the tests."""

import json
import shutil
from pathlib import Path

import numpy as np

from moresjax.build import trained_parameters
from moresjax.training.config import load_config

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
