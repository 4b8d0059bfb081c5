"""ArrayRecord shards and TFDS data sets: the same samples as from files, without TensorFlow."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data.arrayrecord import ArrayRecordSource, convert_llava
from moresjax.data.images import open_image
from moresjax.data.llava import LlavaSource
from moresjax.data.pipeline import make_iterator
from moresjax.data.sources import make_source
from moresjax.testing.llava_files import PROCESSOR, make_images, make_records, write_list

COUNT = 23


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> LlavaSource:
    folder = tmp_path_factory.mktemp("files")
    records = make_records(make_images(folder / "images", 8), COUNT)
    records[4]["conversations"][1]["value"] = "zwei\nLinien 十"
    return LlavaSource(write_list(folder / "mix.json", records), str(folder / "images"))


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "records"
    return folder, convert_llava(files, folder, shards=3, progress=False)


def test_shards_hold_the_same_samples(files, converted):
    folder, index = converted
    assert index == json.loads((folder / "index.json").read_text())
    assert index["records"] == COUNT
    assert list(index["shards"].values()) == [8, 7, 8]
    source = make_source("arrayrecord", folder=str(folder))
    assert len(source) == COUNT
    assert source.sizes.tolist() == files.sizes.tolist()
    for number in range(COUNT):
        sample, wanted = source[number], files[number]
        assert (sample.id, sample.turns) == (wanted.id, wanted.turns)
        # The bytes are those of the files: nothing is decoded and encoded again.
        assert list(sample.images) == [path.read_bytes() for path in wanted.images]
        row, other = (PROCESSOR.row(x).to_dict() for x in (sample, wanted))
        assert set(row) == set(other)
        for name in row:
            np.testing.assert_array_equal(row[name], other[name])


@pytest.mark.parametrize("batching", ["pad", "pack", "bucket"])
def test_batches_are_those_of_the_files(files, converted, batching):
    options = {"batch_size": 2, "max_seq_len": 100, "images_per_row": 2, "batching": batching}
    ours = make_iterator(ArrayRecordSource(str(converted[0])), PROCESSOR, **options)
    theirs = make_iterator(files, PROCESSOR, **options)
    for _ in range(3):
        batch, wanted = next(ours), next(theirs)
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def test_there_are_no_more_shards_than_samples(tmp_path):
    turns = [{"from": "human", "value": "who ?"}, {"from": "gpt", "value": "me"}]
    records = [{"id": str(i), "conversations": turns} for i in range(3)]
    few = LlavaSource(write_list(tmp_path / "few.json", records), str(tmp_path))
    index = convert_llava(few, tmp_path / "few", progress=False)
    assert list(index["shards"].values()) == [1, 1, 1]


def test_conversions_that_cannot_be_are_refused(files, converted, tmp_path):
    with pytest.raises(UserError, match="records is not empty"):
        convert_llava(files, converted[0])
    with pytest.raises(UserError, match=f"{COUNT} samples cannot be written in 0 shards"):
        convert_llava(files, tmp_path / "new", shards=0)
    assert not (tmp_path / "new").exists()
    record = {"id": "7", "image": "none.png", "conversations": []}
    bad = LlavaSource(write_list(tmp_path / "bad.json", [record]), str(tmp_path))
    with pytest.raises(UserError, match=r"sample bad\.json\[0\] 7: the conversation is empty"):
        convert_llava(bad, tmp_path / "new", shards=1, progress=False)
    with pytest.raises(UserError, match=r"new has no index\.json: it is not a \(complete\)"):
        ArrayRecordSource(str(tmp_path / "new"))


def test_an_image_that_is_missing_stops_the_conversion(tmp_path):
    conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    record = {"id": "7", "image": "none.png", "conversations": conversation}
    source = LlavaSource(write_list(tmp_path / "bad.json", [record]), str(tmp_path))
    with pytest.raises(UserError, match=r"\[0\] 7: image .*none\.png does not exist"):
        convert_llava(source, tmp_path / "new", on_bad_sample="raise", progress=False)


def test_a_folder_without_a_shard_is_refused(files, tmp_path):
    convert_llava(files, tmp_path / "x", shards=2, progress=False)
    (tmp_path / "x" / "data-00001-of-00002.arrayrecord").unlink()
    with pytest.raises(UserError, match="lacks the shard data-00001-of-00002"):
        ArrayRecordSource(str(tmp_path / "x"))


def test_images_are_read_from_bytes():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(np.asarray(open_image(file.getvalue())), pixels)
    with pytest.raises(UserError, match="image cannot be read: it is no image file"):
        open_image(b"no image")


# ---- TFDS.

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Shapes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(6, 6, 1)),
            "label": tfds.features.ClassLabel(names=["circle", "square"]),
            "where": tfds.features.Text(),
            "sides": np.int32,
            "captions": tfds.features.Sequence(
                {"text": tfds.features.Text(), "tone": tfds.features.Text()}
            ),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):  # TFDS itself encodes images with TensorFlow only
            Image.fromarray(np.full((6, 6), 40 * i, np.uint8)).save(f"{i}.png")
            yield i, {
                "image": f"{i}.png", "label": i % 2, "sides": i,
                "where": f"place {i}",
                "captions": [{"text": f"{word} {i}", "tone": word} for word in ("one", "two")],
            }
"""

READ = """
from moresjax.data.pipeline import make_iterator
from moresjax.data.sources import make_source

def source(**options):
    return make_source("tfds", dataset="shapes", data_dir="data", **options)

found = source(question="What is at {where} with {sides} sides?", answer="{label}")
assert len(found) == 6
seen = {}
for i in range(6):
    sample = found[i]
    number = int(sample.images[0].max()) // 40
    assert sample.images[0].shape == (6, 6)
    assert sample.turns[0].question == f"<image>\\nWhat is at place {number} with {number} sides?"
    assert sample.turns[0].answer == ("circle", "square")[number % 2]
    seen[number] = sample.id
assert sorted(seen) == list(range(6))
captions = source(answer="{captions[text]} {captions[tone]}", image="")
answers = [captions[i].turns[0].answer for i in range(6)]
assert all(a.split()[0] == a.split()[2] for a in answers), answers
assert {a.split()[0] for a in answers} == {"one", "two"}
assert captions[2] == captions[2] and captions[2].images == ()
import sys
import numpy as np
from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
options = {"batch_size": 3, "max_seq_len": 60, "images_per_row": 1}
batch = next(make_iterator(found, processor, **options))
assert batch["pixels"].shape == (3, 1, 12, 12, 3)

from moresjax.core.errors import UserError
def refused(**options):
    try:
        make_source("tfds", **({"dataset": "shapes", "data_dir": "data", "answer": "a"} | options))
    except UserError as error:
        return str(error)
assert "no feature 'photo'; it has " in refused(image="photo")
assert "no split 'test'; it has train" in refused(split="test")
assert "names a feature that is not there: 'colour'; there are " in refused(answer="{colour}")
assert "data set 'nothing' is not to be found" in refused(dataset="nothing")
assert "tensorflow" not in sys.modules
print("fine")
"""


def test_tfds_data_sets_are_read_without_tensorflow(tmp_path):
    (tmp_path / "shapes.py").write_text(BUILDER)
    (tmp_path / "make.py").write_text(
        "import sys\nfrom shapes import Shapes\n"
        "Shapes(data_dir='data', file_format='array_record').download_and_prepare()\n"
    )
    (tmp_path / "read.py").write_text(READ)
    path = os.pathsep.join([*filter(None, sys.path)])
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    options["env"] = os.environ | {"PYTHONPATH": path}
    made = subprocess.run([sys.executable, "make.py"], **options)
    assert made.returncode == 0, made.stderr
    read = subprocess.run([sys.executable, "read.py"], **options)
    assert read.stdout.strip().endswith("fine"), read.stderr
