"""The tutorial runs from its first line to its last, with few steps."""

import runpy

from docs_pages import ROOT, blocks, commands

from moresjax.cli import main

PAGE = ROOT / "docs" / "tutorial" / "own-data.md"
QUICK = ["--config.steps=2", "--config.batch_size=8"]


def test_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    for block in blocks(PAGE):
        if block.title:
            # A hundred images are enough.
            text = block.text.replace("range(1000)", "range(108)")
            (tmp_path / block.title).write_text(text.replace("900.png", "9.png"))
        for command, *words in commands(block.text) if block.language == "console" else ():
            if command == "python":
                runpy.run_path(words[0], run_name="__main__")
            else:
                assert command == "moresjax"
                words = [word.replace("/900.png", "/9.png") for word in words]
                assert main([*words, *(QUICK if words[0] == "train" else ())]) == 0, (
                    capsys.readouterr().err
                )
            ran.append(words[0])
    assert {"make_images.py", "train", "data", "generate", "analyze", "export"} <= {*ran}
    assert "of 100 right" in capsys.readouterr().out
    assert (tmp_path / "map.png").is_file()
