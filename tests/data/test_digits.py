"""The digits world: splits of real handwriting, true answers, deterministic samples."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from moresjax.core.errors import UserError
from moresjax.data.digits import (
    CELL,
    CELLS,
    FAMILIES,
    SPLITS,
    UNSEEN,
    WORDS,
    DigitsSource,
    _digits_file,
    ask,
    build_tokenizer,
    describe,
    load_instances,
    make_scene,
    random_digits,
    vocabulary,
)
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.evaluation.benchmarks.digits import majority_accuracy, make_examples
from moresjax.evaluation.examples import Example

TASKS = ("text", "patches", "caption", "instruct")
scenes = st.tuples(*[st.integers(0, 9)] * 4)
seeds = st.integers(0, 2**32 - 1)


def test_the_file_is_what_scikit_learn_loads():
    table = np.loadtxt(_digits_file(), delimiter=",")
    images, labels = load_digits(return_X_y=True)
    np.testing.assert_array_equal(table[:, :-1], images)
    np.testing.assert_array_equal(table[:, -1], labels)


def true_answer(question: str, digits) -> str:
    """What the words of a question ask for, worked out without the generator."""
    words = question.split()
    cells = [digits[CELLS.index(word)] for word in words if word in CELLS]
    asked = [WORDS.index(word) for word in words if word in WORDS]
    yes_or_no = {True: "yes", False: "no"}
    match words[:2]:
        case ["is", "there"]:
            return yes_or_no[asked[0] in digits]
        case ["how", "many"]:
            return WORDS[sum(d == asked[0] for d in digits)]
        case ["what", "is"] if "largest" in words:
            return WORDS[sorted(digits)[-1]]
        case ["what", "is"] if "smallest" in words:
            return WORDS[sorted(digits)[0]]
        case ["what", "is"]:
            return WORDS[cells[0]]
        case ["is", _]:
            return yes_or_no[cells[0] > cells[1]]
        case ["are", _]:
            return yes_or_no[cells[0] == cells[1]]
    raise AssertionError(f"no such question: {question}")


def told(description: str) -> tuple[int, ...]:
    """The digits of a description."""
    words = description.split()
    by_cell = dict(zip(words[::2], words[1::2], strict=True))
    assert sorted(by_cell) == sorted(CELLS)
    return tuple(WORDS.index(by_cell[cell]) for cell in CELLS)


# Handwriting


def test_splits_share_no_instance():
    parts = {
        split: [x.tobytes() for x in images] for split, (images, _) in load_instances().items()
    }
    assert set(parts) == {"train", "val", "test"}
    everything = [x for part in parts.values() for x in part]
    assert len(everything) == len(load_digits().target)
    assert len(set(everything)) == len(everything)


def test_splits_are_balanced():
    whole = Counter(load_digits().target.tolist())
    for split, (images, labels) in load_instances().items():
        assert images.shape == (len(labels), CELL, CELL)
        assert images.dtype == np.uint8
        for digit, count in Counter(labels.tolist()).items():
            assert abs(count - SPLITS[split] * whole[digit]) <= 1, (split, digit)


# Scenes and questions


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_shows_its_digits_in_the_splits_handwriting(split):
    images, labels = load_instances()[split]
    known = {x.tobytes(): int(label) for x, label in zip(images, labels, strict=True)}
    for seed in range(20):
        scene = make_scene(np.random.default_rng(seed), split)
        grey = scene.image[..., 0]
        assert (scene.image == grey[..., None]).all()
        quarters = [grey[y : y + CELL, x : x + CELL] for y in (0, CELL) for x in (0, CELL)]
        assert tuple(known[q.tobytes()] for q in quarters) == scene.digits


def test_shifted_scenes_move_by_a_pixel_and_keep_the_digit():
    images, labels = load_instances()["train"]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    known = {}
    for y in range(3):
        for x in range(3):
            for glyph, label in zip(padded[:, y : y + CELL, x : x + CELL], labels, strict=True):
                known[glyph.tobytes()] = int(label)
    unmoved = {x.tobytes() for x in images}
    quarters = []
    for seed in range(20):
        scene = make_scene(np.random.default_rng(seed), "train", shift=1)
        grey = scene.image[..., 0]
        found = [grey[y : y + CELL, x : x + CELL].tobytes() for y in (0, CELL) for x in (0, CELL)]
        assert tuple(known[q] for q in found) == scene.digits
        quarters += found
    assert not all(q in unmoved for q in quarters)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FAMILIES), scenes, seeds)
def test_answers_are_true(family, digits, seed):
    turn = ask(family, digits, np.random.default_rng(seed))
    assert turn.answer == true_answer(turn.question, digits)
    assert set(turn.question.split()) | {turn.answer} <= set(vocabulary())


@settings(max_examples=50, deadline=None)
@given(scenes, seeds)
def test_descriptions_are_true(digits, seed):
    assert told(describe(digits, np.random.default_rng(seed))) == digits


def test_answers_are_not_given_away_by_their_frequency():
    rng = np.random.default_rng(0)
    for family in FAMILIES:
        answers = Counter(ask(family, random_digits(rng), rng).answer for _ in range(1500))
        assert len(answers) > 1
        limit = 0.6 if set(answers) <= {"yes", "no"} else 0.5
        assert max(answers.values()) / 1500 < limit, family


def test_an_unknown_family():
    with pytest.raises(UserError, match=r"question family 'colour'.*presence"):
        ask("colour", (1, 2, 3, 4), np.random.default_rng(0))


# The source


def assert_same_item(a, b):
    if isinstance(a, Sample):
        assert (a.id, a.turns, a.context, a.independent) == (
            b.id,
            b.turns,
            b.context,
            b.independent,
        )
        assert len(a.images) == len(b.images)
        for x, y in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(x, y)
    else:
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("task", TASKS)
def test_an_item_is_a_function_of_seed_and_index(task):
    for index in (0, 5, 999_999):
        assert_same_item(DigitsSource(task)[index], DigitsSource(task)[index])
    for other in (DigitsSource(task)[1], DigitsSource(task, seed=1)[0]):
        with pytest.raises(AssertionError):
            assert_same_item(DigitsSource(task)[0], other)


@pytest.mark.parametrize("task", ["text", "instruct"])
def test_samples_of_a_source_are_true(task):
    source = DigitsSource(task, questions=3)
    for index in range(100):
        sample = source[index]
        assert sample.independent
        turns = sample.turns
        if task == "text":
            digits = told(sample.context)
            assert sample.images == ()
            assert turns[0].question is None
            assert told(turns[0].answer) == digits
            turns = turns[1:]
            assert all(t.answer == true_answer(t.question, digits) for t in turns)
        else:
            assert sample.context == IMAGE_MARK + "\n"
            assert [x.shape for x in sample.images] == [(32, 32, 3)]
        assert len(turns) == 3
        assert len({t.question for t in turns}) == 3


def test_questions_about_an_image_are_true():
    images, labels = load_instances()["test"]
    known = {x.tobytes(): int(label) for x, label in zip(images, labels, strict=True)}
    instruct, caption = (DigitsSource(task, "test") for task in ("instruct", "caption"))

    def shown(image):
        quarters = [image[y : y + CELL, x : x + CELL, 0] for y in (0, CELL) for x in (0, CELL)]
        return tuple(known[q.tobytes()] for q in quarters)

    for index in range(50):
        sample = instruct[index]
        for turn in sample.turns:
            assert turn.answer == true_answer(turn.question, shown(sample.images[0]))
        sample = caption[index]
        assert sample.turns[0].question is None
        assert told(sample.turns[0].answer) == shown(sample.images[0])


def test_the_unseen_family_is_never_in_the_text():
    def questions(task):
        found = (turn.question for i in range(300) for turn in DigitsSource(task)[i].turns)
        return [q for q in found if q is not None]

    assert not any(UNSEEN in question for question in questions("text"))
    assert any(UNSEEN in question for question in questions("instruct"))


def test_chosen_families():
    source = DigitsSource("instruct", families=("largest", "count"))
    starts = {t.question.split()[0] for i in range(20) for t in source[i].turns}
    assert starts == {"what", "how"}
    assert len(source[0].turns) == 2


@pytest.mark.parametrize(("patch", "per_cell"), [(8, 2), (16, 1), (4, 4)])
def test_classes_of_patches(patch, per_cell):
    item = DigitsSource("patches", "test", patch_size=patch)[3]
    digits = make_scene(np.random.default_rng((0, 3)), "test").digits
    classes = item["classes"].reshape(2 * per_cell, 2 * per_cell, 2)
    assert item["classes"].dtype == np.int32
    for y in range(2 * per_cell):
        for x in range(2 * per_cell):
            cell = 2 * (y // per_cell) + x // per_cell
            assert classes[y, x].tolist() == [digits[cell], cell]


@pytest.mark.parametrize(
    ("options", "name"), [({"task": "sing"}, "sing"), ({"split": "dev"}, "dev")]
)
def test_unknown_task_and_split(options, name):
    with pytest.raises(UserError, match=f"'{name}'; choose from"):
        DigitsSource(**({"task": "text"} | options))


# The tokenizer


def test_the_tokenizer_knows_every_word():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(vocabulary()) == 37
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    unknown = tokenizer.unk_token_id
    for index in range(100):
        for turn in DigitsSource("instruct")[index].turns:
            text = f"{turn.question} {turn.answer}"
            ids = tokenizer(text)["input_ids"]
            assert unknown not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("is there a cat ?")["input_ids"].count(unknown) == 1


# The benchmark's baseline


def test_majority():
    questions = [Example(str(i), "?", answer, ()) for i, answer in enumerate(["a", "b", "b", "c"])]
    assert majority_accuracy(questions) == 0.5


def test_majority_is_the_best_constant_answer():
    for questions in make_examples("test", 30).values():
        answers = [item.answer for item in questions]
        best = max(sum(a == guess for a in answers) for guess in set(answers))
        assert majority_accuracy(questions) == pytest.approx(best / len(answers))
