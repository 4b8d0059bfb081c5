"""Questions of a conversation, each by itself on the shared image: what each would be alone."""

import json

import jax
import numpy as np
import pytest
from tiny_tokenizers import KINDS

from moresjax.core.errors import UserError
from moresjax.core.layout import RowStructure, TokenKind, loss_mask
from moresjax.core.row import Row
from moresjax.data.arrayrecord import ArrayRecordSource, convert_llava
from moresjax.data.check import check_data
from moresjax.data.images import ImageProcessor
from moresjax.data.llava import LlavaSource, independent_turns, to_sample
from moresjax.data.pipeline import make_iterator, structure_for
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample, Turn
from moresjax.data.templates import TEMPLATES, get_template
from moresjax.evaluation.validation import validation_task
from moresjax.reports.samples import sample_text, show_sample
from moresjax.testing.llava_files import SIDE, VISUAL, conversation, make_images, write_lines
from moresjax.testing.models import randomised_tuning, tiny_model
from moresjax.training.objectives import next_token
from moresjax.tuning.selectors import parse_selector

ASKED = ("How many dogs?", "Two dogs", " What is in\nthe image? ", "a mat.", "Who?", "A cat")
PROCESSORS = {
    (kind, name): Processor(tokenizer, get_template(name), ImageProcessor(SIDE), VISUAL)
    for kind, tokenizer in KINDS.items()
    for name in TEMPLATES
    if name != "plain"
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> LlavaSource:
    """Nine conversations of three questions with an image, one with two, and one of text."""
    folder = tmp_path_factory.mktemp("turns")
    names = make_images(folder, 10)
    opened = f"<image>\n{ASKED[0]}", *ASKED[1:]
    records = [{"image": name, "conversations": conversation(*opened)} for name in names[:9]]
    pair = f"<image> <image>{ASKED[0]}", *ASKED[1:]
    records.append({"image": names[:2], "conversations": conversation(*pair)})
    records.append({"conversations": conversation(*ASKED)})
    return LlavaSource(write_lines(folder / "a.jsonl", records), str(folder), turns="independent")


def asked_alone(sample: Sample) -> list[Sample]:
    """Every question of a sample as the only one of its conversation."""
    questions = [(sample.context + (turn.question or ""), turn.answer) for turn in sample.turns]
    return [
        Sample(f"{sample.id}/{number}", (Turn(*turn),), sample.images, system=sample.system)
        for number, turn in enumerate(questions)
    ]


def seen_by(row: Row, branch: int, document: int = 0) -> np.ndarray:
    """The columns that a branch sees: its trunk and itself."""
    own = (row.branch == 0) | (row.branch == branch)
    return np.flatnonzero(own & (row.document == document) & (row.kind != TokenKind.PAD))


@pytest.mark.parametrize(("kind", "template"), PROCESSORS)
def test_a_branch_has_the_tokens_of_the_question_alone(source, kind, template):
    processor = PROCESSORS[kind, template]
    for number in (0, 9):
        sample = source[number]
        row = processor.text_row(sample)
        assert row.branch.max() == 3
        assert processor.count_images(row) == len(sample.images)
        for branch, alone in enumerate(map(processor.text_row, asked_alone(sample)), 1):
            own = seen_by(row, branch)
            for name in ("tokens", "kind", "image", "position"):
                np.testing.assert_array_equal(getattr(row, name)[own], getattr(alone, name))


def test_the_question_alone_is_what_llava_would_write(source):
    record, name = source.record(0)
    rounds = record["conversations"]
    for number, alone in enumerate(asked_alone(source[0])):
        question, answer = (dict(item) for item in rounds[2 * number : 2 * number + 2])
        question["value"] = f"<image>\n{question['value'].removeprefix('<image>')}"
        sample = to_sample({"conversations": [question, answer]}, name, alone.images)
        assert sample.turns == alone.turns
    assert [one.turns[0].question for one in asked_alone(source[9])] == [
        f"<image> <image>\n{question.strip()}" for question in ASKED[::2]
    ]


def test_other_sources_may_leave_a_line_behind_the_image():
    turns = (Turn("How many dogs?", "Two"), Turn("Who?", "A cat"))
    sample = Sample("own", turns, (np.zeros((4, 4, 3), np.uint8),), "<image>\n", independent=True)
    processor = PROCESSORS["sentencepiece with bos", "vicuna_v1"]
    row = processor.text_row(sample)
    for branch, alone in enumerate(map(processor.text_row, asked_alone(sample)), 1):
        np.testing.assert_array_equal(row.tokens[seen_by(row, branch)], alone.tokens)


def test_what_shares_no_image_stays_a_dialogue(source):
    sample = source[10]
    assert not sample.independent
    assert [turn.question for turn in sample.turns] == list(ASKED[::2])
    one = Sample("one", (Turn("<image>\nWho?", "A cat"),), ("a.png",))
    assert independent_turns(one) is one


@pytest.mark.parametrize("first", ["who is <image> and <image> ?", "<image> is not <image>"])
def test_images_amid_the_text_are_refused(first):
    sample = to_sample({"conversations": conversation(first, "a", "b", "c")}, "s-7", ["a", "b"])
    with pytest.raises(UserError, match="sample s-7: turns=independent needs all <image> before"):
        independent_turns(sample)
    later = to_sample({"conversations": conversation("a", "b", "<image>", "d")}, "s-7", ["a"])
    with pytest.raises(UserError, match="sample s-7: turns=independent"):
        independent_turns(later)


def test_an_unknown_choice_is_refused(source):
    with pytest.raises(UserError, match=r"unknown turns 'alone'; choose from: dialogue, indep"):
        LlavaSource(source.files, source.image_root, turns="alone")


# ---- Batches and the model.

TUNING = (
    "mores:rank=1,positions=image:f2+l3/loreft:rank=1,positions=prompt:f3+l2/"
    "noreft:rank=1,positions=question:f2+l1|answer:l1/consreft:rank=1,positions=all:f2"
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return PROCESSORS["sentencepiece with bos", "mistral"]


def first_batch(source, processor, batching):
    """The first batch of the source, and the ids of the samples of each row."""
    options = {"batch_size": 2, "images_per_row": 3, "batching": batching, "pack_window": 4}
    stacked = next(make_iterator(source, processor, max_seq_len=180, buckets=(180,), **options))
    return stacked, [str(name).split(";") for name in stacked.pop("id")]


@pytest.mark.parametrize("batching", ["pad", "bucket"])
def test_batches_hold_the_rows_of_the_samples(source, processor, batching):
    assert structure_for(source, batching) == RowStructure.ANY
    rows = {(sample := source[i]).id: processor.row(sample) for i in range(len(source))}
    stacked, ids = first_batch(source, processor, batching)
    for number, (name,) in enumerate(ids):
        for field, values in processor.pad(rows[name], 180, 3).to_dict().items():
            np.testing.assert_array_equal(stacked[field][number], values)


def test_logits_and_loss_are_those_of_the_questions_alone(source, processor):
    alone = {}
    for sample in (source[number] for number in range(len(source))):
        each = asked_alone(sample) if sample.independent else [sample]
        alone[sample.id] = [processor.row(one) for one in each]
    stacked, ids = first_batch(source, processor, "pack")
    batch = processor.to_batch(stacked)
    questions = [row for names in ids for name in names for row in alone[name]]
    single = processor.batch([processor.pad(row, 180, 2) for row in questions])

    tiny = {"vocab_size": len(processor.tokenizer), "num_layers": 2}
    model = randomised_tuning(tiny_model(TUNING, **tiny))
    run = jax.jit(lambda b: (model.llm.logits(model(b).hidden), next_token(model, b)))
    (logits, loss), (expected, expected_loss) = run(batch), run(single)
    labels, own_labels = (np.asarray(loss_mask(b.layout)) for b in (batch, single))
    place = 0
    for number, names in enumerate(ids):
        row = Row(**{k: stacked[k][number] for k in Row.text(()).fields})
        for document, name in enumerate(names):
            for branch, question in enumerate(alone[name], 1):
                own, size = seen_by(row, branch, document), len(question)
                np.testing.assert_allclose(
                    logits[number][own], expected[place][:size], atol=1e-5, rtol=0
                )
                np.testing.assert_array_equal(labels[number, own], own_labels[place, :size])
                place += 1
    assert place == len(questions) > 3
    assert loss.weight == expected_loss.weight == own_labels.sum()
    assert float(loss.total) == pytest.approx(float(expected_loss.total), rel=1e-5)


SELECTORS = ("image:f2+l3", "prompt:f3+l2", "question:50%", "all:f4", "answer")


@pytest.mark.parametrize("text", SELECTORS)
def test_selected_tokens_are_those_of_the_questions_alone(source, processor, text):
    sample, select = source[0], parse_selector(text)
    row = processor.text_row(sample)
    mask = np.asarray(select(processor.batch([row]).layout))[0]
    for branch, alone in enumerate(map(processor.text_row, asked_alone(sample)), 1):
        expected = np.asarray(select(processor.batch([alone]).layout))[0]
        np.testing.assert_array_equal(mask[seen_by(row, branch)], expected)


# ---- Where samples are read, shown, checked and converted.


def test_shards_hold_the_same(source, tmp_path):
    convert_llava(source, tmp_path / "records", shards=2, progress=False)
    processor = PROCESSORS["byte level", "chatml"]
    shards = ArrayRecordSource(str(tmp_path / "records"), turns="independent")
    for number in (0, 9, 10):
        ours, theirs = processor.row(shards[number]), processor.row(source[number])
        for name, values in theirs.to_dict().items():
            np.testing.assert_array_equal(ours.to_dict()[name], values)
    with pytest.raises(UserError, match="unknown turns"):
        ArrayRecordSource(str(tmp_path / "records"), turns="alone")


def test_samples_are_checked_and_shown_as_branches(source, processor):
    options = {"max_seq_len": 300, "images_per_row": 2, "num_workers": 1, "progress": False}
    report = check_data(source, lambda: processor, **options)
    rows = [processor.text_row(source[number]) for number in range(len(source))]
    assert (report.bad, report.images, report.text_only) == ({}, 11, 1)
    assert report.tokens == sum(map(len, rows))
    text = sample_text(show_sample(source[0], processor), processor)
    assert [line.split()[:2] for line in text.splitlines() if "QUESTION" in line] == [
        ["QUESTION", str(branch)] for branch in (1, 2, 3)
    ]


def test_every_question_is_validation_data(source, tmp_path):
    data = {"name": "llava", "files": source.files, "image_root": source.image_root}
    config = {"data": data, "validation": {"data": data | {"turns": "independent"}}}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = validation_task([tmp_path], limit=4)
    assert [example.prompt for example in task.examples[:3]] == [
        f"<image>\n{question.strip()}" for question in ASKED[::2]
    ]
    assert [example.answer for example in task.examples[:3]] == list(ASKED[1::2])
