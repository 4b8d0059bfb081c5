"""`data show`: what a model is given of a sample, in the terminal and as a page."""

import json
import re

import numpy as np
import pytest

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample, Turn
from moresjax.data.templates import get_template
from moresjax.reports.samples import sample_text, show_sample, write_samples_page
from moresjax.tuning.selectors import parse_selector

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture
def processor():
    image = ImageProcessor(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    return Processor(build_tokenizer(), get_template("bare"), image, visual_tokens=4)


def test_tokens_labels_edits_and_images(processor):
    sample = Sample("one", (Turn("<image> what is the largest ?", "nine"),), images=(IMAGE,))
    edits = {"mores": parse_selector("image:f2"), "loreft": parse_selector("prompt:l1")}
    shown = show_sample(sample, processor, edits)
    assert [len(tokens) for tokens in shown.segments()] == [1, 4, 5, 2]
    assert [t.text for t in shown.tokens if t.trained] == ["nine", "</s>"]
    assert [t.position for t in shown.tokens if "mores" in t.edits] == [1, 2]
    assert [t.text for t in shown.tokens if "loreft" in t.edits] == ["?"]
    np.testing.assert_array_equal(shown.images[0], IMAGE)  # normalised and back
    text = sample_text(shown, processor)
    assert "one: 12 tokens, 2 of them trained; images: 1" in text
    assert re.search(r"IMAGE +1-4  4 visual tokens  mores 2 of 4", text)
    assert re.search(r"ANSWER +10-11  'nine </s>'  trained 2 of 2", text)


def test_a_page_escapes_what_samples_say(processor, tmp_path):
    name = "<script>alert(1)</script>"
    shown = show_sample(Sample(name, (Turn("what is the largest ?", "nine"),)), processor)
    page = write_samples_page([shown], tmp_path / "page.html").read_text()
    assert name not in page
    assert "&lt;script&gt;" in page


def test_the_command(tmp_path, capsys):
    command = ["data", "show", "--config", "digits:stage=finetune,tuning=mores", "--samples", "2"]
    page = tmp_path / "page.html"
    assert main([*command, "--first", "3", "--out", str(page), "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert len(samples) == 2
    kinds = [token["kind"] for token in samples[0]["tokens"]]
    assert page.read_text().count('class="token IMAGE') == 2 * kinds.count("IMAGE") + 1  # legend
    assert main([*command, "--first", "-1"]) == 2
    assert "--first -1" in capsys.readouterr().err
    assert main(["data", "show", "--config", "digits:stage=vit"]) == 2
    assert "no conversation" in capsys.readouterr().err


def test_a_sample_that_cannot_be_shown_is_named(processor):
    with pytest.raises(UserError, match="sample one"):
        show_sample(Sample("one", (Turn("<image> what ?", "nine"),)), processor)
