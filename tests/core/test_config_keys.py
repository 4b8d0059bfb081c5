"""Keys of foreign configurations: each is read, neutral, irrelevant or refused by name."""

import pytest

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError

KEYS = ConfigKeys(
    implemented=("size",),
    choices={"act": ("silu", "gelu")},
    neutral={"dropout": (0.0,), "names": (None, [])},
    irrelevant={"range": "of new weights"},
)


@pytest.mark.parametrize(
    "values",
    [{"size": 3, "act": "gelu", "range": 1}, {"dropout": 0, "names": []}, {"unheard_of": None}],
)
def test_what_changes_nothing_or_is_read_passes(values):
    KEYS.check(values, "config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"act": "relu"}, "config.json: act=relu is not supported, only silu or gelu are"),
        ({"dropout": 0.1}, "dropout=0.1 is not supported, only 0.0 is"),
        ({"dropout": False}, "dropout=False"),
        ({"size": 3, "unheard_of": False}, "the setting unheard_of=False is not known here"),
    ],
)
def test_all_else_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        KEYS.check(values, "config.json")


def test_the_later_of_two_lists_decides():
    both = KEYS | ConfigKeys(implemented=("dropout", "act"), neutral={"size": (4,)})
    both.check({"dropout": 0.5, "act": "relu", "size": 4, "range": 2}, "here")
    with pytest.raises(UserError, match="size=3"):
        both.check({"size": 3}, "here")
    assert both.unlisted(["names", "dropout", "other"]) == ["other"]
    assert both.listed == KEYS.listed
