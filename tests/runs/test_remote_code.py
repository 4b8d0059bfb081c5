"""A folder's own Python code is never run, whatever it asks for and whoever agrees."""

import ast
import io
import json
from pathlib import Path

import pytest

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.runs.processor import load_tokenizer
from moresjax.weights.hf import HFFolder

PACKAGE = Path(__file__).parents[2] / "moresjax"
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import {base}
class Own({base}):
    model_type = "own"
"""


def test_no_loader_of_transformers_is_left_to_ask():
    calls = [
        (path.name, {k.arg: ast.unparse(k.value) for k in node.keywords})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value).startswith("Auto")  # those that may run a folder's code
    ]
    assert len(calls) >= 3
    for name, keywords in calls:
        assert keywords.get("trust_remote_code") == "False", name
        assert keywords.get("local_files_only") == "True", name


def write(folder: Path, file: str, values: dict, auto_map: dict) -> None:
    (folder / file).write_text(json.dumps(values | {"auto_map": auto_map}))


@pytest.mark.parametrize("kind", ["config", "tokenizer", "image processor"])
def test_the_code_of_a_folder_does_not_run(kind, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    folder = tmp_path / "folder"
    folder.mkdir()
    base = {
        "config": "PretrainedConfig",
        "tokenizer": "PreTrainedTokenizerFast",
        "image processor": "BaseImageProcessor",
    }[kind]
    (folder / "own.py").write_text(CODE.format(marker=str(marker), base=base))
    if kind == "config":
        write(folder, "config.json", {"model_type": "own"}, {"AutoConfig": "own.Own"})
    elif kind == "tokenizer":
        build_tokenizer().save_pretrained(folder)
        write(
            folder,
            "tokenizer_config.json",
            {"tokenizer_class": "Own"},
            {"AutoTokenizer": [None, "own.Own"]},
        )
    else:
        write(
            folder,
            "preprocessor_config.json",
            {"image_processor_type": "Own"},
            {"AutoImageProcessor": "own.Own"},
        )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))
    load = {
        "config": lambda: HFFolder(folder).hf,
        "tokenizer": lambda: load_tokenizer(str(folder)),
        "image processor": lambda: ImageProcessor.from_pretrained(folder, 12),
    }[kind]
    with pytest.raises(UserError, match=r"cannot be used|can be used") as told:
        load()
    assert "custom code" in str(told.value)
    assert not marker.exists()
