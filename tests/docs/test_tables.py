"""Tables and findings of the documentation are what the result files say."""

import json
import re
import sys

import pytest
from docs_pages import ROOT, load_script

from moresjax.configs import digits as recipe

SCRIPT = ROOT / "docs" / "tables.py"
FILES = sorted((ROOT / "docs" / "results").glob("*.json"))
# They say nothing of how they were made; their page does.
WITHOUT_COMMAND = {
    "demo": "moresjax demo --seeds 5",
    "rates": "python benchmarks/digits_sweep.py --out runs/rates --seeds 5",
}


@pytest.fixture(scope="module")
def tables():
    return load_script(SCRIPT)


def test_pages_agree_with_their_results(tables):
    assert not tables.stale(), "run `python docs/tables.py`"


def test_readme_and_the_pages_of_measurements_have_blocks(tables):
    used = {p.name: tables.BLOCK.findall(p.read_text()) for p in tables.pages()}
    pages = ("demo.md", "representations.md", "llava-steering.md")
    names = {name for page in pages for *_, name, _ in used[page]}
    assert names == set(tables.BLOCKS)
    assert [name for _, _, name, _ in used["README.md"]] == ["findings", "made"]


def test_what_a_study_found_stands_beside_the_papers_own(tables):
    blocks = {
        (file, block)
        for page in tables.pages()
        for _, file, block, _ in tables.BLOCK.findall(page.read_text())
    }
    studies = {path.stem for path in FILES} - set(WITHOUT_COMMAND)
    assert {file for file, block in blocks if block == "miniature"} == studies
    assert {file for file, block in blocks if block == "paper"} == studies


def test_measurements_say_command_and_day():
    text = (ROOT / "docs" / "performance.md").read_text()
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        if re.search(r"^\|", body, re.M):
            assert re.search(r"`(python benchmarks/|moresjax )", body), title
            assert re.search(r"\b20\d\d-\d\d-\d\d\b", body), title


def test_a_changed_number_is_found(tables, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "lab" / "demo.md").read_text()
    number = re.search(r"\| \.\d{3} \|", tables.BLOCK.search(text)[0])[0]
    page = tmp_path / "page.md"
    page.write_text(text.replace(number, "| .999 |", 1))
    monkeypatch.setattr(tables, "pages", lambda: [page])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1
    assert "page.md disagrees with its results" in capsys.readouterr().out
    assert page.read_text() != text
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0
    assert page.read_text() == text


def test_a_block_that_does_not_exist_is_named(tables):
    with pytest.raises(SystemExit, match="no block nothing of"):
        tables.written("<!-- demo.nothing -->\n<!-- end -->")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_have_their_origin(path):
    results, name = json.loads(path.read_text()), path.stem
    made = results["made_with"]
    assert re.fullmatch(r"[0-9a-f]{12}", made["commit"])  # of a checkout without changes
    assert {"jax", "python"} <= set(made["versions"])
    assert made["machine"]["cores"]
    assert results["seeds"] >= 5
    if name in WITHOUT_COMMAND:
        assert f"`{WITHOUT_COMMAND[name]}`" in (ROOT / "docs" / "lab" / "demo.md").read_text()
    else:
        assert results["command"].startswith(f"moresjax study {results['study']} --out ")
        assert results["study"] == name
        # A command is for every machine: no path of it starts at a root or a home.
        assert not re.search(r"""[\s='"][/~]|\b[A-Z]:\\""", results["command"])


def test_the_recipe_is_what_was_chosen():
    results = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
    assert results["split"] == "test"
    for name, spec in recipe.METHODS.items():
        assert results["methods"][name]["tuning"] == spec
    rates = json.loads((ROOT / "docs" / "results" / "rates.json").read_text())
    assert rates["split"] == "val"
    chosen = {e["method"]: e["setting"] for e in rates["settings"] if e["chosen"]}
    assert set(chosen) == set(recipe.METHODS)
    for name, setting in chosen.items():
        rate = recipe.LEARNING_RATES[recipe.METHODS[name].split(":")[0]]
        assert setting == {"rate": rate, "connector": recipe.CONNECTOR_LR}, name
