"""Exact parameter counts against the papers' tables (`moresjax params`)."""

import json
import re
from pathlib import Path

import pytest

from moresjax.cli import main
from moresjax.models.count import count_parameters
from moresjax.models.zoo import mllm_config
from moresjax.testing.models import tiny_config

LLMS = ("phi-2", "vicuna-7b", "vicuna-13b")


DOCS = Path(__file__).parents[2] / "docs" / "reference" / "methods.md"


def documented(columns: str) -> list[list[str]]:
    """Cells of the rows below a table's header in the page on methods."""
    below = DOCS.read_text().split(f"| {columns} |\n", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in below.splitlines()[1:]]


def agrees(printed: str, value: float) -> bool:
    """Whether a printed figure is the value, rounded to as many digits as it has."""
    number, unit = re.fullmatch(r"([\d.]+)([MB%])", printed).groups()
    digits = len(number.partition(".")[2])
    return f"{value / {'M': 1e6, 'B': 1e9, '%': 0.01}[unit]:.{digits}f}" == number


STEERING = documented("method | spec | Phi-2 | Vicuna-7B | Vicuna-13B | printed")
MRT = documented("method | spec | also trained | trainable | share | printed")


@pytest.mark.parametrize("row", STEERING, ids=lambda row: row[0])
def test_the_documented_counts_of_llava_steering(row):
    _, spec, *counts, printed = row
    found = [count_parameters(mllm_config(x), spec.strip("`"), ()).trainable_in_llm for x in LLMS]
    assert [f"{count:,d}" for count in found] == counts
    for figure, count in zip(printed.split(" / "), found, strict=False):
        figure, _, correction = figure.partition(" (should be ")
        assert agrees(figure, count) != bool(correction)
        assert not correction or agrees(correction.rstrip(")"), count)


@pytest.mark.parametrize("row", MRT, ids=lambda row: row[0])
def test_the_documented_counts_of_mrt(row):
    _, spec, also, count, share, printed = row
    config = mllm_config("vicuna-7b", "clip-l-14-224", "linear")
    report = count_parameters(config, spec.strip("`"), tuple(filter(None, also.split(", "))))
    added = report.components["tuning"].total if "tuning" in report.components else 0
    assert report.total - added == 7_045_793_792
    assert f"{report.trainable:,d}" == count
    found = report.trainable / (report.total - added)
    assert agrees(share, found)
    figure, _, remark = printed.partition(" ")
    assert agrees(figure, found) != bool(remark)


def test_every_method_of_the_tables_is_documented():
    assert [row[0] for row in STEERING][:-1] == [
        *("FT", "Adapter", "LoRA", "OFT", "IA3", "MoReS-B", "MoReS-L", "MoReS-H")
    ]
    assert {"fine-tuning", "LoRA", "ReFT", "MRT"} < {row[0] for row in MRT}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mrt", 2_429_328),
        ("control", 23 * 12_294 + 49_158 + 32_772),
        ("control:groups=text", 32_772),
        ("control:groups=visual;connector", 23 * 12_294 + 49_158),
        ("loreft:rank=4", 1_048_704),
        ("noreft:rank=4", 1_048_704),
        ("direft:rank=4", 1_048_704),
        ("nodireft:rank=4", 1_048_704),
        ("consreft:rank=4", 524_416),
        ("lobireft:rank=4", 524_416),
        ("mores2:rank=1", 524_352),
        ("red", 262_144),
        ("houlsby:bottleneck=64", 33_820_672),
        ("steer", 0),
        ("prompt:length=10", 40_960),
        ("prefix:length=10", 2_621_440),
        ("ptum:length=64", 8_388_608),
        ("vpt:length=20", 23 * 20 * 1024),  # the last block's output is not used
        ("vpt:length=20,deep=false", 20 * 1024),
        ("aprompt", 1_310_720 + 2_621_440),
        ("m2pt", 23 * 10 * 1024 + 1_310_720 + 4_198_400 + 131_072_000),
    ],
)
def test_counts_on_the_model_of_mrt(spec, expected):
    config = mllm_config("vicuna-7b", "clip-l-14-224", "linear")
    assert count_parameters(config, spec, ()).trainable == expected


def test_totals_with_the_connector():
    config = mllm_config("phi-2", "siglip-so400m-14-384")
    assert count_parameters(config, "mores:rank=1").trainable == 9_671_712
    assert count_parameters(config, "ia3").trainable == 9_999_360
    assert count_parameters(config, "lora:rank=128").trainable == 198_251_520


def test_only_chosen_layers_count():
    config = mllm_config("phi-2")
    report = count_parameters(config, "mores:rank=1,layers=every:4", ())
    assert report.trainable_in_llm == 163_872 // 4


def test_parts_add_up():
    report = count_parameters(tiny_config(), "lora:rank=2/mores:rank=1")
    assert report.total == sum(c.total for c in report.components.values())
    assert report.components["connector"].trainable == report.components["connector"].total
    assert report.components["vision"].trainable == 0


def test_the_command_prints_the_same(capsys):
    arguments = ["params", "--llm", "vicuna-7b", "--vision", "clip-l-14-336"]
    assert main([*arguments, "--tuning", "mores:rank=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable_in_llm"] == 262_176
    assert report["trainable"] == 262_176 + 20_979_712
    assert main([*arguments, "--tuning", "mores:rank=1"]) == 0
    assert "262,176" in capsys.readouterr().out
