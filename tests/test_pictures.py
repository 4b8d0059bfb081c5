"""The documentation's pictures: they can be drawn, and the house names every package."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from docs_pages import load_script
from test_architecture import FACE, FLOORS, MODULES, package

SCRIPT = Path(__file__).parents[1] / "docs" / "pictures.py"


@pytest.fixture(scope="module")
def pictures():
    return load_script(SCRIPT)


@pytest.mark.parametrize("name", ["row", "block", "house"])
def test_a_picture_is_drawn(pictures, tmp_path, name):
    path = tmp_path / f"{name}.svg"
    pictures.PICTURES[name]().save(path)
    texts = {text.text for text in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")}
    assert texts
    if name == "house":
        assert {package(module) for module in MODULES} - FACE <= texts


def test_every_package_of_the_house_has_a_caption(pictures):
    assert set(pictures.WHAT) == set().union(*FLOORS)
