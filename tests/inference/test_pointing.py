"""Regions and marks of prompts: generation, scores, logits, states, files and prefix caches."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import moresjax as mj
from moresjax.core.errors import UserError
from moresjax.data.llava import LlavaSource
from moresjax.data.region_providers import region_provider
from moresjax.data.samples import Mark, Sample, Turn
from moresjax.evaluation.run import evaluate
from moresjax.generation import programs
from moresjax.generation.config import EngineConfig
from moresjax.inference.analyze import attention_map
from moresjax.inference.chat import Chat
from moresjax.inference.files import generate_file
from moresjax.inference.prompt_inputs import asked_sample
from moresjax.inference.regions import attended_regions
from moresjax.inference.steering import with_part, with_steering
from moresjax.testing.models import talking_model

ALWAYS = EngineConfig(min_saved_tokens=1)
SPEC = (
    "loreft:site=vision.block.out,rank=2,positions=roi/loreft:rank=2,positions=roi|mark(n)|word(3)"
)
IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
TWO, THERE = {"n": "two"}, {"n": "there"}
QUESTION = "is there a two ?"
# Questions about one image that begin alike and differ in their regions or marks.
ASKED = [(LEFT, TWO), (RIGHT, TWO), (LEFT, TWO), (RIGHT, THERE), ([], TWO)]


@pytest.fixture(scope="module")
def model():
    return talking_model(SPEC)


def logits(model, roi, marks):
    return np.asarray(model.logits(QUESTION, IMAGE, roi=roi, marks=marks))


def test_every_region_and_mark_gives_other_logits(model):
    found = [logits(model, roi, marks) for roi, marks in ASKED]
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            assert np.array_equal(one, other) == ((i, j) == (2, 0))
    together = model.logits(
        [QUESTION] * 5, [IMAGE] * 5, roi=[r for r, _ in ASKED], marks=[m for _, m in ASKED]
    )
    np.testing.assert_allclose(together, np.concatenate(found), atol=2e-4)
    # `all` is the whole image, and a provider is named for all prompts.
    whole = np.asarray(model.logits([QUESTION], [IMAGE], roi="all", marks=TWO))
    np.testing.assert_array_equal(whole, logits(model, (0, 0, 1, 1), TWO))


def test_shared_prefixes_are_those_of_one_region_and_the_same_marks(model):
    texts, images = [QUESTION] * 5, [IMAGE] * 5
    pointing = {"roi": [r for r, _ in ASKED], "marks": [m for _, m in ASKED]}
    alone = [
        model.generate(QUESTION, IMAGE, roi=roi, marks=marks, max_new_tokens=4)
        for roi, marks in ASKED
    ]
    assert len(set(alone)) > 1
    scores = model.score(texts, [["yes", "no"]] * 5, images, **pointing)
    config, model.service.config = model.service.config, ALWAYS
    read = programs.read_prefix._cache_size()
    options = {"max_new_tokens": 4, "batch_size": 4}
    assert model.generate(texts, images, **pointing, **options) == alone
    again = model.score(texts, [["yes", "no"]] * 5, images, **pointing)
    model.service.config = config
    assert programs.read_prefix._cache_size() > read
    for one, other in zip(scores, again, strict=True):
        np.testing.assert_allclose([x.logprob for x in one], [x.logprob for x in other], atol=1e-3)
    assert len({round(pair[0].logprob) for pair in scores}) == 3


def test_files_of_prompts_and_items_have_regions_and_marks(model, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    record = {"prompt": QUESTION, "images": ["a.png"], "roi": LEFT, "marks": TWO}
    said = {"conversations": [{"from": "human", "value": f"{QUESTION}\n<image>"}], "image": "a.png"}
    lines = [record, said | {"roi": LEFT, "marks": TWO}, record | {"roi": None}]
    lines += [record | {"marks": {"n": "nine"}}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    counts = generate_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", max_new_tokens=4)
    first, second, third, fourth = map(json.loads, (tmp_path / "out.jsonl").open())
    text = model.generate(QUESTION, IMAGE, roi=LEFT, marks=TWO, max_new_tokens=4)
    assert first["text"] == second["text"] == text
    assert "nothing is said of it" in third["error"]
    assert "no question has 'nine'" in fourth["error"]
    assert counts == {"records": 4, "errors": 2}
    items = [
        {"prompt": QUESTION, "images": IMAGE, "roi": roi, "marks": marks} for roi, marks in ASKED
    ]
    states = model.states(items, site="llm.block.out", layers=1, max_new_tokens=2).matrix()
    np.testing.assert_allclose(states[0], states[2], atol=1e-5)
    assert np.abs(states[0] - states[1]).max() > 1e-3


def test_what_a_selector_wants_and_a_call_does_not_say_is_told(model):
    with pytest.raises(UserError, match="prompt 0: the tuning acts on a region of interest"):
        model.generate(QUESTION, IMAGE, marks=TWO)
    with pytest.raises(UserError, match=r"prompt 0: the tuning acts on mark\(n\), but nothing is"):
        model.generate(QUESTION, IMAGE, roi=LEFT)
    with pytest.raises(UserError, match=r"acts on word 3 of a question, but 'two \?' has 1"):
        model.generate("two ?", IMAGE, roi=LEFT, marks=TWO)
    with pytest.raises(UserError, match="2 prompts need a list with the regions of each"):
        model.generate([QUESTION] * 2, [IMAGE] * 2, roi=[LEFT], marks=TWO)
    with pytest.raises(UserError, match="2 prompts need a list with the marks of each"):
        model.generate([QUESTION] * 2, [IMAGE] * 2, roi="all", marks=[TWO])
    with pytest.raises(UserError, match=r"roi 'middle'.*'center\(P%\)'|roi.*center"):
        model.generate(QUESTION, IMAGE, roi="middle", marks=TWO)
    with pytest.raises(UserError, match="needs a batch with"):
        model.logits(input_ids=[[1, 5, 6]])
    assert asked_sample("x", QUESTION, (IMAGE,), marks=TWO).marks[0].start == 19


def test_a_chat_has_regions_and_marks_at_every_turn(model, tmp_path):
    """What it says is what the model says to the whole conversation, also once it is saved."""
    chat = Chat(model, max_new_tokens=3)
    first = "".join(chat.ask(QUESTION, IMAGE, roi=LEFT, marks=TWO))
    assert first == model.generate(QUESTION, IMAGE, roi=LEFT, marks=TWO, max_new_tokens=3)
    second = "".join(chat.ask("how many two ?", IMAGE, roi=RIGHT, marks={"n": "many"}))
    turns = (Turn(f"<image>\n{QUESTION}", first), Turn("<image>\nhow many two ?"))
    marks = (Mark("n", 0, 19, 22), Mark("n", 1, 12, 16))
    asked = Sample("all", turns, (IMAGE,) * 2, roi=((LEFT,), (RIGHT,)), marks=marks)
    (done,) = model.service.complete([model.processor.row(asked)], 3)
    assert second == model.prompts.text(done.tokens)
    (file,) = [chat.save(tmp_path / "talk.json")]
    (again,) = LlavaSource(str(file), str(tmp_path))
    assert (again.roi, again.marks) == (asked.roi, asked.marks)
    row, whole = (model.processor.row(sample) for sample in (again, asked))
    np.testing.assert_array_equal(row.roi, whole.roi)
    np.testing.assert_array_equal(row.marks[: len(whole)], whole.marks)


def test_a_chat_keeps_the_regions_that_its_processor_gave(tmp_path):
    """Random boxes stay where they were at later turns, and one turn may have its own."""
    model = talking_model("noreft:rank=2,positions=roi")
    regions = region_provider("random(40%)")
    model.prompts.saved_processor = dataclasses.replace(model.processor, regions=regions)
    chat = Chat(model, max_new_tokens=1)
    for roi in (None, LEFT, "all"):
        list(chat.ask(QUESTION, IMAGE, roi=roi))
    (sample,) = LlavaSource(str(chat.save(tmp_path / "talk.json")), str(tmp_path))
    drawn = asked_sample("turn 1", QUESTION, (IMAGE,), roi="random(40%)").roi[0]
    assert sample.roi == (drawn, (LEFT,), ((0.0, 0.0, 1.0, 1.0),))


def test_a_chat_has_the_regions_that_the_model_attends_to(model, tmp_path):
    """Of a turn's own images in the whole conversation; earlier ones keep theirs."""
    provider, image = "attention(1;34%)", np.ascontiguousarray(IMAGE[::-1])
    chat = Chat(model, max_new_tokens=3)
    first = "".join(chat.ask(QUESTION, IMAGE, roi=provider, marks=TWO))
    assert first == model.generate(QUESTION, IMAGE, roi=provider, marks=TWO, max_new_tokens=3)
    second = "".join(chat.ask("how many two ?", image, roi=provider, marks=TWO))
    (kept,) = LlavaSource(str(chat.save(tmp_path / "talk.json")), str(tmp_path))
    (own,) = model._attend(asked_sample("x", QUESTION, (IMAGE,)), region_provider(provider)).roi
    turns = (Turn(f"<image>\n{QUESTION}", first), Turn("<image>\nhow many two ?"))
    asked = dataclasses.replace(kept, turns=turns, images=(IMAGE, image))
    looked = model._attend(asked, region_provider(provider)).roi
    assert kept.roi == (own, looked[1])
    (done,) = model.service.complete([model.processor.row(asked)], 3)
    assert second == model.prompts.text(done.tokens)
    list(chat.ask("is there a two ?", marks=TWO))  # without images nothing is asked
    with pytest.raises(UserError, match="the model has layers 0-1"):
        list(chat.ask(QUESTION, IMAGE, roi="attention(2;20%)", marks=TWO))
    assert len(chat.turns) == 3


def test_questions_of_a_benchmark_have_regions_and_marks(model, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    asked = {"image": "a.png", "question": f"  {QUESTION}", "answer": "yes", "roi": LEFT}
    records = [asked | {"marks": {"n": [13, 16]}}, asked | {"marks": TWO}, asked]
    (tmp_path / "own.json").write_text(json.dumps(records))
    result = evaluate(model, [str(tmp_path / "own.json")], batch_size=2, sample=None)
    said = model.generate(QUESTION, IMAGE, roi=LEFT, marks=TWO)
    assert [p["prediction"] for p in result.predictions] == [said] * 2
    (problem,) = result.scores["own"]["errors"].values()
    assert "nothing is marked so" in problem
    (tmp_path / "bad.json").write_text(json.dumps([asked | {"roi": [0, 0, 2, 1]}]))
    with pytest.raises(UserError, match=r"record 0 of .*bad.json: the box .* must lie"):
        evaluate(model, [str(tmp_path / "bad.json")])


def test_a_model_finds_the_patches_that_it_attends_to(model):
    """Of a padded image only patches inside of it, as many as are asked for, in that layer."""
    bare = talking_model()
    said = attention_map(bare, QUESTION, IMAGE, max_new_tokens=1).grid[:, 0]
    for layer, percent, count in ((0, 20, 2), (1, 34, 3)):
        provider = region_provider(f"attention({layer};{percent}%)")
        sample = model._attend(asked_sample("x", QUESTION, (IMAGE,)), provider)
        found = model.processor.roi(sample)[0].reshape(3, 3)
        assert found.sum() == len(sample.roi[0]) == count
        assert said[layer][found].min() >= said[layer][~found].max()
    one = model.logits(QUESTION, IMAGE, roi="attention(1;34%)", marks=TWO)
    boxes = model.logits(QUESTION, IMAGE, roi=[*sample.roi[0]], marks=TWO)
    np.testing.assert_array_equal(one, boxes)
    with pytest.raises(UserError, match="the model has layers 0-1"):
        model.generate(QUESTION, IMAGE, roi="attention(2;20%)", marks=TWO)
    with pytest.raises(UserError, match="asks a model where it looks, which training"):
        model.processor.roi(sample, provider)
    wide = np.random.default_rng(1).integers(0, 255, (4, 12, 3)).astype(np.uint8)
    image = dataclasses.replace(model.processor.image, aspect="pad")
    padded = dataclasses.replace(model.processor, image=image)
    sample = attended_regions(
        model.mllm,
        padded,
        asked_sample("x", QUESTION, (wide,)),
        region_provider("attention(0;99%)"),
    )
    assert padded.roi(sample)[0].reshape(3, 3).tolist() == [[False] * 3, [True] * 3, [False] * 3]


def test_another_tuning_asks_for_other_things():
    model = talking_model("loreft:rank=2,positions=mark(n)")
    assert isinstance(model, mj.Model)
    assert model.processor.marks == ("mark(n)",)
    model.attach("loreft:rank=2,positions=roi")
    assert (model.processor.marks, len(model.processor.centres)) == ((), 9)
    model.attach("none")
    assert (model.processor.marks, model.processor.centres) == ((), ())
    row = model.prompt(QUESTION, IMAGE)
    assert row.roi is None
    assert row.marks is None


def test_a_part_of_a_tuning_or_a_steer_beside_it_asks_for_its_own_things():
    model = talking_model("loreft:rank=2,positions=mark(a)/loreft:rank=2,positions=mark(n)")
    processor = model.processor

    def read(**marks):
        return np.asarray(model.logits(QUESTION, marks=marks))

    with with_part(model, lambda method: method.positions == "mark(n)"):
        np.testing.assert_array_equal(read(a="is", n="two"), read(n="two"))
        assert not np.array_equal(read(n="two"), read(n="there"))
    assert model.processor is processor
    model.attach("none")
    with with_steering(model, "steer:positions=mark(n)") as steer:
        model.set(steer, vector=np.arange(16.0))
        assert not np.array_equal(read(n="two"), read(n="there"))
    assert model.processor.marks == ()
