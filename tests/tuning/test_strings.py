"""Spec strings, selectors, layer choices and sites: what is accepted and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from moresjax.errors import UserError
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import METHODS
from moresjax.tuning.selectors import parse_layers, parse_selector
from moresjax.tuning.spec import format_spec, parse_spec


def chosen(text: str, layers: int) -> list[int]:
    return [i for i, on in enumerate(parse_layers(text, layers)) if on]


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("0;2", 4, [0, 2]),
        ("1-3", 4, [1, 2, 3]),
        ("0;2-3", 4, [0, 2, 3]),
        ("every:3", 8, [0, 3, 6]),
        ("shallow", 32, list(range(16))),
        ("middle", 32, list(range(8, 24))),
        ("deep", 32, list(range(16, 32))),
    ],
)
def test_layer_choices(text, layers, expected):
    assert chosen(text, layers) == expected


@pytest.mark.parametrize("text", ["", "none", "5-2", "every:0", "-1", "1,2", "shallow;1"])
def test_wrong_layer_choices_name_the_value(text):
    with pytest.raises(UserError, match="layers"):
        parse_layers(text, 4)


def test_a_layer_beyond_the_model_is_named():
    with pytest.raises(UserError, match=r"layer 7, but the model has layers 0-3"):
        parse_layers("1;7", 4)


@pytest.mark.parametrize(
    "text",
    [
        "picture",
        "image:first4",
        "image:f4+f5",
        "image:+l5",
        "image:f4+",
        "image:uniform(",
        "image:4",
        "image:2.5",
        "image:0%",
        "image:120%",
        "image:uniform(0)",
        "image:uniform(2.5)",
        "last_prompt:f1",
        "token()",
        "",
    ],
)
def test_wrong_selectors_are_refused(text):
    with pytest.raises(UserError, match="selector"):
        parse_selector(text)


def test_refusals_name_the_allowed_values():
    with pytest.raises(UserError, match=r"picture.*image.*question.*answer"):
        parse_selector("picture")
    with pytest.raises(UserError, match=r"nope.*lora.*mores"):
        parse_spec("nope:rank=1")
    with pytest.raises(UserError, match=r"rnk=1.*rank"):
        parse_spec("mores:rnk=1")
    with pytest.raises(UserError, match=r"mores:rank takes a whole number, got 'two'"):
        parse_spec("mores:rank=two")
    with pytest.raises(UserError, match=r"rank must be at least 1, got 0"):
        parse_spec("mores:rank=0")
    with pytest.raises(UserError, match=r"init.*zero.*paper.*identity"):
        parse_spec("mores:init=zero")


def test_what_does_not_fit_the_model_is_refused_when_it_is_built():
    config = tiny_config()
    with pytest.raises(UserError, match=r"rank=17 exceeds the hidden size 16"):
        Tuning("mores:rank=17", config)
    with pytest.raises(UserError, match=r"layer 3.*0-2"):
        Tuning("mores:layers=3", config)
    with pytest.raises(UserError, match=r"picture"):
        Tuning("mores:positions=picture", config)
    with pytest.raises(UserError, match=r"llm\.block\.middle"):
        Tuning("mores:site=llm.block.middle", config)
    with pytest.raises(UserError, match=r"qq.*all.*q.*down"):
        Tuning("lora:targets=qq", config)


@given(
    st.sampled_from(["image", "image:f4+l5", "image:25%", "question:f4|image"]),
    st.integers(1, 16),
    st.sampled_from(["all", "0;2", "every:2"]),
    st.sampled_from(["paper", "identity"]),
)
def test_specs_survive_formatting(positions, rank, layers, init):
    spec = f"mores:rank={rank},positions={positions},layers={layers},init={init}/lora:rank={rank}"
    methods = parse_spec(spec)
    assert parse_spec(format_spec(methods)) == methods
    assert methods[0].rank == rank
    assert methods[0].positions == positions
    assert [m.name for m in methods] == ["mores", "lora"]


def test_every_method_has_a_spec_of_its_own_name():
    for name in METHODS:
        assert parse_spec(name)[0].name == name
        assert format_spec(parse_spec(name)) == name


def test_a_method_may_occur_twice():
    tuning = Tuning("mores:rank=1,layers=0/mores:rank=2,layers=1", tiny_config())
    assert [key for key, _ in tuning.methods] == ["mores", "mores_2"]
    assert tuning.theta["mores_2"]["llm.block.out"]["rotate"].shape == (3, 16, 2)
