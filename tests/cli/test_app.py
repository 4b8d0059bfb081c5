"""What all subcommands have in common."""

import json
import subprocess
import sys

import pytest
from conftest import clean_environment

from moresjax._version import __version__
from moresjax.cli import app, main

EVERY = ["demo", "train", "evaluate", "generate", "analyze attention", "import", "export", "plan"]
EVERY += ["data check", "data convert", "data build", "zoo", "params", "compare"]
EVERY += ["report", "analyze steer", "analyze separability"]


@pytest.mark.parametrize("command", EVERY)
def test_every_command_explains_all_its_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out
    assert "--json" in page
    assert "--plugin" in page
    assert f"usage: moresjax {command}" in page


def actions(parser):
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                if hasattr(sub, "_actions"):
                    yield from actions(sub)


def test_help_texts_have_a_noun():
    for action in actions(app.make_parser()):
        if isinstance(action, app.argparse._SubParsersAction):
            continue
        assert action.help, action
        assert not action.help.startswith(("of ", "..")), action.help
        assert not action.help.endswith(".."), action.help


@pytest.mark.parametrize("module", ["moresjax", "moresjax.cli"])
def test_modules_that_are_the_command(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert done.stdout == f"moresjax {__version__}\n", done.stderr


@pytest.mark.parametrize("words", ["zoo", "--help", "params --llm phi-2", "zoo --json"])
def test_a_command_ends_quietly_when_nobody_reads_on(words):
    command = [sys.executable, "-m", "moresjax", *words.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=clean_environment(), **pipes)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert errors == b""
    assert process.returncode in (0, 141)  # argparse passes over what it cannot print


def test_start_up_imports_no_arrays():
    code = "import sys, moresjax.cli; print(*sorted({'jax', 'numpy', 'orbax'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert done.stdout == "\n", done.stderr


def test_a_run_imports_neither_torch_nor_scikit_learn(tmp_path):
    code = """if True:
        import sys
        from moresjax.data.digits import load_instances
        from moresjax.training.metrics import MetricWriter

        load_instances()
        MetricWriter(sys.argv[1]).close()
        assert "tensorboardX" in sys.modules
        print(*sorted({"torch", "sklearn"} & set(sys.modules)))"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert done.stdout == "\n", done.stderr


def test_an_unknown_plug_in_is_told_at_once(capsys):
    assert main(["zoo", "--plugin", "nowhere.py"]) == 2
    assert "plug-in nowhere.py does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["train --workdir run", "plan --topology v5e-8", "data check"],
)
def test_packaged_configs_are_found_by_name(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # away from the folder configs/
    words = command.split()
    assert main([*words, "--config", "digits:stage=sft"]) == 2
    assert "'sft'; choose from: llm, vit, siglip, pretrain, finetune" in capsys.readouterr().err
    assert main([*words, "--config", "digit"]) == 2
    assert (
        "digit does not exist; the packaged configs are control, digits" in capsys.readouterr().err
    )
    assert not any(tmp_path.iterdir())


def test_data_of_a_packaged_config_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--config.data.size=5", "--workers", "1", "--json"]
    assert main(["data", "check", "--config", "digits:stage=llm", *options]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 5
