"""Damaged JSON of a run: what the checkpoint has is made again, and nothing is lost in silence."""

import json
import shutil

import pytest
from run_helpers import HEAD, cli_arguments, curve, rewind

from moresjax.cli import main
from moresjax.data.skipping import SkipPolicy
from moresjax.runs.config import read_config

DAMAGES = {"empty": b"", "cut": b'{"batch_size": 8, "che', "zeros": bytes(64), "list": b"[]\n"}


def arguments(workdir) -> list[str]:
    return cli_arguments("stage=llm", workdir, HEAD | {"log_every": 2, "checkpoint.every": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(arguments(run)) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_is_that_of_the_newest_checkpoint(damage, run, finished, caplog):
    (run / "config.json").write_bytes(DAMAGES[damage])
    assert read_config(run / "config.json") == read_config(finished / "config.json")
    assert "the newest checkpoint's is used" in caplog.text
    (run / "train.json").unlink()
    assert main(arguments(run)) == 0
    assert (run / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_a_damaged_configuration_without_a_checkpoint_is_one_sentence(run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    (run / "config.json").write_bytes(b"{")
    assert main(["generate", "--model", str(run), "--prompt", "?"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_made_again(damage, run, finished, caplog):
    (run / "train.json").write_bytes(DAMAGES[damage])
    assert main(arguments(run)) == 0
    assert "made again from the newest checkpoint" in caplog.text
    again, whole = (json.loads((x / "train.json").read_text()) for x in (run, finished))
    assert again["step"] == whole["step"] == 4
    assert again["metrics"] == whole["metrics"]


def test_a_damaged_line_of_the_log_is_set_aside_and_told(run, finished, caplog):
    rewind(run, 2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    damaged = "\n".join(["12", '{"step": 1, "lo', *lines])
    (run / "metrics.jsonl").write_text(damaged)
    assert main(arguments(run)) == 0
    assert "2 lines of" in caplog.text
    assert (run / "metrics.jsonl.damaged").read_text() == damaged
    assert curve(run, "loss") == curve(finished, "loss")


def test_a_damaged_list_of_skipped_samples_is_set_aside_and_told(tmp_path, caplog):
    file, policy = tmp_path / "skipped.json", SkipPolicy("skip", 4, {3: "sample three"})
    for content in (b"{", b"[]", b'{"samples": 3}'):
        file.write_bytes(content)
        policy.save(file)
        assert json.loads(file.read_text()) == {"skipped": 1, "samples": {"3": "sample three"}}
    kept = sorted(path.read_bytes() for path in tmp_path.glob("*.damaged*"))
    assert kept == [b"[]", b"{", b'{"samples": 3}']
    assert caplog.text.count("a new one is begun") == 3
