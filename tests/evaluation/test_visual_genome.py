"""Training records from Visual Genome: a region for each photo whose phrase has a word."""

import json

import pytest

from moresjax.core.errors import UserError
from moresjax.evaluation.files import CAPTION
from moresjax.evaluation.training_files import build_training_file

PHRASES = {
    1: ["a Red cube", "a dog", "the blue sky"],
    2: ["a bored dog", "colored paper"],  # "red" is in there, as no word
    3: ["a dog at a bus stop"],
}


def download(root, addresses=True):
    photos = [
        {"image_id": n, "url": f"https://x.org/images/VG_100K/{n}.jpg" if addresses else ""}
        for n in PHRASES
    ]
    regions = [
        {"id": n, "regions": [{"phrase": phrase} for phrase in own]} for n, own in PHRASES.items()
    ]
    (root / "image_data.json").write_text(json.dumps(photos))
    (root / "region_descriptions.json").write_text(json.dumps(regions))


def built(root, task):
    out = root / f"{task}.json"
    build_training_file(task, root, out)
    return {
        record["image"]: [turn["value"] for turn in record["conversations"]]
        for record in json.loads(out.read_text())
    }


def test_a_region_for_each_photo_with_a_word(tmp_path, caplog):
    download(tmp_path)
    colors = built(tmp_path, "vg-color")
    assert list(colors) == ["VG_100K/1.jpg"]
    question, answer = colors["VG_100K/1.jpg"]
    assert question == f"<image>\n{CAPTION}"
    assert answer in {"a Red cube", "the blue sky"}
    assert colors == built(tmp_path, "vg_color")
    assert "vg_color: 1 photos have a fitting region, the paper has about 21000" in caplog.text
    assert built(tmp_path, "vg-sentiment")["VG_100K/2.jpg"][1] == "a bored dog"
    assert built(tmp_path, "vg-place")["VG_100K/3.jpg"][1] == "a dog at a bus stop"


def test_photos_without_an_address_are_told(tmp_path):
    download(tmp_path, addresses=False)
    with pytest.raises(UserError, match="photo 1 has no address"):
        build_training_file("vg-color", tmp_path, tmp_path / "out.json")
