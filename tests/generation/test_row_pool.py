"""Rows that come and go one by one are given what each is given alone."""

import numpy as np
import pytest

from moresjax.generation.row_pool import PoolRequest, RowPool
from moresjax.generation.sampling import Sampling
from moresjax.testing import talking_model

TEXTS = ["how many ?", "what is the largest ?", "two ?", "is there a two ?", "the same ?"]
DRAWN = Sampling(temperature=0.8, top_k=9, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def model():
    return talking_model()


def make_pool(model, rows, **options):
    service = model.service
    return RowPool(service.engine(), service.batch, rows=rows, most=300, chunk=5, **options)


def read(pool, held, waiting=()):
    """Steps until all rows have ended; whoever waits enters a free row at once."""
    waiting, found = list(waiting), dict(held)
    tokens = {name: [] for name in found.values()}
    logprobs, likely = {}, {}
    while found:
        for new in pool.step(1 if waiting else None):
            name = found[new.slot]
            tokens[name] += new.ids.tolist()
            logprobs.setdefault(name, []).extend(new.logprobs.tolist())
            if new.likely_ids is not None:
                likely.setdefault(name, []).extend(new.likely_ids.tolist())
                assert (np.diff(new.likely_logprobs) <= 0).all()
            if new.done:
                del found[new.slot]
        while waiting and pool.num_free:
            name, request = waiting.pop()
            (slot,) = pool.admit([request])
            found[slot], tokens[name] = name, []
    return tokens, logprobs, likely


def test_rows_that_join_and_leave_are_given_what_each_is_alone(model):
    settings = [Sampling(), DRAWN, Sampling(temperature=1.0, seed=2), Sampling(), DRAWN]
    limits = [3, 40, 17, 260, 8]  # the fourth is longer than the first caches
    requests = {
        text: PoolRequest(model.prompt(text), limit, sampling=how, listed=text == "two ?")
        for text, limit, how in zip(TEXTS, limits, settings, strict=True)
    }
    pool = make_pool(model, 2)
    held = {pool.admit([requests[text]])[0]: text for text in TEXTS[:1]}
    waiting = [(text, requests[text]) for text in TEXTS[1:]]
    tokens, logprobs, likely = read(pool, held, waiting)
    assert pool.num_free == 2
    assert set(likely) == {"two ?"}
    assert len(likely["two ?"]) == len(tokens["two ?"])
    assert np.shape(likely["two ?"])[1] == 20
    for text, request in requests.items():
        options = {"sampling": request.sampling, "max_new_tokens": request.max_new_tokens}
        alone = model.generate(text, details=True, logprobs=True, **options)
        assert tokens[text] == alone.tokens.tolist(), text
        np.testing.assert_allclose(logprobs[text], alone.logprobs, atol=2e-4)


def test_a_released_row_is_free_and_the_others_go_on(model):
    pool = make_pool(model, 2)
    one, other = (PoolRequest(model.prompt(text), 20) for text in TEXTS[:2])
    held = pool.admit([one])
    held += pool.admit([other])
    first = {new.slot: new.ids.tolist() for new in pool.step()}
    pool.release(held[:1])
    assert pool.num_free == 1
    tokens, _, _ = read(pool, {held[1]: "other"})
    whole = first[held[1]] + tokens["other"]
    assert whole == model.generate(TEXTS[1], details=True, max_new_tokens=20).tokens.tolist()
