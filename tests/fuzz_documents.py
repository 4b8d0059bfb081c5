"""Hostile documents: valid ones that are changed in some places, as values or as text."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

SMALL_TEXT = st.text(max_size=6)
ODD = (
    *(None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**63, -(10**30), 10**400),
    *(0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "../..",
        "/dev/zero",
        "a" * 3000,
        "9" * 5000,
        "[",
        "*",
        "<image>",
    ),
    *([], [[]], {}, {"a": 1}, [None], [0], [""], {"": None}, [[["x"]]], [1.5, "a"]),
    *("all", "none", "lora", "q;v", "(a|aa)+$", "1" * 12, "data:image/png;base64,AAAA"),
)
HOSTILE = st.sampled_from(ODD) | st.integers() | SMALL_TEXT
CHANGE = st.tuples(
    st.sampled_from(("set", "set", "set", "drop", "add", "wrap", "copy")),
    st.integers(0, 10_000),
    HOSTILE,
    st.sampled_from(("a", "id", "image", "spec", "", "layers", "text")),
)
TEXT_CHANGE = st.tuples(
    st.sampled_from(("cut", "insert", "remove", "double", "deep", "prefix")),
    st.integers(0, 1_000_000),
    st.sampled_from(
        ("{", "}", "[", "]", '"', ",", ":", "\\", "\n", "\0", "1", "é", "\ufeff", "NaN")
    ),
)


def changed(document: Any, changes: list[tuple[str, int, Any, str]]) -> Any:
    """A copy of a document with some changes, each at one of its places by number."""
    root = {"": json.loads(json.dumps(document))}
    for kind, number, value, key in changes:
        places = [*_places(root)]
        node, name = places[number % len(places)]
        value = copy.deepcopy(value)
        if kind == "set":
            node[name] = value
        elif kind == "wrap":
            node[name] = [node[name]]
        elif kind == "copy":
            other, there = places[len(key) * number % len(places)]
            node[name] = copy.deepcopy(other[there])
        elif kind == "drop" and node is not root:
            del node[name]
        elif kind == "add":
            if isinstance(node[name], dict):
                node[name][key] = value
            elif isinstance(node[name], list):
                node[name].insert(0, value)
    return root[""]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside of lists and objects: what holds it, and its index or key."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys):
        yield node, key
        yield from _places(node[key])


def documents(*valid: Any) -> st.SearchStrategy[Any]:
    """Values close to valid ones."""
    return st.builds(changed, st.sampled_from(valid), st.lists(CHANGE, max_size=3))


def damaged(text: str, changes: list[tuple[str, int, str]]) -> str:
    """A text with some changes at places by number."""
    for kind, number, piece in changes:
        place = number % (len(text) + 1)
        if kind == "cut":
            text = text[:place]
        elif kind == "insert":
            text = text[:place] + piece + text[place:]
        elif kind == "remove":
            text = text[:place] + text[place + 1 :]
        elif kind == "double":
            text = text[:place] + text[place // 2 :]
        elif kind == "deep":
            text = text[:place] + "[" * (number % 30_000) + text[place:]
        else:
            text = piece + text
    return text


def json_texts(*valid: Any) -> st.SearchStrategy[str]:
    """JSON texts of values close to valid ones, most of them whole."""
    whole = documents(*valid).map(json.dumps)
    broken = st.builds(
        lambda value, changes: damaged(json.dumps(value), changes),
        st.sampled_from(valid),
        st.lists(TEXT_CHANGE, min_size=1, max_size=2),
    )
    return st.one_of(whole, whole, broken)


def line_texts(*rows: Any) -> st.SearchStrategy[str]:
    """Texts of JSON Lines, some rows of which are close to valid ones."""
    row = st.one_of(st.sampled_from(rows).map(json.dumps), json_texts(*rows))
    return st.lists(row, max_size=3).map("\n".join) | st.lists(row, max_size=3).map(
        lambda lines: "".join(line + "\n" for line in lines)
    )


def phrases(*pieces: str, most: int = 8) -> st.SearchStrategy[str]:
    """Strings of a small language: its words, numbers of any size, and now and then anything."""
    word = st.sampled_from(pieces)
    number = st.sampled_from(("0", "1", "2", "7", "00", "2147483648", "9" * 30, "9" * 4400, "1.5"))
    other = (
        st.sampled_from(("\0", "-", "(", ")", "[", "*", " ", "é", "\ud800", "a" * 200, ""))
        | SMALL_TEXT
    )
    return st.lists(st.one_of(word, word, word, number, other), max_size=most).map("".join)
