"""Checking a data set: every count is that of the samples, every bad one is listed."""

import dataclasses
import functools
import json
import re

import numpy as np
import pytest

from moresjax.cli import main
from moresjax.core.layout import TokenKind
from moresjax.data.check import check_data
from moresjax.data.digits import DigitsSource
from moresjax.data.images import open_image
from moresjax.data.llava import LlavaSource
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import PartsConfig, RunConfig
from moresjax.testing.llava_files import conversation, make_images, make_records, write_list
from moresjax.testing.models import TINY_LLM, TINY_VISION


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Configuration, source of good samples, and the report."""
    folder = tmp_path_factory.mktemp("check")
    records = make_records(make_images(folder / "images", 10), 150)
    (folder / "images" / "broken.png").write_bytes(b"no image")
    bad = {
        "missing": ({"image": "none.png"}, conversation("<image>", "a")),
        "broken": ({"image": "broken.png"}, conversation("<image>", "a")),
        "empty": ({}, []),
    }
    # 200 tokens do not fit; they are not bad in any other way.
    bad["long"] = ({}, conversation("one " * 200, "two"))
    bad["endless"] = ({"image": f"{'x' * 300}.png"}, conversation("<image>", "a"))
    bad["outside"] = ({"image": "../check/broken.png"}, conversation("<image>", "a"))
    for name, (fields, rounds) in bad.items():
        records.append({"id": name, "conversations": rounds} | fields)
    parts = PartsConfig(llm=TINY_LLM | {"vocab_size": 37}, vision=TINY_VISION)
    config = RunConfig(tokenizer="digits", template="bare", model=parts)
    source = LlavaSource(write_list(folder / "mix.json", records), str(folder / "images"))
    return config, source, check(config, source)


def check(config, source, **options):
    """A report for rows of 100 tokens and four images."""
    options = {
        "max_seq_len": 100,
        "images_per_row": 4,
        "num_workers": 1,
        "progress": False,
    } | options
    return check_data(source, functools.partial(build_processor, config), **options)


def test_counts_are_those_of_the_rows(checked):
    config, source, report = checked
    processor = build_processor(config)
    rows = [processor.text_row(source[i]) for i in [*range(150), 153]]
    assert report.samples == 156
    assert report.tokens == sum(len(row) for row in rows)
    assert report.answer_tokens == sum((r.kind == TokenKind.ANSWER).sum() for r in rows)
    images = [(row.image >= 0).sum() // 9 for row in rows]
    assert report.images == sum(images)
    assert report.text_only == images.count(0)
    lengths = np.asarray([len(row) for row in rows])
    assert report.longest == lengths.max() > 200
    starts = [start for start, _ in report.histogram]
    counts = np.histogram(lengths, [*starts, starts[-1] + starts[1]])[0]
    assert [count for _, count in report.histogram] == counts.tolist()
    assert len(starts) <= 16
    sizes = [open_image(image).size for i in [*range(150), 153] for image in source[i].images]
    assert report.reshaped == sum(max(size) >= 1.25 * min(size) for size in sizes) > 0
    padded = dataclasses.replace(config, image_aspect="pad")
    assert check(padded, source).reshaped == 0
    fits = lengths[lengths <= 100]
    assert report.useful["pad"] == pytest.approx(fits.sum() / (len(fits) * 100))
    assert report.useful["pad"] < 0.6 < 0.9 < report.useful["pack"] <= 1


def test_bad_samples_are_listed_with_their_reason(checked):
    report = checked[2]
    assert list(report.bad) == [150, 151, 152, 154, 155]
    assert "File name too long" in report.bad[154]
    assert report.bad[155].endswith("is outside of the image root")
    assert "mix.json[150] missing: image" in report.bad[150]
    assert report.bad[150].endswith("none.png does not exist")
    assert report.bad[151].endswith("cannot be read: it is no image file")
    assert report.bad[152].endswith("empty: the conversation is empty")
    assert list(report.too_long) == [153]
    assert "long: 20" in report.too_long[153]
    assert report.too_long[153].endswith("rows hold 100 tokens and 4 images")
    json.dumps(dataclasses.asdict(report))


def test_workers_find_the_same(checked):
    config, source, report = checked
    assert check(config, source, num_workers=2) == report


def test_few_samples_start_no_process(checked, monkeypatch):
    monkeypatch.setattr("moresjax.data.check._in_parallel", None)  # which cannot be called
    assert check(*checked[:2], num_workers=0) == checked[2]


def test_images_need_not_be_opened(checked):
    assert list(check(*checked[:2], decode=False).bad) == [152, 155]


def test_progress_is_shown(checked, capsys):
    check(*checked[:2], progress=True)
    assert "156/156" in capsys.readouterr().err


class Odd:
    """Three samples, the second of which a plug-in's source cannot make."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {0: self.source[0], 2: self.source[1]}[index]


def test_an_error_of_a_source_costs_its_sample_alone(checked):
    report = check(checked[0], Odd(checked[1]))
    assert report.bad == {1: "sample 1: KeyError: 1"}


def test_what_is_no_conversation_is_bad(checked):
    report = check(checked[0], DigitsSource("patches", size=2))
    assert report.bad[0] == "sample 0 of this source is no conversation"
    assert (report.useful, report.tokens, report.histogram) == ({}, 0, ((0, 0),))


def test_files_are_checked_without_a_configuration(tmp_path, capsys):
    make_images(tmp_path, 1)
    asked = [
        {"question": "two three ?", "answer": "four", "image": "part0/000.png"},
        {"text": "one ?"},
    ]
    questions = write_list(tmp_path / "asked.json", asked)
    rounds = [conversation("<image> one two ?", "three"), conversation("two ?", "five")]
    records = [{"conversations": rounds[0], "image": "none.png"}, {"conversations": rounds[1]}]
    talk = write_list(tmp_path / "talk.json", records)
    command = ["data", "check", "--workers", "1", "--json", "--files", f"{questions};{talk}"]
    assert main(command) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [(f["kind"], f["samples"], f["images"], f["tokens"]) for f in files.values()] == [
        ("questions", 2, 1, 0),
        ("conversations", 2, 0, 0),
    ]
    assert files[talk]["bad"]["0"].endswith("none.png does not exist")
    assert main([*command, "--tokenizer", "digits", "--template", "bare"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    # <s> two three ? four </s>, <s> one ? and <s> two ? five </s>
    assert [(f["tokens"], f["answer_tokens"]) for f in files.values()] == [(6 + 3, 2), (5, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs either --config FILE or --files FILE"),
        (["--config", "digits:stage=llm", "--files", "a.json"], "needs either --config FILE or"),
        (["--config", "digits:stage=llm", "--tokenizer", "digits"], "--tokenizer go with --files"),
        (["--files", "none.json"], "data file none.json does not exist"),
        (["--files", "{odd}"], "odd.json has neither `conversations` nor .*fields: caption, id"),
    ],
)
def test_a_check_of_nothing_known_is_refused(options, message, tmp_path, capsys):
    odd = write_list(tmp_path / "odd.json", [{"id": 1, "caption": "a cat"}])
    assert main(["data", "check", *(option.format(odd=odd) for option in options)]) == 2
    assert re.search(message, capsys.readouterr().err)
