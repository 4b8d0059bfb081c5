"""The example plug-in from end to end by the real command line: in one process, in several, and
installed as a package."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import clean_environment
from run_helpers import TINY, curve, free_address, start, wait_for

PLUGIN = Path(__file__).parents[2] / "docs" / "examples" / "my_plugin.py"
CONFIG = """
from moresjax.configs import digits

def get_config(arg=None):
    config = digits.get_config("stage=finetune,tuning=shift")
    config.data = {"name": "grey", "size": 24}
    config.template = "asking"
    config.objective = "smoothed"
    config.steps = 2
    config.log_every = 1
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> list[str]:
    """The options that name a configuration which uses everything in the plug-in."""
    path = tmp_path_factory.mktemp("config") / "my_config.py"
    path.write_text(CONFIG)
    return ["--config", str(path), *(f"--config.{k}={v}" for k, v in TINY.items())]


# Commands one after the other in one process, which imports once; what each of them printed.
IN_TURN = """
import contextlib, io, json, sys
from moresjax.cli import main
printed = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if main(command):
            sys.exit(1)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> tuple[Path, dict, dict]:
    """A run with the plug-in; what its evaluation and a check of its data printed."""
    folder = tmp_path_factory.mktemp("runs")
    workdir, plugin = str(folder / "mine"), ["--plugin", str(PLUGIN)]
    evaluate = ["evaluate", *plugin, "--model", workdir, "--tasks", "grey_images", "--limit", "5"]
    commands = [
        ["train", *plugin, *config, "--workdir", workdir],
        [*evaluate, "--out", str(folder / "scores"), "--json"],
        ["data", "check", *plugin, *config, "--workers", "2", "--json"],
    ]
    process = start([sys.executable, "-c", IN_TURN, json.dumps(commands)])
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    _, scores, checked = json.loads(printed.splitlines()[-1])
    return Path(workdir), json.loads(scores), json.loads(checked)


@pytest.fixture(scope="module")
def trained(done) -> Path:
    assert len(curve(done[0], "loss")) == 2
    return done[0]


def test_a_run_goes_on_and_is_evaluated_with_the_plug_in(done):
    assert done[1]["scores"]["grey_images"]["n"] == 5


def test_a_run_says_which_plug_in_is_missing(trained, config, tmp_path, run_moresjax):
    command = ["generate", "--model", trained, "--prompt", "is there a two"]
    done = run_moresjax(*command)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "unknown" in line
    assert "'shift'" in line or "'asking'" in line
    assert f"{trained} was made with plug-ins that are not loaded here: {PLUGIN}" in line


def test_data_are_checked_in_several_processes(done):
    assert done[2]["samples"] == 24


def test_processes_that_train_together(config, trained, tmp_path):
    run = [sys.executable, "-m", "moresjax", "train", "--plugin", str(PLUGIN), *config]
    run += ["--workdir", str(tmp_path / "run")]
    address = free_address()
    wait_for(*(start([*run, "--distributed", f"{address},2,{n}"]) for n in range(2)))
    assert curve(tmp_path / "run", "loss") == pytest.approx(curve(trained, "loss"), abs=1e-4)


def test_an_installed_package_needs_no_option(trained, tmp_path, run_moresjax):
    info = tmp_path / "grey_plugin-1.0.dist-info"
    info.mkdir()
    shutil.copy(PLUGIN, tmp_path / "grey_plugin.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: grey-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moresjax.plugins]\ngrey = grey_plugin\n")
    places = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = clean_environment() | {"PYTHONPATH": os.pathsep.join(places)}
    command = ["params", "--model", trained, "--json"]
    done = run_moresjax(*command, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tuning"] == "shift"
    done = run_moresjax(*command)
    assert "unknown tuning method 'shift'" in done.stderr
