"""Code blocks of the documentation's pages, and the scripts beside them."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language, the file that it shows (or nothing), and its text."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*(part or "" for part in found)) for found in BLOCK.findall(page.read_text())]


def commands(text: str) -> list[list[str]]:
    """The words of every command, `$ command ...`, of a console block."""
    joined = re.sub(r"\\\n *", "", text)  # lines that go on
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    return [shlex.split(line.removesuffix("&"), comments=True) for line in lines]


def load_script(path: Path) -> ModuleType:
    """A script beside the documentation as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
