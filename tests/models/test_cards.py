"""`moresjax zoo`: every name has a card with its exact size."""

import json

import pytest

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.models.zoo import ENCODERS, LLMS, MODELS, mllm_config


def test_every_name_has_a_card(capsys):
    assert main(["zoo", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert set(cards) == {*LLMS, *ENCODERS, *MODELS}
    assert cards["phi-2"]["parameters"] == 2_779_683_840
    assert cards["vicuna-13b"]["parameters"] == 13_015_864_320
    parts = ("vicuna-7b", "clip-l-14-336")
    whole = sum(cards[part]["parameters"] for part in parts) + 20_979_712  # the connector
    assert cards["llava-1.5-7b"]["parameters"] == whole
    assert cards["clip-l-14-336"]["text"] == "576 tokens of 1024 at 336 px"
    assert cards["eva-g-14-448"]["text"] == "1024 tokens of 1408 at 448 px"
    # BLIP-2's count at 224 px is 985,952,256, with 39 biases of keys; more positions at 448 px.
    assert cards["eva-g-14-448"]["parameters"] == 985_952_256 - 39 * 1408 + 3 * 256 * 1408
    assert cards["minigpt-v2"]["text"] == "llama-2-7b + eva-g-14-448 + concat4-linear"
    # The tensors of the published checkpoints.
    assert cards["gemma-3-4b"]["parameters"] == 4_300_079_472
    assert cards["gemma-3-12b"]["parameters"] == 12_187_325_040
    assert cards["gemma-3-27b"]["parameters"] == 27_432_406_640
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cards)
    assert any("2,779,683,840" in line for line in lines)


def test_whole_models_are_named_like_llms():
    config = mllm_config("llava-steering-3b")
    assert (config.llm, config.vision) == (LLMS["phi-2"], ENCODERS["siglip-so400m-14-384-728"])
    assert config.visual_tokens == 728
    assert mllm_config("minigpt-v2").visual_tokens == 256
    assert mllm_config("gemma-3-4b").visual_tokens == 256
    with pytest.raises(UserError, match=r"LLM 'llava-2'.*llama-2-7b.*llava-1.5-7b"):
        mllm_config("llava-2")
