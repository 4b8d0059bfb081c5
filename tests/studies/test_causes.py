"""What the study of causes says, and the pairs of images that it asks about."""

import json

import numpy as np
import pytest

from moresjax.data.digits import CELL, WORDS
from moresjax.inference.pruning import MAPS
from moresjax.studies import causes as module
from moresjax.studies.causes import FUNCTIONS, Measured, image_pairs
from moresjax.studies.papers import STUDIES


class CannedPipeline:
    """Seeds alone."""

    seeds, split, fast = range(5), "test", False

    def model(self, seed, name):
        return name


def measured(name, split, count, seed):
    """Count sits in layer 0, position in 1; MoReS raises attention but not the effect."""
    noise, mores = 0.01 * np.sin(seed), name.startswith("mores")
    shares = {"count": [0.9 + noise, 0.1, 0.0], "position": [0.0, 1.0 + noise, 0.0]}
    shares["identity"] = [1 / 3 + noise, 1 / 3, 1 / 3]
    faithful = {key: 0.2 * (key == "effect") + noise * (key != "random") for key in MAPS}
    effects = {"mean": 2.0 + np.cos(seed) * (0.5 if mores else 1), "hide": 3.0}
    attention = 0.3 + 0.1 * mores + noise * mores
    return Measured(shares, dict.fromkeys(FUNCTIONS, 4.0), attention, effects, faithful)


def test_findings_say_what_intervals_allow(monkeypatch):
    monkeypatch.setattr(module, "measure", measured)
    study = STUDIES["causes"]
    outcome = study.make(CannedPipeline(), study)
    json.dumps(outcome.values)
    found = "\n".join(outcome.findings)
    assert "Count with full sits in layer 0 (0.90 [0.89, 0.91])" in found
    assert "Position with mores r=1 sits in layer 1 (1.00" in found
    assert "Identity with full: no layer's share of the swap is shown to be above 1/3." in found
    assert "attention on the image is higher and the image's effect is not shown" in found
    assert "Faithfulness of maps of full against random: higher with effect (+20." in found
    assert len(outcome.figures) == 1
    for table in outcome.tables:
        assert [row[0] for row in table.rows] == [run.name for run in study.runs]
        assert all(len(row) == len(table.head) for row in table.rows)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_images_of_a_pair_differ_in_one_thing(function):
    pairs = image_pairs(function, "test", 6)
    assert len({pair.question for pair in pairs}) > 1
    for number, pair in enumerate(pairs):
        first, second = pair.images
        different = {
            (y, x)
            for y in range(2)
            for x in range(2)
            if (_cell(first, y, x) != _cell(second, y, x)).any()
        }
        assert len(different) == (2 if function == "position" else 1)
        if function == "position":
            (a, b), (c, d) = sorted(different)
            np.testing.assert_array_equal(_cell(first, a, b), _cell(second, c, d))
            assert pair.answers[0] != pair.answers[1]
        elif function == "count":
            one, other = (WORDS.index(answer) for answer in pair.answers)
            assert one - other == (-1 if number % 2 else 1)
    again = image_pairs(function, "test", 2)[1]
    np.testing.assert_array_equal(again.images[0], pairs[1].images[0])


def _cell(image, y, x):
    return image[y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
