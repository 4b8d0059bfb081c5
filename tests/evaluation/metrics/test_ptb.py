"""The tokeniser against outputs of Stanford's (CoreNLP 3.4.1, as `pycocoevalcap` 1.2 calls it)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.evaluation.metrics.ptb import tokenize

GOLDEN = {
    "A man's hat, and he doesn't care!": "a man 's hat and he does n't care",
    "A sign 22 3/4 inches long on 5th Ave. near St. Louis.": (
        "a sign 22\xa03/4 inches long on 5th ave. near st. louis"
    ),
    "The clock says 12:45, not 5 p.m. or 17.30.": "the clock says 12:45 not 5 p.m. or 17.30",
    'A T-shirt -- with "quotes" (and brackets) [x] {y}': (
        "a t-shirt with quotes -lrb- and brackets -rrb- -lsb- x -rsb- -lcb- y -rcb-"
    ),
    "It can't be, we cannot go; he's gonna win": "it ca n't be we can not go he 's gon na win",
    "The U.S.A. flag; Mr. Smith, Dr. Jones etc.": "the u.s.a. flag mr. smith dr. jones etc.",
    "A 3.5 inch, 1,000 gram, 10% off, $5 & co. item #1": (
        "a 3.5 inch 1,000 gram 10 % off $ 5 & co. item # 1"
    ),
    "The dogs' bowls... really?! So...": "the dogs bowls really ?! so",
    "One/two and/or three w/ a half-eaten cake": "one/two and/or three w / a half-eaten cake",
    "cats; dogs: birds -11 degrees, 1/2 cup": "cats dogs birds -11 degrees 1/2 cup",
    "A man \u2013 dash \u2014 em \u201csmart\u201d \u2018single\u2019 it\u2019s": (
        "a man dash em smart single it 's"
    ),
    "caf\u00e9 na\u00efve cr\u00eape": "caf\u00e9 na\u00efve cr\u00eape",
    "rock 'n' roll at eight o'clock, y'all, '90s style": (
        "rock 'n' roll at eight o'clock y' all '90s style"
    ),
    "John D. Rockefeller takes vitamin D. He runs": "john d. rockefeller takes vitamin d he runs",
    "no. 5 says no. A 7-eleven at 9/11/2001": "no. 5 says no a 7-eleven at 9/11/2001",
    "see https://x.org/a.jpg or mail me@x.org": "see https://x.org/a.jpg or mail me@x.org",
    "AT&T and R&B, m&m's": "at&t and r&b m & m 's",
    "a  double   space\tand tab": "a double space and tab",
}


@pytest.mark.parametrize("caption", GOLDEN)
def test_tokens_equal_those_of_the_original(caption):
    assert " ".join(tokenize(caption)) == GOLDEN[caption]


@given(st.text(st.characters(codec="ascii"), max_size=40))
@settings(deadline=None)
def test_no_text_gives_an_empty_token_or_one_with_a_capital(caption):
    tokens = tokenize(caption)
    assert all(token.strip() and token == token.lower() for token in tokens)


@given(st.lists(st.text("abdeinorst", min_size=5, max_size=8), max_size=8))
@settings(deadline=None)
def test_plain_words_stay_as_they_are(words):
    assert tokenize(" ".join(words).capitalize() + ".") == words
