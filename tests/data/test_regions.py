"""Boxes and marks from samples to rows: hand-made cases with padding, crops and merged tokens."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from transformers import CLIPImageProcessorPil

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.data.check import check_data
from moresjax.data.images import ImageProcessor
from moresjax.data.llava import LlavaSource, independent_turns, to_sample
from moresjax.data.pipeline import make_iterator
from moresjax.data.region_providers import region_provider
from moresjax.data.regions import EVERYWHERE, find_regions, tokens_inside
from moresjax.data.samples import IMAGE_MARK, Mark, Sample, Turn, find_marks, find_words
from moresjax.models.fusion import FusedVisionConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.runs.processor import serving
from moresjax.testing.models import (
    TINY_VISION,
    digits_processor,
    randomised_tuning,
    tiny_config,
    tiny_model,
)
from moresjax.training.objectives import next_token
from moresjax.tuning.selectors import parse_selector

QUESTION = f"{IMAGE_MARK}\nis there a two ?"


def processor_for(*selectors, config=None, **changes):
    """The processor of a model with these selectors: 3 x 3 patches."""
    processor = dataclasses.replace(digits_processor(), **changes)
    return serving(processor, [parse_selector(s) for s in selectors], config or tiny_config())


def image(height=12, width=12):
    return np.zeros((height, width, 3), np.uint8)


def grid(processor, boxes, pixels):
    sample = Sample("one", (Turn(QUESTION),), (pixels,), roi=(boxes,))
    return processor.row(sample).roi[0].reshape(3, 3).astype(int).tolist()


def test_a_patch_is_inside_when_its_centre_is():
    processor = processor_for("roi")
    # Centres are at 1/6, 1/2 and 5/6.
    assert grid(processor, ((0.0, 0.0, 0.5, 1.0),), image()) == [[1, 0, 0]] * 3
    assert grid(processor, ((0.4, 0.4, 1.0, 0.6),), image()) == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    # Several boxes are joined; one between all centres has the nearest patch; no box, no patch.
    both = ((0.0, 0.0, 0.2, 0.2), (0.9, 0.9, 1.0, 1.0))
    assert grid(processor, both, image()) == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert grid(processor, (), image()) == [[0, 0, 0]] * 3
    assert grid(processor, (EVERYWHERE,), image()) == [[1, 1, 1]] * 3


def test_boxes_go_through_padding_and_crops():
    wide, whole = image(4, 12), ((0.0, 0.0, 1.0, 1.0),)
    squeezed = processor_for("roi")
    assert grid(squeezed, whole, wide) == [[1, 1, 1]] * 3
    padded = processor_for("roi", image=ImageProcessor(12, aspect="pad"))
    assert grid(padded, whole, wide) == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert grid(padded, ((0.0, 0.4, 1.0, 1.0),), image(12, 4)) == [[0, 0, 0]] + [[0, 1, 0]] * 2
    assert grid(padded, (EVERYWHERE,), wide) == [[1, 1, 1]] * 3


@pytest.mark.parametrize(
    ("short", "box", "patches"),
    [
        # Scaled to 24 x 12 pixels, of which the crop takes 6 to 18: patches have their centres at
        # 1/3, 1/2 and 2/3 of the image's width, at 1/6, 1/2 and 5/6 of its height.
        (12, (0.45, 0.0, 1.0, 0.6), [[0, 1, 1], [0, 1, 1], [0, 0, 0]]),
        (12, (0.0, 0.4, 0.4, 1.0), [[0, 0, 0], [1, 0, 0], [1, 0, 0]]),
        # Scaled to 12 x 6, which the crop surrounds by 3 pixels above and below.
        (6, (0.4, 0.0, 1.0, 1.0), [[0, 0, 0], [0, 1, 1], [0, 0, 0]]),
    ],
)
def test_boxes_go_through_scaling_and_the_centre_crop(short, box, patches):
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": short}, crop_size={"height": 12, "width": 12}
    )
    cropped = processor_for("roi", image=ImageProcessor(12, reference=reference))
    pixels, (x0, y0, x1, y1) = image(60, 120), box
    assert grid(cropped, (box,), pixels) == patches
    # What the encoder sees at the centres of the patches says the same.
    pixels[round(60 * y0) : round(60 * y1), round(120 * x0) : round(120 * x1)] = 255
    seen = cropped.image(pixels)[2::4, 2::4, 0]
    assert (seen > 0).astype(int).tolist() == patches


def test_a_box_that_the_crop_takes_away_has_the_nearest_patch():
    reference = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=12)
    cropped = processor_for("roi", image=ImageProcessor(12, reference=reference))
    left = [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert grid(cropped, ((0.0, 0.8, 0.2, 1.0),), image(60, 120)) == left


def test_tokens_have_the_places_of_their_patches():
    """Class tokens have none, a dropped token is no token, and two encoders see the same places."""
    with_class = VisionConfig(**TINY_VISION, class_token=True, select="cls_patch")
    centres = with_class.token_centres()
    assert len(centres) == 10
    assert np.isnan(centres[0]).all()
    np.testing.assert_allclose(centres[2], [0.5, 1 / 6])
    dropped = VisionConfig(**TINY_VISION, drop_first_token=True).token_centres()
    np.testing.assert_allclose(dropped[0], [0.5, 1 / 6])
    # 13 pixels hold three patches of four; the last pixel belongs to none.
    uneven = VisionConfig(**(TINY_VISION | {"image_size": 13})).token_centres()
    np.testing.assert_allclose(uneven[-1], [10 / 13, 10 / 13])
    pair = FusedVisionConfig(encoders=[VisionConfig(**TINY_VISION)] * 2)
    config = MLLMConfig(llm=tiny_config().llm, vision=pair, connector="mof_mlp")
    np.testing.assert_allclose(config.visual_token_centres()[5], [5 / 6, 1 / 6])
    assert tokens_inside([(0.0, 0.0, 1.0, 1.0)], centres).tolist() == [False] + [True] * 9


def marked(row, name, processor):
    bit = processor.marks.index(name)
    return [processor.tokenizer.decode([t]) for t in row.tokens[(row.marks >> bit) & 1 == 1]]


def test_words_and_marks_are_the_tokens_of_their_characters():
    processor = processor_for("word(2)|mark(number)", "image")
    assert processor.marks == ("mark(number)", "word(2)")
    marks = find_marks({"number": "two"}, [QUESTION], "sample 1")
    assert marks == (Mark("number", 0, 19, 22),)
    row = processor.row(Sample("one", (Turn(QUESTION, "yes"),), (image(),), marks=marks))
    assert marked(row, "mark(number)", processor) == ["two"]
    assert marked(row, "word(2)", processor) == ["there"]
    assert (row.marks > 0).sum() == 2
    # Words go without punctuation at their ends, and an image is none.
    text = f"what's {IMAGE_MARK} 'it', then ?"
    assert [text[a:b] for a, b in find_words(text)] == ["what's", "it", "then"]


def test_a_word_has_all_of_its_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {x: n for n, x in enumerate(["<unk>", "is", "it", "an", "ele", "##phant", "?"])}
    backend = Tokenizer(models.WordPiece(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    processor = processor_for("word(4)", tokenizer=tokenizer)
    row = processor.row(Sample("one", (Turn("is it an elephant?"), Turn("an it is it ?"))))
    found = tokenizer.convert_ids_to_tokens(row.tokens[row.marks == 1])
    assert found == ["ele", "##phant", "it"]  # at each question


def test_rows_keep_regions_and_marks():
    processor = processor_for("roi", "mark(number)")
    turns, marks = (Turn(QUESTION, "yes"),), (Mark("number", 0, 19, 22),)
    left = Sample("a", turns, (image(),), roi=(((0.0, 0.0, 0.5, 1.0),),), marks=marks)
    right = dataclasses.replace(left, id="b", roi=(((0.5, 0.0, 1.0, 1.0),),))
    a, b = processor.row(left), processor.row(right)
    joined = processor.join([a, b])
    np.testing.assert_array_equal(joined.marks, np.concatenate([a.marks, b.marks]))
    np.testing.assert_array_equal(joined.roi, np.concatenate([a.roi, b.roi]))
    longer = a.append([5, 6])
    assert longer.marks[-2:].tolist() == [0, 0]
    assert longer[:-2].marks.tolist() == a.marks.tolist()
    batch = processor.batch([processor.pad(row, 64, 3) for row in (a, joined)])
    assert batch.roi.shape == (2, 27)
    assert batch.roi[0].tolist() == [*a.roi[0].tolist(), *[False] * 18]
    assert batch.marks.shape == batch.tokens.shape
    # Rows that differ in marks or regions do not begin alike.
    other = a.replace(marks=np.zeros_like(a.marks))
    assert a.common_prefix(other) == np.flatnonzero(a.marks)[0]
    assert a.common_prefix(a.replace(marks=None)) == np.flatnonzero(a.marks)[0]
    assert a.region_key != b.region_key
    # Text alone, and padding, go with them.
    text = processor.row(Sample("c", (Turn("two ?"),), marks=(Mark("number", 0, 0, 3),)))
    batch = processor.batch([processor.pad(r, 64, 1) for r in (a, text, Row.text(()))])
    assert not batch.roi[1:].any()
    # Without such selectors there is nothing.
    plain = digits_processor()
    batch = plain.batch([plain.pad(plain.row(left), 64, 1)])
    assert batch.roi is None
    assert batch.marks is None


class Mix:
    """Samples in memory: with one image or two, with boxes and marks, or text alone."""

    branches = False

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.samples = []
        for number in range(12):
            count = number % 3
            text = IMAGE_MARK * count + " is there a two ? how many ?"
            left, top = rng.random(2) / 2
            box = (float(left), float(top), float(left) + 0.3, float(top) + 0.4)
            images = tuple(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8) for _ in range(count))
            marks = find_marks({"n": ["two", "many"][number % 2]}, [text], "x")
            roi = ((box,), ())[:count]
            turns = (Turn(text, "yes ." if number % 4 else "no . it is three ."),)
            self.samples.append(Sample(str(number), turns, images, roi=roi, marks=marks))

    @property
    def sizes(self):
        return np.asarray([[9, len(sample.images)] for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number):
        return self.samples[number]


@pytest.mark.parametrize("batching", ["pad", "pack", "bucket"])
def test_batches_hold_the_regions_and_marks_of_every_sample(batching):
    source, processor = Mix(), processor_for("roi", "mark(n)|word(2)")
    alone = {sample.id: processor.row(sample) for sample in source.samples}
    options = {"batch_size": 3, "max_seq_len": 64, "images_per_row": 4, "pack_window": 12}
    seen, batches = set(), make_iterator(source, processor, batching=batching, **options)
    for _ in range(5):  # buckets keep samples with images apart
        stacked = next(batches)
        for row, names in enumerate(stacked["id"]):
            images = 0
            for number, name in enumerate(filter(None, names.split(";"))):
                own = alone[name]
                chosen = (stacked["document"][row] == number) & (stacked["kind"][row] > 0)
                np.testing.assert_array_equal(stacked["marks"][row][chosen], own.marks)
                assert set(own.marks.tolist()) >= {1, 2}
                if own.num_images:
                    found = stacked["roi"][row][images : images + own.num_images]
                    np.testing.assert_array_equal(found, own.roi)
                    assert found.any()
                images += own.num_images
                seen.add(name)
            assert not stacked["roi"][row][images:].any()
        batch = processor.to_batch(stacked)
        assert batch.roi.shape == (3, stacked["roi"].shape[1] * 9)
    assert len(seen) == 12


def test_packed_samples_train_as_they_do_alone():
    source, processor = Mix(), processor_for("roi", "mark(n)|word(2)")
    spec = (
        "loreft:site=vision.block.out,rank=1,positions=roi/"
        "loreft:rank=1,positions=roi|mark(n)|word(2)"
    )
    model = randomised_tuning(tiny_model(spec, vocab_size=37, num_layers=2))
    rows = [processor.row(sample) for sample in source.samples[:3]]
    loss = nnx.jit(next_token)
    apart = loss(model, processor.batch([processor.pad(row, 72, 2) for row in rows]))
    packed = loss(model, processor.batch([processor.pad(processor.join(rows), 72, 3)]))
    np.testing.assert_allclose(packed.total, apart.total, rtol=1e-5)
    # The regions and marks take part in it.
    bare = [row.replace(marks=np.zeros_like(row.marks)) for row in rows]
    other = loss(model, processor.batch([processor.pad(row, 72, 2) for row in bare]))
    assert abs(float(other.total - apart.total)) > 1e-4


RECORD = {
    "id": "1",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": f"is there a two ? {IMAGE_MARK}"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "  how many ?"},
        {"from": "gpt", "value": "one"},
    ],
    "roi": [0, 0, 0.5, 1],
    "marks": {"number": "two", "verb": [0, 2], "last": [[1, 6, 10]]},
}


def texts_of(sample):
    return {m.name: (sample.turns[m.turn].question or "")[m.start : m.end] for m in sample.marks}


def test_llava_files_have_boxes_and_marks(tmp_path):
    sample = to_sample(RECORD, "1", ["a.png"])
    assert sample.roi == (((0.0, 0.0, 0.5, 1.0),),)
    expected = {"number": "two", "verb": "is", "last": "many"}
    # The image moved to the front, and blanks went.
    assert texts_of(sample) == expected
    assert texts_of(independent_turns(sample)) == expected
    Image.fromarray(image()).save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps([RECORD]))
    source = LlavaSource(str(tmp_path / "data.json"), str(tmp_path))
    assert source[0].marks == sample.marks
    from moresjax.data.arrayrecord import ArrayRecordSource, convert_llava

    convert_llava(source, tmp_path / "shards", shards=1, progress=False)
    stored = ArrayRecordSource(str(tmp_path / "shards"))[0]
    assert (stored.roi, stored.marks) == (sample.roi, sample.marks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roi": [0, 0, 1.5, 1]}, r"sample 1: the box \(0, 0, 1.5, 1\) must lie in the image"),
        ({"roi": [0.5, 0, 0.5, 1]}, "must lie in the image"),
        ({"roi": [[0, 0, 1]]}, "a box of a region is x0, y0, x1, y1"),
        ({"roi": "left"}, "a region must be a box or a list of boxes, got left"),
        ({"roi": [[[0, 0, 1, 1]], None]}, "regions of 2 images are given, but it has 1"),
        ({"marks": {"number": "nine"}}, "mark 'number' is not in the text: no question has 'nine'"),
        ({"marks": {"number": "image"}}, "is not in the text: no question has 'image'"),
        ({"marks": {"number": [0, 99]}}, "mark 'number' is not in the text: characters 0 to 99"),
        ({"marks": {"number": [7, 0, 1]}}, "mark 'number' is of turn 7, but there are 2"),
        ({"marks": {"number": 3}}, "must be a piece of the text"),
        ({"marks": ["two"]}, "marks must be pieces of text by name"),
    ],
)
def test_bad_regions_and_marks_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        to_sample(RECORD | changes, "1", ["a.png"])


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("roi", "sample one: the tuning acts on a region of interest .* give boxes"),
        ("mark(number)", r"sample one: the tuning acts on mark\(number\), but nothing is marked"),
        ("word(5)", "sample one: the tuning acts on word 5 of a question, but .* has 4"),
    ],
)
def test_what_a_selector_needs_and_a_sample_does_not_say_is_told(selector, message):
    sample = Sample("one", (Turn(QUESTION),), (image(),))
    with pytest.raises(UserError, match=message):
        processor_for(selector).row(sample)


def test_data_with_regions_may_have_text_without_images():
    turns = (Turn("is there a two ?", "yes"),)
    asked = Sample("image", (Turn(QUESTION, "yes"),), (image(),), roi=((),))
    processor = processor_for("roi")
    assert processor.roi(Sample("text", turns)) is None
    report = check_data(
        [Sample("text", turns), asked, dataclasses.replace(asked, roi=None)],
        lambda: processor,
        max_seq_len=40,
        images_per_row=1,
        num_workers=1,
        progress=False,
    )
    assert list(report.bad) == [2]


def test_regions_are_read_as_people_write_them():
    box = (0.0, 0.0, 0.5, 1.0)
    assert find_regions(box, 1, "x") == find_regions([box], 1, "x") == ((box,),)
    assert find_regions([[box, box]], 1, "x") == ((box, box),)
    assert find_regions([], 1, "x") == ((),)
    assert find_regions([[box], None], 2, "x") == ((box,), None)
    with pytest.raises(UserError, match="of 1 images are given, but it has 2"):
        find_regions(box, 2, "x")


def test_providers_give_the_same_boxes_every_time():
    own = ((0.1, 0.2, 0.4, 0.6),)
    sample = Sample("one", (Turn(IMAGE_MARK * 2),), (image(), image()), roi=(own, None))

    def regions(text, given=sample):
        return region_provider(text)(given).roi

    assert region_provider("boxes")(sample) is sample
    assert regions("all") == ((EVERYWHERE,),) * 2
    assert regions("center(50%)") == (((0.25, 0.25, 0.75, 0.75),),) * 2
    np.testing.assert_allclose(regions("center")[0][0], (0.2, 0.2, 0.8, 0.8))
    assert regions("0,0,.5,1;0.5,0.5,1,1")[1] == ((0.0, 0.0, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0))
    with pytest.raises(UserError, match="moves the boxes of samples, and this one has none"):
        regions("random")
    whole = dataclasses.replace(sample, roi=(own, own))
    first, second = regions("random", whole)
    assert first != second  # each image has its own
    for (x0, y0, x1, y1), *_ in (first, second):
        np.testing.assert_allclose((x1 - x0, y1 - y0), (0.3, 0.4))
    assert regions("random", whole) == (first, second)
    assert regions("random(50%)") != regions("random(50%)", dataclasses.replace(sample, id="two"))
    # A provider goes before what a sample says, and the processor of a run has one.
    processor = dataclasses.replace(processor_for("roi"), regions=region_provider("all"))
    assert processor.row(sample).roi.all()
    for text in ("center(0%)", "random(101%)", "0,0,2,1"):
        with pytest.raises(UserError, match=r"above 0 and up to 100 %|must lie in the image"):
            region_provider(text)
    with pytest.raises(UserError, match="'middle'"):
        region_provider("middle")


def test_a_cell_of_a_grid_is_moved_to_another_cell():
    cell, places = (0.5, 0.25, 1.0, 0.5), set()
    for name in range(60):
        x0, y0, x1, y1 = region_provider("random").boxes_of(str(name), 0, (cell,))[0]
        assert (x1 - x0, y1 - y0) == (0.5, 0.25)
        places.add((x0, y0))
    assert len(places) == 8


def test_regions_from_a_file(tmp_path):
    file = tmp_path / "regions.json"
    file.write_text(json.dumps({"one": [0, 0, 0.5, 0.5], "two": [], "bad": [[0, 0, 2, 0.5]]}))
    provider, sample = region_provider(str(file)), Sample("one", (Turn(IMAGE_MARK),), (image(),))
    assert provider(sample).roi == (((0.0, 0.0, 0.5, 0.5),),)
    assert provider(dataclasses.replace(sample, id="two:target")).roi == ((),)
    for name, message in (("none", "has no boxes of sample 'none'"), ("bad", "must lie in the")):
        with pytest.raises(UserError, match=message):
            provider(dataclasses.replace(sample, id=name))
    with pytest.raises(UserError, match="does not exist"):
        region_provider(str(tmp_path / "other.json"))
    for text, message in (("[", "is not JSON"), ("[]", "expected `object`, got `array`")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            region_provider(str(file))
