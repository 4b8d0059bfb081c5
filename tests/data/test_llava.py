"""LLaVA's files: read lazily, as LLaVA reads them, every mistake told with the sample's name."""

import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data import records as records_module
from moresjax.data.llava import LlavaSource, image_names, measure, to_sample
from moresjax.data.pipeline import make_iterator
from moresjax.data.records import JsonRecords
from moresjax.data.samples import Sample, Turn
from moresjax.data.sources import make_source
from moresjax.testing.llava_files import (
    PROCESSOR,
    conversation,
    make_images,
    make_records,
    write_lines,
    write_list,
)

COUNT = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder, records, and the source of them."""
    folder = tmp_path_factory.mktemp("llava")
    records = make_records(make_images(folder / "images", 10), COUNT)
    records[3]["conversations"][1]["value"] = "zwölf 十二 😀"
    path = write_list(folder / "mix.json", records)
    return folder, records, LlavaSource(path, str(folder / "images"))


# ---- Records.


@pytest.mark.parametrize("chunk", [7, 100, 1 << 22])
@pytest.mark.parametrize("write", [write_list, write_lines])
def test_records_are_those_of_the_file_wherever_chunks_end(
    corpus, tmp_path, monkeypatch, write, chunk
):
    monkeypatch.setattr(records_module, "CHUNK", chunk)
    records = corpus[1][:12]
    found = JsonRecords.scan(write(tmp_path / "file", records), lambda r: (len(r), 1))
    assert [found[i] for i in range(len(found))] == records
    assert found.sizes.tolist() == [[len(record), 1] for record in records]


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"data": ', "}"),
        ('\ufeff{"info": {"data": [1, "]"]}, "a \\" b": 3,\n"questions" : ', ', "data": [5]}\n'),
    ],
)
def test_a_list_inside_of_an_object_is_read_like_one_alone(
    corpus, tmp_path, monkeypatch, before, after, chunk
):
    monkeypatch.setattr(records_module, "CHUNK", chunk)
    records = corpus[1][:4]
    path = tmp_path / "wrapped.json"
    path.write_text(f"{before}{json.dumps(records, indent=1, ensure_ascii=False)}{after}")
    found = JsonRecords.scan(path, lambda r: (len(r), 1))
    assert [found[i] for i in range(len(found))] == records
    source = LlavaSource(str(path), str(corpus[0] / "images"))
    assert source[3].turns == corpus[2][3].turns


def test_fields_of_other_names_are_no_list_of_records(tmp_path):
    for record in ({"data": {"id": 1}}, {"id": [1], "answers": [{"data": []}]}, {"data": "["}):
        path = write_lines(tmp_path / "lines.jsonl", [record] * 2)
        assert [JsonRecords.scan(path)[i] for i in range(2)] == [record] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{"id": 1}, {"id": 2}', "ends in the middle of its list"),
        ('{"info": 1, "data": []}', "has no records"),
        ('{"info": 1, "data": [{"id": ]}', "record 0 is not JSON: Expecting value"),
        ('[{"id": 1}, {"id": 2}', "ends in the middle of its list"),
        ('[{"id": 1}, {"id": ]', "record 1 is not JSON: Expecting value"),
        ('{"id": 1}\n{"id": 2', "record 1 is not JSON"),
        ('{"id": 1}\n{id: 2}' + " " * 99, "record 1 is not JSON: Expecting property name"),
        ('[{"id": "1]', "record 0 is not JSON: Unterminated string"),
        ("[]", "has no records"),
        ("", "has no records"),
        (b"\xff\xfe{", "is not UTF-8"),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"bad\.json.*{message}"):
        JsonRecords.scan(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data file .*none\.json does not exist"):
        LlavaSource(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(UserError, match=r"image_root .*nowhere is not a folder"):
        LlavaSource("x.json", str(tmp_path / "nowhere"))


# ---- Samples.


def test_samples_are_those_of_the_records(corpus):
    folder, records, source = corpus
    assert len(source) == COUNT
    for number, record in enumerate(records):
        sample = source[number]
        assert sample.id == f"mix.json[{number}] {record['id']}"
        values = [turn["value"] for turn in record["conversations"]]
        assert [turn.answer for turn in sample.turns] == values[1::2]
        images = record.get("image", [])
        images = [images] if isinstance(images, str) else images
        assert sample.images == tuple(folder / "images" / name for name in images)
        assert sum(turn.question.count("<image>") for turn in sample.turns) == len(images)
        PROCESSOR.row(sample)


def test_sizes_are_words_and_images(corpus):
    _, records, source = corpus
    for record, (words, images) in zip(records, source.sizes, strict=True):
        assert words == sum(len(turn["value"].split()) for turn in record["conversations"])
        assert images == (
            len(record["image"])
            if isinstance(record.get("image"), list)
            else int("image" in record)
        )


def sample_of(*texts: str, images=(), **record) -> Sample:
    return to_sample({"conversations": conversation(*texts)} | record, "s-7", images)


@pytest.mark.parametrize(
    "text", ["<image>\nwho ?", "who ?\n<image>", "<image>who ?", "who ? <image>"]
)
def test_a_single_image_comes_first(text):
    assert sample_of(text, "me", images=["a"]).turns == (Turn("<image>\nwho ?", "me"),)


def test_several_images_stay_where_they_are():
    text = "is <image> larger than <image> ?"
    assert sample_of(text, "no", images=["a", "b"]).turns[0].question == text
    later = sample_of("who ?", "me", "and here ? <image>", "you", images=["a"])
    assert [turn.question for turn in later.turns] == ["who ?", "<image>\nand here ?"]


def test_a_question_of_an_image_alone_is_the_image():
    assert sample_of("<image>", "a cat", images=["a"]).turns[0].question == "<image>"


def test_answers_before_the_first_question_are_left_out():
    rounds = [{"from": "gpt", "value": "hello"}, *conversation("who ?", "me")]
    assert to_sample({"conversations": rounds}, "s-7", ()).turns == (Turn("who ?", "me"),)


SURROGATE = "\ud800"
BAD = {
    "missing image": ({"image": "none.png"}, ("<image> ?", "a"), "image .*none.png does not exist"),
    "broken image": ({"image": "broken.png"}, ("<image> ?", "a"), "cannot be read: it is no image"),
    "outside": ({"image": "../mix.json"}, ("<image> ?", "a"), "../mix.json is outside of the"),
    "hidden": ({"image": "part0/../../x"}, ("<image> ?", "a"), "is outside of the image root"),
    "absolute": ({"image": "/etc/passwd"}, ("<image> ?", "a"), "/etc/passwd is outside of the"),
    "image is a number": ({"image": 7}, ("<image> ?", "a"), "image 7 is neither a path nor a list"),
    "no image": ({}, ("<image> ?", "a"), "the text has 1 <image> but 0 images"),
    "no mark": ({"image": "part0/000.png"}, ("?", "a"), "the text has 0 <image> but 1 images"),
    "image in the answer": ({}, ("?", "a <image>"), "an answer contains <image>"),
    "empty": ({}, (), "the conversation is empty"),
    "both fields": ({"image": "part0/000.png", "images": ["x"]}, ("?", "a"), "both `image` and"),
    "no answer": ({}, ("?",), "roles must be human and gpt in turn, got human"),
    "roles": (
        {"conversations": [{"from": "human", "value": "?"}] * 2}, (), "got human, human",
    ),
    "answers alone": (
        {"conversations": [{"from": "gpt", "value": "?"}] * 2}, (), "in turn, got gpt, gpt",
    ),
    "no text": ({"conversations": [{"from": "human", "value": 3}]}, (), "a turn .* has no text"),
    "not a list": ({"conversations": "hello"}, (), "the conversation is empty"),
    "surrogate": ({}, (f"is {SURROGATE} ?", "a"), "the text cannot be tokenised"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_corpus(tmp_path_factory):
    """A source with one good sample first, then every bad one."""
    folder = tmp_path_factory.mktemp("bad")
    make_images(folder / "images", 2)
    (folder / "images" / "broken.png").write_bytes(b"no image")
    (folder / "mix.json").write_text("{}")
    records = [{"id": "good", "conversations": conversation("what ?", "one")}]
    for name, (fields, texts, _) in BAD.items():
        records.append({"id": name, "conversations": conversation(*texts)} | fields)
    return LlavaSource(write_lines(folder / "bad.jsonl", records), str(folder / "images"))


@pytest.mark.parametrize("number", range(len(BAD)), ids=list(BAD))
def test_every_bad_sample_is_named(bad_corpus, number):
    name, (_, _, message) = list(BAD.items())[number]
    place = rf"sample bad\.jsonl\[{number + 1}\] {name}: "
    with pytest.raises(UserError, match=place + ".*" + message):
        PROCESSOR.row(bad_corpus[number + 1])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question_id": 1, "text": "who ?", "image": "a.png"},
            "a question without a conversation",
        ),
        (
            {"question": "who ?", "answer": "me"},
            "files of questions are for `evaluate --tasks` and",
        ),
        ({"id": 1, "caption": "a cat"}, "neither `conversations` nor `messages`, but id, caption"),
        ({}, "neither `conversations` nor `messages`, but nothing"),
    ],
)
def test_a_record_of_another_kind_is_told_what_it_is(record, message):
    with pytest.raises(UserError, match=rf"^sample s-7: it (is|has) .*{message}"):
        to_sample(record, "s-7", [])


def test_images_may_be_under_images(corpus):
    record = {"images": ["part0/000.png"], "messages": conversation("<image> ?", "a")}
    assert image_names(record, "s-7") == ("part0/000.png",)
    assert measure(record) == (3, 1, 0, 1)


def test_a_record_that_is_no_object_is_named(tmp_path):
    source = LlavaSource(write_list(tmp_path / "odd.json", ["text"]), str(tmp_path))
    with pytest.raises(UserError, match=r"sample odd\.json\[0\]: a record must be an object"):
        source[0]


@pytest.mark.parametrize("batching", ["pad", "pack", "bucket"])
def test_bad_samples_are_skipped_counted_and_listed(bad_corpus, tmp_path, batching):
    options = {
        "batch_size": 1,
        "max_seq_len": 40,
        "images_per_row": 1,
        "batching": batching,
        "pack_window": 2,
    }
    batches = make_iterator(bad_corpus, PROCESSOR, on_bad_sample="skip", **options)
    ids = {str(next(batches)["id"][0]) for _ in range(20)}
    good = "bad.jsonl[0] good"
    assert ids - {""} <= {good, f"{good};{good}"}
    assert ids != {""}
    assert sorted(batches.skip_policy.skipped) == list(range(1, len(BAD) + 1))
    batches.skip_policy.save(tmp_path / "skipped.json")
    report = json.loads((tmp_path / "skipped.json").read_text())
    assert report["skipped"] == len(BAD)
    assert "none.png does not exist" in report["samples"]["1"]
    with pytest.raises(UserError, match=r"sample bad\.jsonl"):
        for _ in make_iterator(bad_corpus, PROCESSOR, **options):
            pass


def test_a_source_without_a_good_sample_ends(tmp_path):
    source = LlavaSource(write_list(tmp_path / "odd.json", ["a", "b", "c"]), str(tmp_path))
    with pytest.raises(UserError, match="all 3 samples are bad"):
        for _ in make_iterator(
            source, PROCESSOR, batch_size=1, max_seq_len=9, on_bad_sample="skip"
        ):
            pass
    with pytest.raises(UserError, match=r"on_bad_sample 'ignore'; choose from: raise, skip"):
        make_iterator(source, PROCESSOR, batch_size=1, max_seq_len=9, on_bad_sample="ignore")


# ---- Several files.


def test_several_files_are_one_source(corpus, tmp_path):
    folder, records, _ = corpus
    paths = (
        write_list(tmp_path / "a.json", records[:5]),
        write_lines(tmp_path / "b.jsonl", records[5:]),
    )
    both = make_source("llava", files=";".join(paths), image_root=str(folder / "images"))
    assert len(both) == COUNT
    assert both[4].id == "a.json[4] 0004"
    assert both[5].id == "b.jsonl[0] 0005"
    assert both.sizes.tolist() == corpus[2].sizes.tolist()
    assert both.mixture_weights == ()
    again = pickle.loads(pickle.dumps(both))
    assert again[7] == both[7]


def test_weights_are_the_shares_of_what_is_read(corpus, tmp_path):
    folder, records, _ = corpus
    paths = (
        write_list(tmp_path / "a.json", records[:5]),
        write_list(tmp_path / "b.json", records[5:]),
    )
    source = LlavaSource(";".join(paths), str(folder / "images"), weights="3;1")
    batches = make_iterator(source, PROCESSOR, batch_size=4, max_seq_len=120, images_per_row=2)
    ids = [str(i) for _ in range(35) for i in next(batches)["id"]]
    assert sum(i.startswith("a.json") for i in ids) == pytest.approx(0.75 * len(ids), abs=1)
    # Every sample of the smaller share has its turn before one comes again.
    rest = [i for i in ids if i.startswith("b.json")]
    assert len(rest) == len(set(rest)) == 35
    state = batches.get_state()
    expected = [next(batches)["id"].tolist() for _ in range(3)]
    again = make_iterator(source, PROCESSOR, batch_size=4, max_seq_len=120, images_per_row=2)
    again.set_state(json.loads(json.dumps(state)))
    assert [next(again)["id"].tolist() for _ in range(3)] == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("1", "must be as many as the files"),
        ("1;x", "are not numbers"),
        ("1;0", "must be positive"),
    ],
)
def test_weights_that_do_not_fit_are_refused(corpus, weights, message):
    path = str(corpus[0] / "mix.json")
    with pytest.raises(UserError, match=message):
        LlavaSource(f"{path};{path}", str(corpus[0]), weights)


def test_a_source_without_its_files_is_refused():
    with pytest.raises(UserError, match="data source 'llava' needs the option 'files'"):
        make_source("llava")


def test_pixels_are_those_of_the_file(corpus):
    folder, records, source = corpus
    row = PROCESSOR.row(source[1])
    with Image.open(folder / "images" / records[1]["image"]) as image:
        np.testing.assert_array_equal(row.pixels[0], PROCESSOR.image(image))


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("value", [False, 0, {}, 7, True, {"path": "a.png"}, [None], [["a.png"]]])
def test_what_is_no_image_is_refused(key, value):
    with pytest.raises(UserError, match="is neither a path nor a list of paths"):
        image_names({key: value, "conversations": []}, "1")


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_record_may_say_that_it_has_no_image(nothing):
    assert image_names({"image": nothing, "images": ["a.png"]}, "1") == ("a.png",)
    assert image_names({"image": nothing}, "1") == ()


def test_every_value_of_a_list_is_a_record(tmp_path):
    path = tmp_path / "odd.json"
    for text in ('[[], {"id": 1}, [[{"id": 2}], {"id": 3}], 4]', '[]\n{"id": 1}', "[{}] [{}]"):
        path.write_text(text)
        if text.endswith("4]"):
            found = JsonRecords.scan(path)
            assert [found[i] for i in range(4)] == json.loads(text)
        else:
            with pytest.raises(UserError, match=r"odd\.json has text after its list"):
                JsonRecords.scan(path)
    path.write_text('{"data": [[], {"id": 1}], "data2": []}')
    assert [*map(JsonRecords.scan(path).__getitem__, range(2))] == [[], {"id": 1}]


@pytest.mark.parametrize("depth", [200, 20_000])
def test_a_deep_record_is_named(tmp_path, depth):
    path = tmp_path / "deep.json"
    path.write_text('[{"id": 1}, {"id": ' + "[" * depth + "]" * depth + "}]")
    with pytest.raises(UserError, match=r"deep\.json: record 1 .*is nested more than 100 deep"):
        JsonRecords.scan(path)[1]


@pytest.mark.parametrize("change", ["cut", "emptied", "shifted", "touched", "removed"])
def test_a_file_that_changes_ends_the_run(tmp_path, change):
    lines = write_lines(tmp_path / "lines.jsonl", [{"id": i} for i in range(3)])
    source = LlavaSource(lines, str(tmp_path))
    path = tmp_path / "lines.jsonl"
    text = path.read_text()
    changed = {"cut": text[:20], "emptied": "", "shifted": " " + text, "touched": text}
    if change == "removed":
        path.unlink()
    else:
        path.write_text(changed[change])
        os.utime(path, (1, 1))  # another time, however short this test is
    message = "cannot be read any more" if change == "removed" else "has changed while it was in"
    with pytest.raises(UserError, match=rf"lines\.jsonl {message}"):
        # Not one of many bad samples, which are skipped.
        next(make_iterator(source, PROCESSOR, batch_size=1, max_seq_len=9, on_bad_sample="skip"))
