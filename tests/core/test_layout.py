"""The token layout and every mask derived from it, against slow definitions."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.core.layout import (
    SHARED,
    TokenKind,
    TokenLayout,
    count_documents,
    last_prompt_mask,
    loss_mask,
    rank_in_conversation,
    valid_mask,
    visible,
)
from moresjax.testing.batches import row_layout, stack_layout
from moresjax.tuning.masks import extend_layout
from moresjax.tuning.selectors import parse_selector

PAD, SYSTEM, IMAGE, QUESTION, ANSWER = TokenKind
VISUAL, LENGTH = 4, 72


@st.composite
def documents(draw):
    """One packed row: documents with a trunk (images inside) and independent branches, padded."""
    fields = {name: [] for name in ("kind", "image", "position", "document", "branch")}
    images = 0

    def add(kind, count, position, document, branch):
        nonlocal images
        for n in range(count):
            fields["kind"].append(int(kind))
            fields["image"].append(images * VISUAL + n if kind == IMAGE else -1)
            fields["position"].append(position + n)
            fields["document"].append(document)
            fields["branch"].append(branch)
        images += kind == IMAGE
        return position + count

    left = draw(st.integers(0, 3))
    for _ in range(left):
        add(PAD, 1, 0, 0, 0)
    for document in range(draw(st.integers(1, 3))):
        position = add(SYSTEM, draw(st.integers(1, 2)), 0, document, 0)
        for _ in range(draw(st.integers(0, 2))):
            position = add(IMAGE, VISUAL, position, document, 0)
            position = add(QUESTION, draw(st.integers(0, 2)), position, document, 0)
        branches = draw(st.integers(0, 2))
        for branch in range(1, branches + 1):
            end = add(QUESTION, draw(st.integers(1, 2)), position, document, branch)
            add(ANSWER, draw(st.integers(0, 2)), end, document, branch)
        if not branches:
            add(ANSWER, draw(st.integers(0, 3)), position, document, 0)
    # One length for all, so that every operation compiles once.
    add(PAD, LENGTH - len(fields["kind"]), 0, 0, 0)
    return TokenLayout(
        **{name: np.asarray([values], np.int32) for name, values in fields.items()},
        visual_tokens=VISUAL,
    )


def fields_of(layout):
    names = ("kind", "image", "position", "document", "branch")
    return [np.asarray(getattr(layout, name))[0] for name in names]


@settings(max_examples=40, deadline=None)
@given(documents())
def test_visible_is_its_definition(layout):
    kind, _, _, document, branch = fields_of(layout)
    mask = np.asarray(visible(layout))[0]
    for q in range(len(kind)):
        for k in range(len(kind)):
            related = document[k] == document[q] and branch[k] in (0, branch[q])
            alive = kind[k] != PAD and kind[q] != PAD
            assert mask[q, k] == ((k <= q and related and alive) or k == q)


@settings(max_examples=40, deadline=None)
@given(documents())
def test_visible_of_chosen_queries_is_a_part_of_the_whole(layout):
    whole = np.asarray(visible(layout))
    queries = np.asarray([[layout.shape[1] - 1, 0]], np.int32)
    np.testing.assert_array_equal(np.asarray(visible(layout, queries))[0], whole[0, queries[0]])


@settings(max_examples=40, deadline=None)
@given(documents())
def test_loss_is_on_the_token_before_every_answer_token(layout):
    kind, _, position, document, branch = fields_of(layout)
    mask = np.asarray(loss_mask(layout))[0]
    for i in range(len(kind)):
        following = i + 1 < len(kind) and kind[i + 1] == ANSWER
        if following and kind[i] != PAD:
            # The predecessor of an answer token in its own branch or at the end of its trunk.
            following = document[i + 1] == document[i] and branch[i] in (0, branch[i + 1])
        assert mask[i] == (following and kind[i] != PAD)
        if mask[i]:
            assert position[i + 1] == position[i] + 1


@settings(max_examples=40, deadline=None)
@given(documents())
def test_region_masks_are_disjoint_and_leave_out_padding(layout):
    kind = fields_of(layout)[0]
    regions = {r: np.asarray(parse_selector(r)(layout))[0] for r in ("system", "image", "question")}
    regions["answer"] = np.asarray(parse_selector("answer")(layout))[0]
    total = sum(mask.astype(int) for mask in regions.values())
    np.testing.assert_array_equal(total, kind != PAD)
    everything = np.asarray(parse_selector("all")(layout))[0]
    np.testing.assert_array_equal(everything, kind != PAD)
    prompt = regions["system"] | regions["image"] | regions["question"]
    np.testing.assert_array_equal(np.asarray(parse_selector("prompt")(layout))[0], prompt)


@settings(max_examples=40, deadline=None)
@given(documents())
def test_rank_counts_inside_the_conversation_of_a_branch(layout):
    kind, _, _, document, branch = fields_of(layout)
    for region in (kind == QUESTION, kind == ANSWER, kind != PAD):
        before, after = (np.asarray(x)[0] for x in rank_in_conversation(layout, region[None]))
        for i in np.flatnonzero(region):
            same = region & (document == document[i])
            # Of a trunk it is the conversation with its longest branch.
            last = max(branch[same], key=lambda b: (b > 0) * (same & (branch == b)).sum())
            own = np.flatnonzero(same & np.isin(branch, (0, branch[i] or last)))
            assert before[i] == np.searchsorted(own, i)
            assert after[i] == len(own) - 1 - before[i]


@settings(max_examples=40, deadline=None)
@given(documents())
def test_last_prompt_token_predicts_the_first_answer_token(layout):
    kind, _, _, document, branch = fields_of(layout)
    mask = np.asarray(last_prompt_mask(layout))[0]
    for i in np.flatnonzero(mask):
        assert kind[i] not in (PAD, ANSWER)
    for i in range(1, len(kind)):
        first = kind[i] == ANSWER and kind[i - 1] not in (ANSWER, PAD)
        if first and document[i] == document[i - 1] and branch[i - 1] in (0, branch[i]):
            assert mask[i - 1]


def test_packed_documents_give_the_loss_no_path_between_them():
    row = row_layout((SYSTEM, 1), (QUESTION, 2), (ANSWER, 2), (SYSTEM, 1), (ANSWER, 2))
    row["document"][5:] = 1
    layout = stack_layout([row])
    mask = np.asarray(visible(layout))[0]
    assert not mask[5:, :5].any()
    # Token 4 is the last of document 0; that document 1 goes on with an answer is not its business.
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(loss_mask(layout))[0]), [2, 3, 5, 6])


@pytest.mark.parametrize("visual", [576, 728, 729])
def test_first_four_and_last_five_of_real_image_sizes(visual):
    pieces = [(SYSTEM, 3), (IMAGE, visual), (QUESTION, 5), (ANSWER, 4)]
    layout = stack_layout([row_layout(*pieces, length=visual + 20)], visual=visual)
    mask = np.asarray(parse_selector("image:f4+l5")(layout))[0]
    first = 3
    expected = [*range(first, first + 4), *range(first + visual - 5, first + visual)]
    np.testing.assert_array_equal(np.flatnonzero(mask), expected)
    assert mask.sum() == 9


def image_indices(selector: str, visual: int, images: int = 1) -> list[list[int]]:
    """Indices of the selected visual tokens, per image, with text around and between images."""
    pieces = [(SYSTEM, 1)]
    for _ in range(images):
        pieces += [(IMAGE, visual), (QUESTION, 2)]
    layout = stack_layout([row_layout(*pieces)], visual=visual)
    mask = np.asarray(parse_selector(selector)(layout))[0]
    chosen = np.asarray(layout.image)[0][mask]
    assert (chosen >= 0).all()
    return [[int(i % visual) for i in chosen if i // visual == n] for n in range(images)]


@pytest.mark.parametrize(
    ("selector", "visual", "expected"),
    [
        ("image", 5, [0, 1, 2, 3, 4]),
        ("image:f2", 5, [0, 1]),
        ("image:l2", 5, [3, 4]),
        ("image:f4+l5", 6, [0, 1, 2, 3, 4, 5]),
        ("image:f4+l5", 5, [0, 1, 3, 4]),  # each side is capped at half
        ("image:uniform(3)", 9, [0, 4, 8]),
        ("image:uniform(4)", 16, [0, 5, 10, 15]),
        ("image:uniform(1)", 9, [0]),
        ("image:uniform(1%)", 576, [round(i * 115) for i in range(6)]),
        ("image:uniform(1%)", 9, [0]),  # at least one
        ("image:25%", 16, [0, 1, 14, 15]),
        ("image:100%", 5, [0, 1, 2, 3, 4]),
        ("image:1%", 576, [0, 1, 2, 573, 574, 575]),
        ("image:at(0;3)", 5, [0, 3]),
        ("image:f1|image:l1", 5, [0, 4]),
        ("image:skip(1;2)", 6, [1, 2, 3]),
        ("image:skip(2;0)+f9+l9", 7, [2, 3, 5, 6]),
        ("image:skip(0;1)+at(0;4)", 5, [0]),
        ("image:skip(1;1)+uniform(3)", 7, [1, 3, 5]),
        ("image:skip(4;4)+f1", 5, []),
    ],
)
def test_image_slices(selector, visual, expected):
    assert image_indices(selector, visual) == [expected]
    # Every image of a row is cut by itself.
    assert image_indices(selector, visual, images=3) == [expected] * 3


def test_slices_count_as_if_every_branch_stood_alone():
    row = row_layout((SYSTEM, 1), (QUESTION, 3), (QUESTION, 3), (QUESTION, 3))
    row["branch"][4:7] = 1
    row["branch"][7:] = 2
    layout = stack_layout([row])

    def chosen(selector):
        return np.flatnonzero(np.asarray(parse_selector(selector)(layout))[0]).tolist()

    assert chosen("question:f1") == [1]
    assert chosen("question:f4") == [1, 2, 3, 4, 7]
    assert chosen("question:l1") == [6, 9]
    assert chosen("question:f1+l1") == [1, 6, 9]
    assert chosen("all:at(0;5)") == [0, 5, 8]


def test_words_regions_of_interest_and_last_prompt():
    row = row_layout((SYSTEM, 1), (IMAGE, 4), (QUESTION, 2), (ANSWER, 2))
    layout = stack_layout([row], visual=4)
    tokens = np.asarray([[1, 0, 0, 0, 0, 7, 8, 7, 9]], np.int32)
    roi = np.asarray([[False, True, False, True]])

    def chosen(selector, **extra):
        mask = parse_selector(selector)(layout, **extra)
        return np.flatnonzero(np.asarray(mask)[0]).tolist()

    assert chosen("roi", roi=roi) == [2, 4]
    assert chosen("token(cat)", tokens=tokens, words={"cat": (7,)}) == [5, 7]
    assert chosen("token(cat)", tokens=tokens, words={"cat": (8, 9)}) == [6, 8]
    assert chosen("last_prompt") == [6]
    assert chosen("generated") == chosen("answer") == [7, 8]


@settings(max_examples=25, deadline=None)
@given(documents(), st.integers(1, 3))
def test_virtual_tokens_are_seen_by_all_and_selected_by_none(layout, count):
    extended = extend_layout(layout, count)
    mask = np.asarray(visible(extended))[0]
    alive = np.asarray(valid_mask(layout))[0]
    assert (np.asarray(extended.document)[0, :count] == SHARED).all()
    assert mask[count:][alive][:, :count].all()
    np.testing.assert_array_equal(mask[count:, count:], np.asarray(visible(layout))[0])
    for selector in ("all", "prompt", "system", "image", "question", "answer"):
        selected = np.asarray(parse_selector(selector)(extended))[0]
        assert not selected[:count].any()
        np.testing.assert_array_equal(
            selected[count:], np.asarray(parse_selector(selector)(layout))[0]
        )


def test_text_layout_is_padded_on_either_side():
    valid = np.asarray([[True, True, True, False], [False, True, True, True]])
    layout = TokenLayout.text(valid)
    np.testing.assert_array_equal(layout.position, [[0, 1, 2, 0], [0, 0, 1, 2]])
    np.testing.assert_array_equal(np.asarray(valid_mask(layout)), valid)


def test_a_layout_is_a_pytree_that_passes_through_jit():
    layout = stack_layout([row_layout((SYSTEM, 1), (IMAGE, 9), (ANSWER, 2))])
    doubled = jax.jit(lambda x: jax.tree.map(lambda a: a * 2, x))(layout)
    assert doubled.visual_tokens == 9
    np.testing.assert_array_equal(doubled.kind, np.asarray(layout.kind) * 2)


@settings(max_examples=20, deadline=None)
@given(documents())
def test_documents_are_counted_without_their_padding(layout):
    kind, _, _, document, _ = fields_of(layout)
    assert count_documents(layout) == len({d for d, k in zip(document, kind, strict=True) if k})
