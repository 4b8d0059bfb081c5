"""Tables and findings of the documentation are what the result files say."""

import json
import re
import sys

import pytest
from docs_pages import ROOT, load_script

from moresjax.configs import digits as recipe

SCRIPT = ROOT / "docs" / "tables.py"


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


def test_results_have_their_origin_and_the_recipe_is_what_was_chosen():
    results = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
    assert results["seeds"] >= 5
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
    for facts in (results["made_with"], rates["made_with"]):
        assert re.fullmatch(r"[0-9a-f]{12}", facts["commit"])
        assert {"jax", "python"} <= set(facts["versions"])
        assert facts["machine"]["cores"]
