"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    """Names of the modules that show examples."""
    files = sorted((ROOT / "moresjax").rglob("*.py"))
    shown = [path.relative_to(ROOT) for path in files if ">>> " in path.read_text()]
    return [".".join(path.with_suffix("").parts) for path in shown]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str):
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert doctest.testmod(module, optionflags=FLAGS).failed == 0
