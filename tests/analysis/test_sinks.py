"""Attention sinks: planted ones are found, and shares without them are counted by hand."""

from typing import Any

import numpy as np
import pytest

from moresjax.analysis.sinks import sink_dimensions, sink_shares, sink_values
from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.inference.analyze import attention, find_sinks
from moresjax.testing import talking_model

QUESTION, IMAGE = "how many ?", np.arange(432, dtype=np.uint8).reshape(12, 12, 3)


def test_massive_activations_of_the_first_token_name_the_dimensions():
    states = np.random.default_rng(0).standard_normal((2, 5, 900))
    states[1, 0, 7] = states[1, 3, 7] = 1000  # the first token, and another one, in layer 1
    states[0, 2, 8] = 1000  # a dimension that is not one of the first token's
    assert sink_dimensions(states) == [7]
    assert np.argwhere(sink_values(states, [7]) >= 20).tolist() == [[1, 0], [1, 3]]
    assert not (sink_values(states, []) > 0).any()
    # 20 times the root mean square cannot be in less than 400 features.
    assert sink_dimensions(states[..., :399]) == []


def test_shares_and_ratios_without_sinks_by_hand():
    kinds = [TokenKind.SYSTEM, TokenKind.IMAGE, TokenKind.IMAGE, TokenKind.QUESTION]
    attention = np.asarray([[[0.5, 0.2, 0.1, 0.2]]])
    sinks = np.asarray([[True, True, False, False]])
    found = sink_shares(
        attention, np.asarray([int(kind) for kind in kinds]), np.ones((1, 4), bool), sinks
    )
    np.testing.assert_allclose(found.share, [[0.5, 0.3, 0.2, 0]])
    np.testing.assert_allclose(found.share_without, [[0, 1 / 3, 2 / 3, 0]])
    np.testing.assert_allclose(found.lmar, [0.15 / 0.2])
    np.testing.assert_allclose(found.lmar_without, [0.1 / 0.2])
    np.testing.assert_allclose(found.sink_share, [[0.2, 0.5]])


@pytest.mark.parametrize("tuning", ["none", "prompt:length=2"])
def test_shares_with_sinks_are_those_of_the_probe(tuning):
    model = talking_model(tuning)
    said = model.generate(QUESTION, IMAGE, max_new_tokens=2)
    found = find_sinks(model, QUESTION, IMAGE, answer=said, tau=2.0)
    assert found.sinks.any()
    assert not found.sinks.all()
    assert found.counts.sum() == found.sinks.sum()
    assert found.tokens[0] == "<s>"
    wanted = attention(model, QUESTION, IMAGE, max_new_tokens=len(said.split()))
    if tuning == "none":  # else virtual tokens have a part, which the probe counts as system
        np.testing.assert_allclose(found.shares.share, wanted.share, atol=1e-5)
    np.testing.assert_allclose(found.shares.lmar, wanted.lmar["text"], rtol=1e-3)


def test_a_planted_sink_is_named_in_the_layers_that_read_it():
    model = talking_model()
    table = model.mllm.llm.embed.table
    first = int(model.prompts.row(QUESTION, [IMAGE]).tokens[0])
    table.set_value(table[...].at[first, 3].set(1e8))
    found = find_sinks(model, QUESTION, IMAGE, answer="two", tau=3.9)
    assert found.dimensions == [3]
    assert found.sinks[:, 0].all()
    assert found.counts[0].tolist() == [0, 1]
    share = found.shares.share[0]
    kept = share - [found.shares.sink_share[0, 1], 0, 0, 0]
    np.testing.assert_allclose(found.shares.share_without[0], kept / kept.sum(), atol=1e-5)


def test_what_is_no_rule_is_told():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tau": 0.0}, "tau must be above 0, got 0"),
        ({"dimensions": [16]}, "the LLM has dimensions 0 to 15, got 16"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            find_sinks(talking_model(), QUESTION, IMAGE, answer="two", **options)
