"""Images that must not or cannot be read: each costs its own question, and none is read that lies
outside of its benchmark's folder."""

import csv
import io
import json
import os
import struct
from pathlib import Path

import pytest
from PIL import Image, features

from moresjax.core.errors import UserError
from moresjax.data.images import UnusableImage, open_image
from moresjax.evaluation.presets import table
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import benchmark_names, load_benchmark
from moresjax.testing.benchmark_files import DOWNLOADS, photo, write
from moresjax.testing.models import talking_model


def avif_without_image() -> bytes:
    """A file over which Pillow's reader raises a RuntimeError; without a reader it is no image."""
    if not features.check("avif"):
        return b"ftypavif"
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "AVIF")
    return file.getvalue().replace(b"iloc", b"free")


AVIF = avif_without_image()
# Pillow's reader raises a NotImplementedError.
DDS = b"DDS " + struct.pack("<I", 124) + bytes(120)
# Fields of official files that name an image by text; numbers of COCO cannot lead anywhere.
FIELDS = {
    *("image", "imageId", "image_id", "imagename", "image_src", "filename", "filepath"),
    *("data_id", "Flickr30K_ID"),
}
OUTSIDE = "../" * 6 + "secret"


def renamed(value: object, name: str) -> object:
    """Records with every image under another name."""
    if isinstance(value, list):
        return [renamed(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: name if key in FIELDS and isinstance(item, str) else renamed(item, name)
        for key, item in value.items()
    }


def renamed_file(content: object, name: str) -> object:
    """The content of an official file with every image under another name."""
    if not isinstance(content, str):
        return renamed(content, name)
    if content.startswith("raw,"):
        rows = list(csv.DictReader(io.StringIO(content)))
        file = io.StringIO()
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(row | {"filename": name} for row in rows)
        return file.getvalue()
    if content.startswith("{"):
        records = map(json.loads, content.splitlines())
        return "".join(json.dumps(renamed(record, name)) + "\n" for record in records)
    return content


@pytest.fixture(scope="module")
def refused() -> set:
    return set()


@pytest.mark.parametrize("benchmark", benchmark_names())
@pytest.mark.parametrize("absolute", [False, True])
def test_no_name_leads_out_of_the_data(benchmark, absolute, refused, tmp_path):
    secret = tmp_path / "secret"
    for ending in ("", ".jpg"):
        secret.with_suffix(ending).write_bytes(photo())
    name = str(secret) if absolute else OUTSIDE
    root = tmp_path / "data"
    files = DOWNLOADS[benchmark]()
    write(root, {file: renamed_file(content, name) for file, content in files.items()})
    for task in load_benchmark(benchmark, data_root=root, limit=3):
        for image in [image for example in task.examples for image in example.images]:
            if isinstance(image, str | Path):
                assert Path(os.path.normpath(image)).is_relative_to(root)
            elif isinstance(image, UnusableImage):
                assert image.reason.endswith("is outside of the image root")
                refused.add((benchmark, absolute))


def test_most_benchmarks_name_images_by_text(refused):
    assert len({name for name, absolute in refused if not absolute}) >= 12
    assert len({name for name, absolute in refused if absolute}) >= 10


def test_bad_images_cost_their_own_questions(tmp_path):
    images = {"good": photo(), "avif": AVIF, "dds": DDS, "empty": b"", "last": photo(3)}
    names = [*images, "x" * 300, "../../secret", str(tmp_path / "secret"), "a\0b"]
    types = {"structural": "query"}
    rows = {
        str(number): {
            "question": "is there a two ?",
            "answer": "x",
            "imageId": name,
            "types": types,
        }
        for number, name in enumerate(names)
    }
    write(tmp_path / "data", {"gqa/testdev_balanced_questions.json": rows})
    write(tmp_path / "data/gqa/images", {f"{name}.jpg": data for name, data in images.items()})
    (tmp_path / "secret.jpg").write_bytes(photo())
    options = {"data_root": tmp_path / "data", "limit": 9, "batch_size": 2, "out": tmp_path / "out"}
    found = evaluate(talking_model("none"), ["gqa"], **options)
    entry = json.loads((tmp_path / "out/results.json").read_text())["scores"]["gqa"]
    assert sorted(row["id"] for row in found.predictions) == ["0", "4"]
    assert (entry["n"], entry["missing"]) == (9, 7)
    assert sorted(entry["errors"]) == list("1235678")
    assert all("\n" not in reason and len(reason) < 500 for reason in entry["errors"].values())
    assert "avif.jpg cannot be read" in entry["errors"]["1"]
    assert "dds.jpg cannot be read" in entry["errors"]["2"]
    assert "empty.jpg cannot be read" in entry["errors"]["3"]
    assert "name too long" in entry["errors"]["5"]
    assert "outside of the image root" in entry["errors"]["6"]
    assert "outside of the image root" in entry["errors"]["7"]
    assert "7 missing, counted as wrong" in table(found.scores)


@pytest.mark.parametrize("data", [AVIF, DDS, b""])
def test_whatever_pillow_raises_is_told_in_a_sentence(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(UserError, match=r"^image .*cannot be read: .+$"):
            open_image(source)
