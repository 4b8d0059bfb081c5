"""`--adapter`, `--tuning` and how a model is asked: the same on every command that runs a model."""

import json
from pathlib import Path

import numpy as np
import pytest

from moresjax import load
from moresjax.cli import main
from moresjax.cli.app import make_parser
from moresjax.cli.options import load_model, only_adapter
from moresjax.core.errors import UserError
from moresjax.data.templates import get_template
from moresjax.evaluation.run import evaluate
from moresjax.inference.model import Model
from moresjax.weights.peft import export_peft
from moresjax.weights.pyreft import export_pyreft

WRITTEN = Path(__file__).parents[1] / "fixtures" / "v0_1"
BASE, ADAPTERS = str(WRITTEN / "base"), WRITTEN / "adapters"
COMMANDS = {
    "evaluate": ["evaluate", "--tasks", "digits", "--out", "o"],
    "analyze": ["analyze", "attention", "--out", "o"],
    "generate": ["generate"],
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, tuple[list[str], Model]]:
    """Arguments for a folder of every kind, and the model with it."""
    out, found = tmp_path_factory.mktemp("adapters"), {}
    for kind, name in (("ours", "mores"), ("peft", "lora"), ("pyreft", "one")):
        model = load(BASE)
        model.load_adapter(ADAPTERS / name)
        spec, arguments = model.tuning, []
        folder = ADAPTERS / name
        if kind == "peft":
            folder = export_peft(model.restack(), out / kind, also_train=["connector"])
        if kind == "pyreft":
            folder = export_pyreft(model.restack(), out / kind)
            arguments = ["--edits", spec, "--allow-pickle"]
        found[kind] = ["--adapter", str(folder), *arguments], model
    return found


QUESTION, IMAGE = ["how many digits ?"], [[np.arange(3072).reshape(32, 32, 3).astype(np.uint8)]]


def parsed(command: str, *arguments: str):
    return make_parser().parse_args([*COMMANDS[command], "--model", BASE, *arguments])


@pytest.mark.parametrize("kind", ["ours", "peft", "pyreft"])
def test_every_command_reads_every_kind_of_adapter(kinds, kind):
    arguments, expected = kinds[kind]
    logits = np.asarray(expected.logits(QUESTION, IMAGE))
    assert np.abs(logits - load(BASE).logits(QUESTION, IMAGE)).max() > 1e-3
    for command in COMMANDS:
        args = parsed(command, *arguments)
        found = load_model(args, BASE, only_adapter(args)).logits(QUESTION, IMAGE)
        np.testing.assert_allclose(found, logits, atol=1e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_tuning_a_template_and_an_aspect(command):
    options = ["--tuning", "mores:rank=2", "--template", "vicuna_v1", "--image-aspect", "pad"]
    model = load_model(parsed(command, *options), BASE)
    assert model.tuning == "mores:rank=2"
    assert model.processor.template == get_template("vicuna_v1")
    assert model.processor.image.aspect == "pad"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tuning", "none", "--adapter", "a"], "--tuning and --adapter both say"),
        (["--edits", "loreft"], "--edits describes an --adapter"),
        (["--adapter", str(WRITTEN)], "is not an adapter folder"),
        (["--tuning", "moress"], "'moress'"),
    ],
)
def test_what_contradicts_itself_is_refused(command, arguments, message):
    args = parsed(command, *arguments)
    with pytest.raises(UserError, match=message):
        load_model(args, BASE, only_adapter(args))


def test_an_evaluation_with_an_adapter_is_that_of_the_tuned_model(tmp_path, capsys):
    command = ["evaluate", "--model", BASE, "--tasks", "digits", "--limit", "1", "--json"]
    adapter = str(ADAPTERS / "mores")
    assert main([*command, "--adapter", f"one={adapter}", "--out", str(tmp_path / "a")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["adapter"]) == (BASE, adapter)
    model = load(BASE)
    model.load_adapter(adapter)
    assert printed["fingerprint"] == model.fingerprint != load(BASE).fingerprint
    expected = evaluate(model, ["digits"], limit=1)
    rows = (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()
    found = {(r["task"], r["id"]): r["prediction"] for r in map(json.loads, rows)}
    assert found == {(r["task"], r["id"]): r["prediction"] for r in expected.predictions}
    two = ["--adapter", adapter, "--adapter", adapter]
    assert main([*command, *two, "--out", str(tmp_path / "b")]) == 2
    assert "evaluate takes one --adapter, got 2" in capsys.readouterr().err


def test_attention_of_several_adapters_on_one_model_and_of_one_on_each(tmp_path, capsys):
    command = ["analyze", "attention", "--limit", "1", "--json", "--out", str(tmp_path)]
    command += ["--tasks", "digits"]
    one, two = (f"{name}={ADAPTERS / name}" for name in ("one", "two"))

    def shares(*arguments: str) -> dict:
        assert main([*command, *arguments]) == 0
        return {n: s["share"] for n, s in json.loads(capsys.readouterr().out).items()}

    found = shares("--model", BASE, "--adapter", one, "--adapter", two)
    assert [*found] == ["one", "two"]
    assert found["one"] != found["two"]
    again = shares("--model", f"base={BASE}", "--model", f"one={BASE}", "--adapter", one)
    assert [*again] == ["base", "one"]
    assert again["one"] == found["one"]
    for arguments, message in (
        (["--model", BASE, "--model", f"b={BASE}", "--adapter", one], "choose from: base, b"),
        (["--model", BASE, "--model", BASE], "two models have the name 'base'"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_vector_is_added_beside_an_adapter(tmp_path, capsys):
    file, adapter = tmp_path / "v.npz", str(ADAPTERS / "mores")
    np.savez(file, up=np.random.default_rng(0).standard_normal(8))
    asked = ["generate", "--model", BASE, "--adapter", adapter, "--prompt", QUESTION[0], "--json"]

    def answer(alpha: float) -> str:
        steer = f"steer:vector={file}:up,alpha={alpha},layers=1"
        assert main([*asked, "--max-new-tokens", "4", "--steer", steer]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    model = load(BASE)
    model.load_adapter(adapter)
    assert answer(0) == model.generate(QUESTION[0], max_new_tokens=4) != answer(50)
    assert main([*asked, "--steer", "lora"]) == 2
    assert "'lora' is no steer:vector" in capsys.readouterr().err
