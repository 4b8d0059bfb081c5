"""`data convert`: bad samples are left out and listed; the folder is complete or not there."""

import json
import os
import resource

import pytest

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data import arrayrecord
from moresjax.data.arrayrecord import ArrayRecordSource, convert_llava
from moresjax.data.llava import LlavaSource
from moresjax.testing.llava_files import conversation, make_images, make_records, write_list

GOOD = 6
# What is wrong with the samples behind the good ones, in their order.
REASONS = [
    "missing: image {}/none.png does not exist",
    "broken: image {}/broken.png cannot be read: it is no image file",
    "cut: image {}/cut.png cannot be read: image file is truncated",
    "pipe: image {}/pipe is a pipe, not a file",
    "outside: image ../x.png is outside of the image root",
    "empty: the conversation is empty",
    "list: a record must be an object, not list",
]
OPENED = (1, 2)  # those whose images must be opened to see it


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Bad samples, of which the first of three shards would be, and good ones behind them."""
    folder = tmp_path_factory.mktemp("convert")
    images = folder / "images"
    names = make_images(images, 4)
    whole = (images / names[0]).read_bytes()
    (images / "broken.png").write_bytes(b"no image")
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(images / "pipe")
    asked = conversation("<image>", "a")
    given = {"missing": "none.png", "broken": "broken.png", "cut": "cut.png", "pipe": "pipe"}
    given["outside"] = "../x.png"
    bad: list = [{"id": id, "image": x, "conversations": asked} for id, x in given.items()]
    bad += [{"id": "empty", "conversations": []}, []]
    return write_list(folder / "mix.json", [*bad, *make_records(names, GOOD)]), str(images)


def convert(files, out, *options):
    return main(
        [
            "data",
            "convert",
            "--files",
            files[0],
            "--image-root",
            files[1],
            "--out",
            str(out),
            *options,
        ]
    )


def error_of(capsys) -> str:
    """The one sentence with which a command has ended."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [x for x in error.splitlines() if x.startswith("moresjax: error: ")]
    return line.removeprefix("moresjax: error: ")


def test_bad_samples_are_left_out_counted_and_listed(files, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(arrayrecord, "TOLD", 3)
    out = tmp_path / "out"
    assert convert(files, out, "--shards", "3") == 0
    told = (
        f"{out}: {GOOD} samples in 2 files; {len(REASONS)} bad ones are left out, skipped_samples"
    )
    assert told in capsys.readouterr().out
    report = json.loads((out / "skipped_samples.json").read_text())
    assert report["skipped"] == len(REASONS)
    assert [*report["samples"]] == [str(number) for number in range(len(REASONS))]
    for number, reason in enumerate(REASONS):
        own = reason.removeprefix("list").format(files[1])
        wanted = f"sample mix.json[{number}]{' ' * (own == reason.format(files[1]))}{own}"
        assert report["samples"][str(number)].startswith(wanted)
    # The log is bounded.
    skipped = [x.getMessage() for x in caplog.records if x.getMessage().startswith("skipped: ")]
    assert skipped == [f"skipped: {report['samples'][str(number)]}" for number in range(3)]

    index = json.loads((out / "index.json").read_text())
    assert (index["records"], index["skipped"]) == (GOOD, len(REASONS))
    assert {*index["shards"]} | {"index.json", "sizes.npy", "skipped_samples.json"} == {
        *os.listdir(out)
    }
    source, wanted = ArrayRecordSource(str(out)), LlavaSource(*files)
    assert len(source) == GOOD
    for number in range(GOOD):
        sample, other = source[number], wanted[len(REASONS) + number]
        assert (sample.id, sample.turns) == (other.id, other.turns)
        assert list(sample.images) == [path.read_bytes() for path in other.images]
    assert source.sizes.tolist() == wanted.sizes[len(REASONS) :].tolist()
    assert source.turn_counts.tolist() == wanted.turn_counts[len(REASONS) :].tolist()


def test_images_need_not_be_opened(files, tmp_path, capsys):
    assert convert(files, tmp_path / "out", "--no-decode", "--workers", "1", "--json") == 0
    index = json.loads(capsys.readouterr().out)
    assert (index["records"], index["skipped"]) == (GOOD + len(OPENED), len(REASONS) - len(OPENED))
    report = json.loads((tmp_path / "out" / "skipped_samples.json").read_text())
    assert not {str(number) for number in OPENED} & {*report["samples"]}


def test_what_cannot_be_converted_is_one_sentence_and_leaves_nothing(files, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(files, out, "--on-bad-sample", "raise") == 2
    assert error_of(capsys) == "sample mix.json[0] " + REASONS[0].format(files[1])
    none = write_list(tmp_path / "none.json", [{"id": "a", "conversations": []}, "text"])
    assert convert((none, "."), out) == 2
    told = "all 2 samples are bad, the last one: sample none.json[1]: a record must be an object"
    assert error_of(capsys) == f"{told}, not str"
    assert convert(files, out, "--on-bad-sample", "drop") == 2
    assert error_of(capsys) == "unknown on_bad_sample 'drop'; choose from: raise, skip"
    assert convert(files, out, "--workers", "-1") == 2
    assert error_of(capsys) == "num_workers must be at least 0, got -1"
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((str(tmp_path / "pipe"), "a pipe"), ("/dev/zero", "a device")):
        assert convert((path, files[1]), out) == 2
        assert error_of(capsys) == f"data file {path} is {kind}, not a file"
    assert convert((files[0], "/dev/zero"), out) == 2
    assert error_of(capsys) == "image_root /dev/zero is not a folder"
    assert sorted(os.listdir(tmp_path)) == ["none.json", "pipe"]


def test_a_folder_with_something_in_it_is_refused_before_files_are_read(files, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert convert(("none.json", files[1]), tmp_path / "out") == 2
    assert error_of(capsys) == f"{tmp_path / 'out'} is not empty; the conversion needs a new folder"
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_full_disk_is_told_and_leaves_nothing(files, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code = convert(files, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert error_of(capsys).startswith(f"{tmp_path / 'out'} cannot be written: File too large; ")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError, UserError])
def test_the_folder_has_its_name_only_when_it_is_complete(ending, files, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []

    def interrupted(path, content):
        seen.extend((path.name, out.exists()))  # what a kill would leave at the last moment
        raise ending

    monkeypatch.setattr(arrayrecord, "write_json", interrupted)
    with pytest.raises(ending):
        convert_llava(LlavaSource(*files), out, shards=2, progress=False)
    assert seen == ["index.json", False]
    assert not os.listdir(tmp_path)
