"""Beam search: the ids of `transformers`, in any batch."""

import dataclasses

import numpy as np
import pytest

from moresjax.analysis.attention import AttentionProbe
from moresjax.core.errors import UserError
from moresjax.generation.beam import Beams
from moresjax.generation.engine import Engine
from moresjax.generation.sampling import Sampling
from moresjax.testing.hf_llavas import IMAGES, NEW, PAD, Case, case_of


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("llama + clip")


@pytest.fixture(scope="module")
def eos(case) -> list[int]:
    """Two tokens that the rows say, so that hypotheses end at different times."""
    said = case.expected(num_beams=3)
    return sorted({int(said[0, 2]), int(said[1, 5])})


@pytest.fixture(scope="module")
def engine(case, eos) -> Engine:
    return Engine(case.model, eos_ids=eos, pad_id=PAD)


@pytest.mark.parametrize(
    "beams",
    [Beams(3), Beams(3, early_stopping=True), Beams(2, -1.5, "never"), Beams(4, 2.0, "never")],
)
def test_ids_of_transformers(case, engine, eos, beams):
    found = engine.generate(case.batch(), NEW, beams=beams)
    expected = case.expected(eos, **dataclasses.asdict(beams))
    np.testing.assert_array_equal(found.tokens, expected)
    ends = [next((i + 1 for i, t in enumerate(r) if t in eos), NEW) for r in expected]
    np.testing.assert_array_equal(found.length, ends)
    assert len({tuple(row) for row in expected.tolist()}) == len(IMAGES)


def test_ids_of_transformers_with_a_repetition_penalty(case, engine, eos):
    # Without images and padding, which `transformers` counts as said too.
    options = {"sampling": Sampling(repetition_penalty=1.5), "beams": Beams(3)}
    found = engine.generate(case.batch(chosen=(1,)), NEW, **options).tokens
    expected = case.expected(eos, chosen=(1,), num_beams=3, repetition_penalty=1.5)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, case.expected(eos, chosen=(1,), num_beams=3))


def test_the_search_finds_what_greedy_choice_does_not(case, engine):
    greedy = engine.generate(case.batch(), NEW).tokens
    assert not np.array_equal(engine.generate(case.batch(), NEW, beams=Beams(3)).tokens, greedy)
    one = engine.generate(case.batch(), NEW, beams=Beams(1)).tokens
    np.testing.assert_array_equal(one, greedy)


def test_other_rows_and_padding_do_not_matter(case, engine):
    together = engine.generate(case.batch(), NEW, beams=Beams(3)).tokens
    apart = engine.generate(case.batch(chosen=(3, 0), left=False), NEW, beams=Beams(3)).tokens
    np.testing.assert_array_equal(apart, np.asarray(together)[[3, 0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=0.5)}, "together with temperature"),
        ({"logprobs": True}, "num_beams=2 cannot be used together with logprobs"),
    ],
)
def test_what_does_not_go_with_a_search_is_named(case, engine, options, message):
    with pytest.raises(UserError, match=message):
        engine.generate(case.batch(), NEW, beams=Beams(2), **options)


def test_probes_do_not_go_with_a_search(case):
    engine = Engine(case.model, eos_ids=(1,), probes=(AttentionProbe(),))
    with pytest.raises(UserError, match="num_beams=2 cannot be used together with probes"):
        engine.generate(case.batch(), NEW, beams=Beams(2))


def test_settings_out_of_range_are_named():
    with pytest.raises(UserError, match="num_beams must be at least 1, got 0"):
        Beams(0)
    with pytest.raises(UserError, match=r"early_stopping 'no'.*never"):
        Beams(2, early_stopping="no")
