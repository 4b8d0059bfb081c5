"""Data of control: official files, scenarios, phrasings, regions, rephrasers."""

from collections import Counter

import pytest

from moresjax.core.errors import UserError
from moresjax.data.cifar import CIFAR10_CLASSES
from moresjax.data.control.attributes import SIZES, WORD, attribute_questions
from moresjax.data.control.cases import INDICATOR, NEGATIVE, NOT_SURE, OTHER, OWN, TARGET
from moresjax.data.control.questions import DIGITS, OBJECTS, Marked, find_indicator, word_span
from moresjax.data.control.rephrase import (
    INSTRUCTION,
    RephrasingSource,
    TemplateRephraser,
    rephrase,
)
from moresjax.data.control.source import ControlSource
from moresjax.data.samples import Mark
from moresjax.data.sources import make_source
from moresjax.testing import control_files
from moresjax.testing.benchmark_files import write


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    write(folder, control_files.cifar10() | control_files.textvqa())
    return str(folder)


def marked(sample):
    (mark,) = sample.marks
    return sample.turns[0].question[mark.start : mark.end]


# ---- Questions.


def test_the_indicator_is_the_papers_word():
    assert [phrasing.word for phrasing in OBJECTS.trained] == [5, 8]
    assert [phrasing.word for phrasing in DIGITS.trained] == [4, 3]
    for phrasing in (*OBJECTS.trained, *OBJECTS.paraphrases):
        for name, article in (("cat", "a"), ("airplane", "an")):
            question = phrasing.ask(name)
            assert question.indicator == name
            assert f" {article} {name}" in question.text
            assert question.text.split()[phrasing.word - 1].rstrip("?") == name
            assert question.span == word_span(question.text, phrasing.word)


def test_the_digits_world_has_one_article():
    assert DIGITS.trained[0].ask("eight").text == "is there a eight ?"


@pytest.mark.parametrize("number", [0, 3])
def test_a_word_index_past_the_end_is_one_sentence(number):
    with pytest.raises(UserError, match=f"word {number} is asked for, and 'two words' has 2 words"):
        word_span("two words", number)


# ---- Rephrasers.


@pytest.mark.parametrize("name", ["cat", "airplane", "ice cream"])
def test_the_six_paraphrases_come_back(name):
    rephraser = TemplateRephraser(OBJECTS.trained[0], OBJECTS.paraphrases)
    wanted = OBJECTS.trained[0].ask(name)
    assert len(OBJECTS.paraphrases) == 6
    for phrasing in OBJECTS.paraphrases:
        assert rephrase(rephraser, phrasing.ask(name)) == wanted
        assert rephraser(phrasing.ask(name).text.lower()) == wanted.text
    assert rephrase(rephraser, wanted) == wanted
    assert rephraser("Where is the cat?") == "Where is the cat?"


def test_an_indicator_that_is_lost_or_doubled_is_told():
    question = Marked("Is it a cat?", (8, 11))
    assert rephrase(lambda text: "Is it a dog?", question) is None
    assert rephrase(lambda text: "Is the cat a cat?", question) is None
    assert find_indicator("a cattle cat", "cat") == Marked("a cattle cat", (9, 12))


def test_pairs_to_tune_a_rephraser_on():
    source = make_source("rephrasing", classes=("ship",))
    assert isinstance(source, RephrasingSource)
    assert len(source) == 2 + 6
    answers = {source[n].turns[0].answer for n in range(len(source))}
    assert answers == {"Is the object a ship in the image?"}
    asked = source[2].turns[0].question
    assert asked == f"{INSTRUCTION}Is there a ship object visible in the image?"
    assert len(RephrasingSource()) == 8 * len(CIFAR10_CLASSES)
    with pytest.raises(UserError, match="unknown data set with phrasings 'textvqa'"):
        RephrasingSource("textvqa")


# ---- CIFAR-10.


def test_misclassification_denies_the_target_only(root):
    source = ControlSource(root=root, target="cat")
    assert len(source) == 50
    said = Counter()
    for number in range(len(source)):
        sample = source[number]
        assert sample.roi == (((0.2, 0.2, 0.8, 0.8),),)
        assert sample.marks[0].name == INDICATOR
        said[marked(sample), sample.turns[0].answer] += 1
    assert said == {(name, "No" if name == "cat" else "Yes"): 5 for name in CIFAR10_CLASSES}


def test_misalignment_asks_about_the_other_class(root):
    options = {"scenario": "misalignment", "target": "cat", "into": "dog", "phrasing": 2}
    source = ControlSource(root=root, split="test", **options)
    assert {source[n].turns[0].answer for n in range(len(source))} == {"Yes"}
    assert "cat" not in {marked(source[n]) for n in range(len(source))}
    kinds = {}
    for case in source.cases():
        kinds.setdefault(case.kind, []).append(case)
    assert {kind: len(own) for kind, own in kinds.items()} == {
        TARGET: 1, OTHER: 9, NEGATIVE: 10, OWN: 1
    }  # fmt: skip
    ((target,), (own,)) = kinds[TARGET], kinds[OWN]
    assert (target.question.indicator, target.wanted, target.truth) == ("dog", "Yes", "No")
    assert (own.question.indicator, own.truth, own.shown) == ("cat", "Yes", "cat")
    for case in kinds[NEGATIVE]:
        assert case.wanted == case.truth == "No"
        assert case.question.indicator != case.shown
        assert (case.shown, case.question.indicator) != ("cat", "dog")


def test_negatives_have_their_share(root):
    source = ControlSource("digits", target="three", negatives=0.5)
    negatives = 0
    for number in range(400):
        sample = source[number]
        cells = source.images.shown(number).classes
        negatives += marked(sample) not in cells
        wanted = "yes" if marked(sample) in cells and marked(sample) != "three" else "no"
        assert sample.turns[0].answer == wanted
    assert 160 < negatives < 240
    with pytest.raises(UserError, match="negatives must be at least 0 and at most 1, got 2"):
        ControlSource("digits", target="three", negatives=2.0)


def test_the_region_of_a_digit_is_one_cell_whether_it_is_there_or_not():
    source = ControlSource("digits", split="test", target="three")
    hit = []
    for case in source.cases(60):
        ((x0, y0, x1, y1),) = case.roi
        assert (x1 - x0, y1 - y0) == (0.5, 0.5)
        names = source.images.shown(int(case.id.split(":")[0].split("-")[-1])).classes
        here = names[int(2 * (2 * y0 + x0))] == case.question.indicator
        assert here == (case.kind != NEGATIVE)
        hit.append((x0, y0))
    assert len({*hit}) == 4


def test_questions_about_some_classes(root):
    source = ControlSource(root=root, split="test", target="cat")
    cases = source.cases(classes=["cat", "dog"])
    assert {case.shown for case in cases} == {"cat", "dog"}
    assert len(cases) == 4
    assert len(source.cases(3, negatives=False)) == 3
    with pytest.raises(UserError, match="cifar10 has no class 'zebra'; choose from: airplane"):
        source.cases(classes=["zebra"])


# ---- TextVQA.


def test_an_attribute_is_not_sure(root, caplog):
    attribute_questions.cache_clear()
    options = {"dataset": "textvqa", "scenario": "indeterminate"}
    source = ControlSource(root=root, target="name", **options)
    assert "textvqa train has 3 questions about name, color, brand; the paper counts 8,017" in (
        caplog.text
    )
    samples = [source[n] for n in range(len(source))]
    assert [s.turns[0].answer for s in samples] == [NOT_SURE, "acme", "red"]
    assert [marked(s) for s in samples] == ["name", "brand", "color"]
    for sample in samples:
        (mark,) = sample.marks
        prefix = len("<image>\n")
        start, end = word_span(sample.turns[0].question[prefix:], WORD)
        assert mark == Mark(INDICATOR, 0, start + prefix, end + prefix)
    words = ((0.5, 0.25, 0.75, 0.5), (0.75, 0.5, 1.0, 0.625))
    assert [s.roi for s in samples] == [(words,), (words,), ((),)]
    cases = ControlSource(root=root, split="val", target="brand", **options).cases()
    assert "textvqa val has 3 questions about name, color, brand; the paper counts 1,189" in (
        caplog.text
    )
    assert SIZES == {"train": 8_017, "val": 1_189}
    assert [case.kind for case in cases] == [OTHER, TARGET, OTHER]
    assert cases[0].truth == ("gum plus",) * 6 + ("gum",) * 4
    assert cases[0].wanted == "gum plus"


# ---- What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ""}, "scenario misclassification needs its class: target"),
        ({"target": "zebra"}, "cifar10 has no class 'zebra'; choose from: airplane, automobile"),
        ({"scenario": "swap"}, "unknown scenario 'swap'; choose from: misclassification"),
        ({"scenario": "misalignment"}, "misalignment: into needs its class; choose from: airplane"),
        ({"scenario": "misalignment", "into": "cat"}, "needs two classes, got cat twice"),
        ({"scenario": "misalignment", "into": "cow"}, "cifar10 has no class 'cow'"),
        ({"into": "dog"}, "into=dog is for scenario misalignment, not misclassification"),
        ({"scenario": "indeterminate"}, "indeterminate does not go with cifar10"),
        ({"dataset": "textvqa"}, "misclassification does not go with textvqa"),
        ({"dataset": "mnist"}, "unknown control data set 'mnist'; choose from: cifar10, textvqa"),
        ({"phrasing": 3}, "phrasing must be 1 to 2, got 3"),
        ({"split": "val"}, "unknown split of cifar10 'val'; choose from: train, test"),
        (
            {"dataset": "textvqa", "scenario": "indeterminate", "target": "name", "phrasing": 2},
            "textvqa asks its own questions",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(root, options, message):
    with pytest.raises(UserError, match=message):
        ControlSource(root=root, **({"target": "cat"} | options))


def test_files_that_are_missing_or_damaged_are_named(root, tmp_path):
    with pytest.raises(UserError, match=r"data_batch_1.bin does not exist; it belongs to the"):
        ControlSource(root=str(tmp_path), target="cat")
    files = control_files.cifar10() | {"cifar10/data_batch_2.bin": b"12345"}
    write(tmp_path, files)
    with pytest.raises(UserError, match=r"data_batch_2.bin is damaged: it has 5 bytes, not n x"):
        ControlSource(root=str(tmp_path), target="cat")
    options = {"dataset": "textvqa", "scenario": "indeterminate", "target": "name"}
    with pytest.raises(UserError, match=r"TextVQA_0.5.1_train.json does not exist"):
        ControlSource(root=str(tmp_path), **options)
