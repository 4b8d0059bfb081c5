"""Rows: appending, joining, padding and prefixes; registries of names."""

import pickle

import numpy as np
import pytest

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.registry import add_entry, registrar
from moresjax.core.row import FIELDS, Row, stack


def with_image(text: int, visual: int = 4) -> Row:
    """A row of one image and `text` tokens."""
    row = Row.text([0] * visual, TokenKind.IMAGE).replace(
        image=np.arange(visual, dtype=np.int32), pixels=np.ones((1, 2, 2, 3), np.float32), id="cat"
    )
    return row.append(range(1, text + 1), TokenKind.QUESTION)


def test_text_that_is_appended_goes_on_in_the_last_document():
    row = Row.concat([Row.text([1, 2]), Row.text([3])], 4).append([4, 5])
    assert row.tokens.tolist() == [1, 2, 3, 4, 5]
    assert row.document.tolist() == [0, 0, 1, 1, 1]
    assert row.position.tolist() == [0, 1, 0, 1, 2]
    assert row.kind.tolist() == [TokenKind.QUESTION] * 3 + [TokenKind.ANSWER] * 2
    assert {x.dtype for x in row.fields.values()} == {np.dtype(np.int32)}


def test_branches_may_begin_at_one_position():
    row = Row.text([1, 2])
    for branch in (1, 2):
        row = row.append([3, 4], branch=branch, position=2)
    assert row.branch.tolist() == [0, 0, 1, 1, 2, 2]
    assert row.position.tolist() == [0, 1, 2, 3, 2, 3]


def test_an_empty_row_can_be_appended_to_and_padded():
    empty = Row.text(())
    assert len(empty) == 0
    assert empty.append([7]).position.tolist() == [0]
    padded = empty.pad(2)
    assert padded.kind.tolist() == [TokenKind.PAD] * 2
    assert padded.image.tolist() == [-1, -1]


def test_joined_rows_hold_the_images_of_all():
    row = Row.concat([with_image(2), Row.text([1]), with_image(1)], 4)
    assert row.num_images == 2
    assert row.image[row.image >= 0].tolist() == list(range(8))
    assert row.id == "cat;;cat"
    assert row.document.tolist() == [0] * 6 + [1] + [2] * 5


def test_a_prefix_keeps_the_images():
    row = with_image(3)
    assert len(row[:5]) == 5
    assert row[:5].pixels is row.pixels
    with pytest.raises(ValueError, match="broadcast"):
        row.pad(4)


def test_the_common_prefix_looks_at_all_fields():
    row = Row.text([1, 2, 3, 4])
    assert row.common_prefix(row) == row.common_prefix(row.append([5])) == 4
    assert row.common_prefix(Row.text([1, 2, 9])) == 2
    assert row.common_prefix(Row.text([1]).append([2, 3, 4])) == 1


def test_rows_are_pickled_and_stacked():
    row = with_image(2)
    again = pickle.loads(pickle.dumps(row))
    stacked = stack([row.to_dict(), again.to_dict()])
    assert list(stacked) == [*FIELDS, "pixels"]
    for values in stacked.values():
        np.testing.assert_array_equal(values[0], values[1])
    assert "pixels" not in Row.text([1]).to_dict()


def test_a_name_is_not_given_twice():
    registry = {}
    add_entry(registry, "colour", "red", 1)
    add_entry(registry, "colour", "red", 1)
    with pytest.raises(UserError, match="the colour name 'red' is taken; choose another"):
        add_entry(registry, "colour", "red", 2)

    def define():
        @registrar(registry, "colour", "blue")
        class Blue:
            pass

        return Blue

    assert define() is not define()  # the same cell, run twice
    with pytest.raises(UserError, match="'blue' is taken"):
        registrar(registry, "colour", "blue")(int)
