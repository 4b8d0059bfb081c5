"""Exact parameter counts against the papers' tables (`moresjax params`)."""

import json

import pytest
from tiny import tiny_config

from moresjax.cli import main
from moresjax.models.zoo import mllm_config
from moresjax.tuning.count import count_parameters

LLMS = ("phi-2", "vicuna-7b", "vicuna-13b")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mores:rank=1", (163_872, 262_176, 409_640)),
        ("mores:rank=2", (327_744, 524_352, 819_280)),
        ("mores:rank=4", (655_488, 1_048_704, 1_638_560)),
        ("mores:rank=8", (1_310_976, 2_097_408, 3_277_120)),
        ("lora:rank=128", (188_743_680, 319_815_680, 500_695_040)),
        ("mores-base", (163_872, 262_176, 409_640)),
        ("mores-large", (327_744, 524_352, 819_280)),
        ("mores-huge", (655_488, 1_048_704, 1_638_560)),
        ("adapter:bottleneck=256", (83_886_080, 201_326_592, 314_572_800)),
        ("ia3", (491_520, 614_400, 962_560)),
        ("full", (2_779_683_840, 6_738_415_616, 13_015_864_320)),
        ("none", (0, 0, 0)),
    ],
)
def test_published_counts(spec, expected):
    for llm, count in zip(LLMS, expected, strict=True):
        assert count_parameters(mllm_config(llm), spec, ()).trainable_in_llm == count


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mrt", 2_429_328),
        ("mrt-paper", 2_429_328),
        ("mrt-code", 2_417_034),
        ("reft:rank=4", 2_097_408),
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
