"""Every number that a user sets has a range, and nothing outside of it gets through."""

import dataclasses
import math
import typing

import pytest

import moresjax.tuning  # noqa: F401 (registers the methods)
from moresjax.core.errors import UserError
from moresjax.core.ranges import Range, check_ranges, ranges_of
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionConfig
from moresjax.runs.architecture import check_fields
from moresjax.runs.config import load_config
from moresjax.runs.run_config import RunConfig
from moresjax.testing.models import tiny_config
from moresjax.tuning.base import METHODS
from moresjax.tuning.spec import parse_spec


def is_number(hint):
    """Whether a hint is that of a number, or of a tuple of numbers."""
    return hint in (int, float) or any(map(is_number, typing.get_args(hint)))


def numeric_fields(kind):
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if is_number(hints[field.name]):
            yield field.name, hints[field.name]


def refused(allowed, hint):
    """Numbers of a field's type that its range does not have."""
    numbers = [] if str(allowed) == "a finite number" else outside(allowed)
    if float in (hint, *typing.get_args(hint)):
        return [math.nan, math.inf, *map(float, numbers)]
    return [number for number in numbers if isinstance(number, int)]


def outside(allowed):
    """The nearest numbers beyond each end of a range."""
    ends = [(allowed.least, -1), (allowed.most, 1), (allowed.above, 0), (allowed.below, 0)]
    numbers = [end + step for end, step in ends if math.isfinite(end)]
    return [number for number in numbers if number not in allowed.also] or [-7]


def all_settings(kind=RunConfig, prefix=""):
    """Dotted key, dataclass and field of every number of a configuration, at any depth."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from all_settings(hints[field.name], f"{prefix}{field.name}.")
    for name, hint in numeric_fields(kind):
        yield f"{prefix}{name}", kind, name, hint


SETTINGS = list(all_settings())


def test_the_walk_meets_every_depth():
    keys = [key for key, *_ in SETTINGS]
    assert {"steps", "optimizer.lr", "mesh.fsdp", "model.classes", "watchdog"} <= {*keys}
    assert len(keys) == 32


@pytest.mark.parametrize(("key", "kind", "name", "hint"), SETTINGS, ids=[k for k, *_ in SETTINGS])
def test_every_number_of_a_configuration_has_a_range(key, kind, name, hint):
    allowed = ranges_of(kind).get(name)
    assert allowed, f"{key} has no range"
    for number in refused(allowed, hint):
        value = (number,) if typing.get_origin(hint) is tuple else number
        with pytest.raises(UserError, match=rf"^x {name} must be .*, got {number}$"):
            check_ranges(dataclasses.replace(kind(), **{name: value}), "x ")


@pytest.mark.parametrize("kind", [DecoderConfig, VisionConfig])
def test_every_number_of_a_part_has_a_range(kind):
    assert len(list(numeric_fields(kind))) > 15
    for name, hint in numeric_fields(kind):
        allowed = ranges_of(kind).get(name)
        assert allowed, f"{name} has no range"
        for number in refused(allowed, hint):
            with pytest.raises(UserError, match=f"^{name} of the part must be .*, got {number}$"):
                check_fields("part", {name: number}, kind)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_number_of_a_tuning_method_has_a_range(name):
    kind = METHODS[name]
    for field, hint in numeric_fields(kind):
        allowed = ranges_of(kind).get(field)
        assert allowed, f"{name}:{field} has no range"
        for number in refused(allowed, hint):
            with pytest.raises(UserError, match=rf"^{name}:{field} must be .*, got {number}$"):
                kind(**{field: number})
            with pytest.raises(UserError, match=f"{name}:{field} must be"):
                parse_spec(f"{name}:{field}={number}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "config key optimizer.lr must be above 0, got -1.0"),
        ("optimizer.clip=-1", "config key optimizer.clip must be at least 0, got -1.0"),
        (
            "optimizer.warmup=7",
            "config key optimizer.warmup must be at least 0 and at most 1, got 7",
        ),
        ("checkpoint.keep=0", "config key checkpoint.keep must be at least 1, got 0"),
        ("mesh.fsdp=0", "config key mesh.fsdp must be -1 or at least 1, got 0"),
        ("buckets=(64,-1)", "config key buckets must be at least 1, got -1"),
        ("data.size=1e999", "config key data.size must be a finite number, got inf"),
    ],
)
def test_a_number_out_of_range_on_the_command_line(override, message):
    with pytest.raises(UserError) as error:
        load_config("digits:stage=llm", [override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("spec", ["lora", "dora:targets=q", "mixlora:factors=99", "mores"])
def test_a_rank_is_not_beyond_the_matrix(spec):
    config = tiny_config()
    beyond = config.llm.hidden_size + 1
    with pytest.raises(UserError, match=f"rank.*{beyond - 1}"):
        MLLM(config, f"{spec}{',' if ':' in spec else ':'}rank={beyond}")


def test_a_range_says_what_it_allows():
    assert 0 in Range(0, below=1)
    assert 1 not in Range(0, below=1)
    assert math.nan not in Range()
    assert str(Range(above=0, most=2)) == "above 0 and at most 2"
