"""The pages of the documentation: their Python runs, and the command line knows their commands."""

import dataclasses
import importlib
import re
import shlex

import pytest
from docs_pages import ROOT, blocks

from moresjax.cli.app import make_parser
from moresjax.core.errors import UserError
from moresjax.models.decoder import DecoderConfig
from moresjax.models.vision import VisionConfig

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("[RC]*.md")), *ROOT.glob("[cl]*/**/*.md")]
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
# A command in a fenced block, or indented by four blanks, with the lines that continue it.
COMMAND = re.compile(r"^(?:\$ |    )(moresjax (?:.*\\\n)*.+)$", re.MULTILINE)

# Files of the checkout and dotted names of the package, in text and in code.
FILE = re.compile(r"\b(?:moresjax|tests|benchmarks|configs|docs|launch)/[\w/.-]*\w")
MODULE = re.compile(r"\b(?:from |::: |`)(moresjax(?:\.\w+)+)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page):
    for text in COMMAND.findall(page.read_text()):
        words = shlex.split(text.replace("\\\n", " ").rstrip("&"), comments=True)
        try:
            _, rest = make_parser().parse_known_args(words[1:])
        except UserError as error:
            pytest.fail(f"{text}: {error}")
        assert all(word.startswith("--config.") for word in rest), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_exist(page):
    text = page.read_text()
    for path in (path for path in FILE.findall(text) if "NAME" not in path):
        places = ROOT / path, page.parent / path
        assert any(place.exists() for place in places), path
    for name in MODULE.findall(text):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_python_of_how_to_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)


def test_how_to_pages_are_short():
    long = {page.name: n for page in HOW_TO if (n := page.read_text().count("\n")) > 40}
    assert not long


def test_how_to_pages_are_listed():
    index = (DOCS / "index.md").read_text()
    assert all(f"(how-to/{page.name})" in index for page in HOW_TO)


def test_fields_of_parts_are_listed_with_their_defaults():
    text = (DOCS / "reference" / "models.md").read_text()
    table = text.partition("## Parts by their fields")[2].partition("\n## ")[0]
    kinds = DecoderConfig, VisionConfig
    listed = [{}, {}]
    for names, *defaults, _ in re.findall(r"^\| (`.+?) \|(.*?)\|(.*?)\|(.*)\|$", table, re.M):
        for found, cell in zip(listed, defaults, strict=True):
            own, names_of_row = re.findall(r"`([^`]+)`|(\w+)", cell), re.findall(r"`(\w+)`", names)
            values = [code or {"empty": ""}.get(word, word) for code, word in own]
            values *= len(names_of_row) if len(values) == 1 else 1
            pairs = zip(names_of_row, values, strict=bool(values))
            found |= {name: value for name, value in pairs if value != "none"}
    for kind, found in zip(kinds, listed, strict=True):
        fields = dataclasses.fields(kind)
        needed = dataclasses.MISSING
        assert found == {
            f.name: "needed" if f.default is needed else str(f.default) for f in fields
        }
