"""Spec strings, selectors, layer choices and sites: what is accepted and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moresjax.core.errors import UserError
from moresjax.testing.models import tiny_config
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import METHODS, Method
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
        ("2-", 5, [2, 3, 4]),
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
        "image:f0",
        "image:f0+l0",
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
    for name, cls in METHODS.items():
        methods = parse_spec(name)
        assert parse_spec(format_spec(methods)) == methods
        if cls.parts is Method.parts:
            assert [m.name for m in methods] == [name]
            assert format_spec(methods) == name


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("mores-base", "mores:rank=1"),
        ("mores-large:positions=image:25%", "mores:rank=2,positions=image:25%"),
        ("mores-huge:layers=1/lora", "mores:rank=4,layers=1/lora"),
        ("mores-base:rank=3", "mores:rank=3"),
        ("mores2:rank=2,text_rank=3", "mores:rank=2/mores:rank=3,positions=question:f4+l5"),
        (
            "reft:rank=2,last=1",
            "loreft:rank=2,positions=prompt:f4+l0/loreft:rank=2,positions=prompt:f0+l1",
        ),
        (
            "reft:kind=direft,region=question",
            "direft:positions=question:f4+l0/direft:positions=question:f0+l4",
        ),
    ],
)
def test_presets_and_composites_are_names_for_ordinary_specs(short, long):
    assert parse_spec(short) == parse_spec(long)
    assert [m.layer_choice for m in parse_spec(short)] == [m.layer_choice for m in parse_spec(long)]
    # What is printed is the ordinary form, which says the same.
    assert parse_spec(format_spec(parse_spec(short))) == parse_spec(long)


def test_the_path_of_a_file_may_contain_slashes():
    first, steer, last = parse_spec("mores/steer:alpha=2,vector=runs/a/lora/b.npz:no/lora:rank=2")
    assert (first.name, steer.name, last.name) == ("mores", "steer", "lora")
    assert steer.vector == "runs/a/lora/b.npz:no"
    assert last.rank == 2
    assert parse_spec("steer:vector=b.npz/lora")[1].name == "lora"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mores:positions=image:at(9999)", r"10000 visual tokens; an image has 9 at llm.block.out"),
        ("mores:positions=question|image:f10", r"10 visual tokens; an image has 9"),
        ("mores:positions=image:uniform(10)", r"10 visual tokens; an image has 9"),
        ("loreft:site=vision.block.out,positions=image:l10", r"image has 9 at vision.block.out"),
        ("loreft:site=connector.out,positions=question:f1", r"question.*image, roi, all"),
        ("loreft:site=vision.block.out", r"prompt.*image, roi, system, all"),
        ("loreft:site=vision.block.out,positions=all,rank=9", r"loreft:rank=9 exceeds.* 8 at vis"),
        ("direft:rank=17", r"direft:rank=17 exceeds the hidden size 16"),
        ("mrt:visual_layers=2", r"layer 2, but the model has layers 0-0"),
        ("red:layers=1-3", r"layer 3.*0-2"),
        ("adapter:layers=5-", r"layer 5.*0-2"),
        ("red:site=llm.block.q", r"llm.block.q.*llm.block.mlp.out"),
        ("steer:vector=nowhere/at_all.npz", r"nowhere/at_all.npz' is not a readable"),
    ],
)
def test_edits_that_do_not_fit_the_model_are_refused_when_it_is_built(spec, message):
    with pytest.raises(UserError, match=message):
        Tuning(spec, tiny_config())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mores:dropout=1", r"mores:dropout must be at least 0 and below 1, got 1.0"),
        ("adapter:dropout=-0.1", r"adapter:dropout.*got -0.1"),
        ("adapter:bottleneck=0", r"bottleneck must be at least 1, got 0"),
        ("houlsby:bottleneck=0", r"bottleneck must be at least 1, got 0"),
        ("consreft:init=identity", r"consreft:init 'identity'; choose from: paper"),
        ("loreft:rank=0", r"loreft:rank must be at least 1"),
        ("mores:parity=original", r"original.*paper, llava-steering"),
        ("mores:parity=llava-steering,init=identity", r"init=paper, got 'identity'"),
        ("steer:alpha=inf", r"alpha must be a finite number, got inf"),
        ("steer:alpha=much", r"steer:alpha takes a number, got 'much'"),
        ("mrt:length=0", r"mrt:length must be at least 1"),
        ("mrt:scope=all", r"mrt:scope 'all'; choose from: prompt, sequence"),
        ("reft:kind=mores", r"reft:kind 'mores'; choose from: loreft"),
        ("reft:first=0", r"reft:first must be at least 1, got 0"),
        ("mores-medium", r"mores-medium.*mores-base"),
    ],
)
def test_values_that_no_model_takes_are_refused_when_parsed(spec, message):
    with pytest.raises(UserError, match=message):
        parse_spec(spec)


def test_a_method_may_occur_twice():
    tuning = Tuning("mores:rank=1,layers=0/mores:rank=2,layers=1", tiny_config())
    assert [key for key, _ in tuning.methods] == ["mores", "mores_2"]
    assert tuning.params["mores_2"]["llm.block.out"]["rotate"].shape == (3, 16, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mores:layers=0-999999999", "name layer 999999999, but the model has layers 0-2"),
        ("mores:layers=" + "9" * 4000, r"beyond 9 digits"),
        ("mores:layers=every:" + "9" * 4000, r"beyond 9 digits"),
        ("mores:rank=" + "9" * 5000, "rank takes a whole number"),
        ("vera:rank=1000000000", "vera:rank must be at least 1 and at most 65,536, got 1000000000"),
        (
            "boft:factors=" + "9" * 99,
            "boft:factors must be .* at most 32, got a number of 329 bits",
        ),
        ("prefix:length=65537", "at most 65,536"),
        ("mores:positions=all:f2147483648", r"beyond 9 digits"),
        ("mores:positions=all:at(1;2147483648)", r"beyond 9 digits"),
        ("mores:positions=all:skip(2147483648;0)", r"beyond 9 digits"),
        ("mores:positions=all:uniform(2147483648.0)", r"beyond 9 digits"),
        ("mores:positions=word(2147483648)", "unknown region"),
        ("mores:positions=" + "|".join(["image"] * 999), "has 5,993 characters; at most 4,096"),
        ("/".join(["lora"] * 9999), "characters; at most 10,000"),
    ],
)
def test_a_small_string_costs_little(spec, message):
    with pytest.raises(UserError, match=message):
        Tuning(spec, tiny_config())


def test_a_choice_of_no_layer_is_refused():
    with pytest.raises(UserError, match=r"'shallow' select none of the model's layers 0-0"):
        parse_layers("shallow", 1)
