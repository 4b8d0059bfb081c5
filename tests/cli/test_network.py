"""No command touches the network: all of them are run with closed sockets."""

import argparse
import socket

import huggingface_hub.constants
from run_helpers import DIGITS, HEAD, TINY

from moresjax.cli import main
from moresjax.cli.app import make_parser
from moresjax.testing.benchmark_files import DOWNLOADS, photo, write

# In this order, in one folder. `demo` runs in `test_cli.py`, in a process without a network.
COMMANDS = """
train --workdir run --config {digits}:stage=finetune --config.steps=1 {tiny}
evaluate --model run --tasks digits --limit 1 --out scores
generate --model run --prompt how --max-new-tokens 1
evaluate --model run --tasks digits --limit 1 --out again --temperature 1
compare scores again
serve run --check
report run --out report.html
analyze attention --model run=run --tasks digits --limit 1 --out plots
analyze states --model run --tasks digits --limit 4 --layers 0 --out states
analyze concepts --states states --concepts 2 --out concepts
analyze shift --base states --tuned same=states --num-concepts 2 --out shift
analyze separability --states states --by task --out apart
analyze sensitivity --model run --states states {concepts} --tasks digits --limit 1 --out told
analyze landscape --model run --points 3 --pairs 1 --samples 2 --out land
analyze steer --model run --fine concepts --tasks digits --limit 1 --out steered
analyze lens --model run --prompt how --image a.png --words two,six --out lens
analyze patch --model run --prompt how --other-prompt two --answers two,six --out patched
analyze attribute --model run --prompt how --answer two --out parts
analyze causes --model run --prompt how --image a.png --answer two --maps random --out causes
analyze overhead --model run --prompt how --try lora:rank=1 --rows 1 --new-tokens 2 --rounds 1
train --workdir control --config {digits}:stage=control --config.steps=1 {tiny}
analyze control --model control --limit 12 --no-subsets --out controlled
train --workdir llm --config {digits}:stage=llm {head}
sweep --workdir sweep --seeds 1 --config {digits}:stage=llm {head}
export llm hf --format hf
import hf imported
plan --topology v5e:1x1 --quick --config {digits}:stage=llm {head}
data check --workers 1 --config {digits}:stage=llm --config.data.size=5
data show --samples 1 --config {digits}:stage=llm --config.data.size=5
data convert --files records.json --shards 1 --out converted
data build --task iconqa_txt --root iconqa --split test --out built.json
data tokenizer --files records.json --vocab-size 300 --out tokenizer
zoo
params --llm phi-2
recipes
study list
"""


def commands_of(parser: argparse.ArgumentParser, words: str = "") -> list[str]:
    """Every command of a parser that does something, as the words that call it."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    found = [commands_of(sub, f"{words} {n}") for a in below for n, sub in a.choices.items()]
    return [name for names in found for name in names] if below else [words.strip()]


def test_no_command_touches_the_network(tmp_path, monkeypatch, capsys):
    lines = COMMANDS.strip().split("\n")
    for command in commands_of(make_parser()):
        assert command == "demo" or any(f"{line} ".startswith(f"{command} ") for line in lines), (
            f"{command} is not tried here"
        )
    record = {"id": "a", "conversations": [{"from": "human", "value": "How many?"}]}
    record["conversations"].append({"from": "gpt", "value": "two"})
    images = {"a.png": photo(), "b.png": photo(200)}
    write(tmp_path, DOWNLOADS["iconqa_txt"]() | {"records.json": [record]} | images)

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("there is no network in this test")

    def connect_here(self, address):
        return refuse(address) if isinstance(address, tuple) else connect(self, address)

    tried, connect = [], socket.socket.connect
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # As in a process that has imported everything before: nothing says that it is offline.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    settings = {"tiny": TINY, "head": HEAD | {"steps": 1}}
    options = {
        name: " ".join(f"--config.{key}={value}" for key, value in values.items())
        for name, values in settings.items()
    }
    named = "--by task --concepts digits_count,digits_compare --answer two --against one"
    options["concepts"] = named
    for line in lines:
        arguments = line.format(digits=DIGITS, **options).split()
        assert main(arguments) == 0, (line, capsys.readouterr().err)
    assert tried == []
