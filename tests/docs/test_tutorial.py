"""The tutorial runs from its first command to its last in an empty folder, with few steps."""

import json
import runpy
import sys

from docs_pages import ROOT, blocks, commands

from moresjax.cli import main

PAGE = ROOT / "docs" / "tutorial" / "own-data.md"
SCRIPT = ROOT / "docs" / "examples" / "letters.py"
# What makes a run short; the page tells of the first.
QUICK = {
    "train": ["--config.steps=2", "--config.batch_size=8", "--config.model.llm.num_layers=1"],
    "evaluate": ["--limit", "8", "--batch-size", "8"],
}


def test_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SCRIPT.name).write_text(SCRIPT.read_text().replace("COPIES = 8", "COPIES = 1"))
    ran = []
    for block in blocks(PAGE):
        for command, *words in commands(block.text) if block.language == "console" else ():
            if "DIR" in " ".join(words):  # folders that a reader has
                continue
            if command == "python":
                monkeypatch.setattr(sys, "argv", words)
                runpy.run_path(words[0], run_name="__main__")
            else:
                assert command == "moresjax"
                quick = list(QUICK.get(words[0], ()))
                if words[0] == "train" and "stage=llm" not in words[2]:
                    quick += ["--config.model.vision.num_layers=1"]
                assert main([*words, *quick]) == 0, capsys.readouterr().err
            ran.append(words[0])
    wanted = {"letters.py", "data", "train", "generate", "evaluate", "report", "export"}
    assert wanted <= {*ran}
    evaluations = [tmp_path / "runs" / name / "eval" for name in ("mores", "lora", "none")]
    check_attention([json.loads((out / "attention.json").read_text()) for out in evaluations])


def check_attention(reports):
    """All models were asked the same questions of one's own, in the template they learned."""
    models = [model for report in reports for model in report.values()]
    assert len(models) == 3
    assert len({model["tasks"]["questions"]["prompt_hash"] for model in models}) == 1
    for model in models:
        assert list(model["tasks"]) == ["questions"]
        counts = model["n"], model["tasks"]["questions"]["n"], model["excluded"]
        assert (model["template"], *counts) == ("bare", 8, 8, 0)
