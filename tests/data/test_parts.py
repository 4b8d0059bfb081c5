"""Conversations whose turns are lists of parts, and images that are URLs."""

import base64
import functools
import io
import json

import numpy as np
import pytest
from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data.arrayrecord import ArrayRecordSource, convert_llava
from moresjax.data.check import check_data
from moresjax.data.images import named_image
from moresjax.data.llava import LlavaSource, image_names, measure, to_sample
from moresjax.data.samples import Turn
from moresjax.inference.files import generate_file
from moresjax.testing.llava_files import PROCESSOR, write_list
from moresjax.testing.models import talking_model

NOISE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    return file.getvalue()


URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def asked(*parts, answer="two", **fields) -> dict:
    user = {"role": "user", "content": list(parts)}
    reply = {"role": "assistant", "content": [text(answer)]}
    return {"messages": [user, reply] if answer else [user]} | fields


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
    ],
)
def test_an_image_among_the_parts(part):
    record = asked(text("how many ?"), part)
    assert image_names(record, "s") == ("a.png",)
    sample = to_sample(record, "s", ["a.png"])
    assert sample.turns == (Turn("<image>\nhow many ?", "two"),)
    assert measure(record) == (5, 1, 0, 1)


def test_parts_of_a_whole_conversation():
    system = {"role": "system", "content": [text("be"), text("brief")]}
    image = {"type": "image", "image": "a.png"}
    record = asked(text("from"), image, text("to"), {"type": "image", "image": "b.png"})
    record["messages"] = [system, *record["messages"], {"role": "user", "content": "why ?"}]
    assert image_names(record, "s") == ("a.png", "b.png")
    sample = to_sample(record, "s", ["a", "b"], prompt=True)
    question = "from\n<image>\nto\n<image>"
    assert sample.turns == (Turn(question, "two"), Turn("why ?"))
    assert sample.system == "be\nbrief"
    # Parts may stand for images that are named beside the conversation, as TRL's data do.
    beside = asked({"type": "image"}, text("how many ?"), images=["a.png"])
    assert image_names(beside, "s") == ("a.png",)
    assert to_sample(beside, "s", ["a.png"]).turns[0].question == "<image>\nhow many ?"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (asked({"type": "video", "video": "a.mp4"}), "must be a text, an image or an image_url"),
        (asked({"type": "image_url"}), "must be a text, an image or an image_url"),
        (asked({"type": "text"}), "must be a text, an image or an image_url"),
        (asked("how many ?"), "must be a text, an image or an image_url"),
        (asked(), "a turn of the conversation has no text"),
        (asked({"type": "image"}), "the text has 1 <image> but 0 images"),
        (
            asked({"type": "image", "image": "a.png"}, image="b.png"),
            "images are named both beside the conversation and in it",
        ),
        (asked(text("how many ?"), answer=""), "in turn, got human"),
    ],
)
def test_parts_that_cannot_be_read(record, message):
    with pytest.raises(UserError, match=f"sample s: .*{message}"):
        to_sample(record, "s", image_names(record, "s"))


def test_urls():
    assert named_image("photos", URL, "sample 1") == png()
    for url, message in (
        ("https://example.org/a.png", "is not fetched, since no command uses the network"),
        ("file:///a.png", "give its path below the image root, or a data: URL"),
        ("data:image/png;base64,*", "is not base64"),
        ("data:image/png,abc", "a data: URL is data:TYPE;base64,..., not"),
    ):
        with pytest.raises(UserError, match=f"sample 1: .*{message}"):
            named_image("photos", url, "sample 1")


@pytest.fixture
def source(tmp_path):
    """One image as a path and as two URLs, one that would have to be fetched, and early turns."""
    (tmp_path / "a.png").write_bytes(png())
    names = "a.png", URL, "https://example.org/a.png"
    records = [asked(text("how many ?"), {"type": "image", "image": name}) for name in names]
    early = {"role": "assistant", "content": "one"}
    records += [asked(text("how many ?"), image=URL), asked(text("<image> ?"), image=URL)]
    records[1]["messages"].insert(0, early)
    return LlavaSource(write_list(tmp_path / "mix.json", records), str(tmp_path))


def test_samples_of_a_file(source, tmp_path):
    report = check_data(
        source,
        functools.partial(lambda p: p, PROCESSOR),
        max_seq_len=60,
        images_per_row=1,
        num_workers=1,
        progress=False,
    )
    assert list(report.bad) == [2, 3]
    assert "image https://example.org/a.png is not fetched" in report.bad[2]
    assert "the text has 0 <image> but 1 images are given" in report.bad[3]
    assert report.cut_kinds == {"turns before the first question": 1}
    rows = [PROCESSOR.row(source[number]) for number in (0, 1, 4)]
    for row in rows[1:]:
        np.testing.assert_array_equal(np.asarray(row.pixels), np.asarray(rows[0].pixels))
    assert source.turn_counts.tolist() == [[0, 1], [1, 1], [0, 1], [0, 1], [0, 1]]
    good = [source.record(number)[0] for number in (0, 1, 4)]
    files = write_list(tmp_path / "good.json", good)
    convert_llava(LlavaSource(files, str(tmp_path)), tmp_path / "new", shards=1, progress=False)
    converted = ArrayRecordSource(str(tmp_path / "new"))
    assert converted.turn_counts.tolist() == [[0, 1], [1, 1], [0, 1]]
    assert converted.sizes.shape == (3, 2)
    for number, row in enumerate(rows):
        again = PROCESSOR.row(converted[number])
        np.testing.assert_array_equal(again.tokens, row.tokens)
        np.testing.assert_array_equal(np.asarray(again.pixels), np.asarray(row.pixels))


def test_prompts_of_a_file(tmp_path):
    model = talking_model()
    (tmp_path / "a.png").write_bytes(png())
    image = {"type": "image_url", "image_url": {"url": URL}}
    question, answer = {"role": "user", "content": "two ?"}, {"role": "assistant", "content": "one"}
    records = [
        {"prompt": "how many ?", "images": [URL]},
        {"prompt": "how many ?", "image": "a.png"},
        {"prompt": [image, text("how many ?")]},
        asked(text("how many ?"), image, answer=""),
        {"messages": [question, answer, question]},
        asked(text("how many ?")),
        {"prompt": "how many ?", "images": ["http://a/b.png"]},
        {"prompt": "how many ?", "system": "two ."},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    paths = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    counts = generate_file(model, *paths, max_new_tokens=3)
    lines = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert counts == {"records": 8, "errors": 3}
    alone = model.generate("how many ?", NOISE, max_new_tokens=3)
    assert [line["text"] for line in lines[:4]] == [alone] * 4
    shown = {"prompt": "how many ?", "images": [f"{URL[:40]}..."]}
    assert lines[0].items() >= shown.items()
    assert (lines[3]["prompt"], lines[4]["prompt"]) == ("<image>\nhow many ?", "two ?")
    row = model.processor.row(to_sample(records[4], "s", (), prompt=True))
    (whole,) = model.prompts.decode(model.service.generate_rows([row], 3))
    assert lines[4]["text"] == whole
    for number, message in {
        5: "roles must be human and gpt in turn and end with human, got human, gpt",
        6: "sample 6: image http://a/b.png is not fetched",
        7: "template bare has no place for a system prompt",
    }.items():
        assert message in lines[number]["error"]
