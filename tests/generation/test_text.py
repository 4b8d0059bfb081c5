"""Growing texts: pieces that never change, whole characters, stop strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.core.errors import UserError
from moresjax.generation.text import TextStream, check_stops, cut_at_stop


def from_bytes(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab \n\u00e9\u4e16\U0001f600", max_size=20),
    st.lists(st.sampled_from(["ab", "a b", "\n\n", "bba", "\u4e16"]), max_size=2),
    st.integers(1, 5),
)
def test_the_pieces_joined_are_the_text_before_the_first_stop(text, stops, chunk):
    ids = text.encode()
    stream, joined = TextStream(from_bytes, stops), ""
    for end in range(chunk, len(ids), chunk):
        joined += stream.push(ids[:end])
        assert "\ufffd" not in joined
    joined += stream.push(ids, final=True)
    assert joined == stream.text == cut_at_stop(text, stops).strip()


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(from_bytes, ["###"])
    assert stream.push(b"one #") == "one"
    assert stream.push(b"one ##x") == " ##x"
    assert stream.push(b"one ##x ##") == ""
    assert stream.push(b"one ##x ### two") == ""


def test_an_empty_stop_string_is_refused():
    assert check_stops("abc") == ("abc",)
    with pytest.raises(UserError, match="a stop string is empty"):
        check_stops(["a", ""])
