"""What every key of a foreign configuration means here, so that none is ignored without a word."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moresjax.core.errors import UserError

Values = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class ConfigKeys:
    """The keys of a configuration class, each in one of four lists.

    >>> keys = ConfigKeys(
    ...     implemented=("hidden_size",),
    ...     choices={"hidden_act": ("silu", "gelu")},
    ...     neutral={"qk_layernorm": (False,)},
    ...     irrelevant={"initializer_range": "of new weights"},
    ... )
    >>> keys.check({"hidden_size": 8, "hidden_act": "gelu", "initializer_range": 1}, "here")
    >>> keys.check({"qk_layernorm": True}, "config.json")
    Traceback (most recent call last):
    moresjax.core.errors.UserError: config.json: qk_layernorm=True is not supported, only False is
    >>> keys.unlisted(["hidden_size", "rope"])
    ['rope']

    Attributes:
      implemented: Keys that are read, whatever their value; what reads them checks it.
      choices: Keys that are read -> the values that are supported.
      neutral: Keys that are not read -> the values at which they change nothing.
      irrelevant: Keys that change nothing here -> the reason, such as "of new weights".
    """

    implemented: Sequence[str] = ()
    choices: Mapping[str, Values] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, Values] = dataclasses.field(default_factory=dict)
    irrelevant: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __or__(self, other: "ConfigKeys") -> "ConfigKeys":
        """Both; a key that both list is where `other` lists it."""
        new = other.listed
        kept = {
            "choices": {k: x for k, x in self.choices.items() if k not in new},
            "neutral": {k: x for k, x in self.neutral.items() if k not in new},
            "irrelevant": {k: x for k, x in self.irrelevant.items() if k not in new},
        }
        return ConfigKeys(
            implemented=(*(k for k in self.implemented if k not in new), *other.implemented),
            choices=kept["choices"] | dict(other.choices),
            neutral=kept["neutral"] | dict(other.neutral),
            irrelevant=kept["irrelevant"] | dict(other.irrelevant),
        )

    @property
    def listed(self) -> frozenset[str]:
        """All keys."""
        return frozenset((*self.implemented, *self.choices, *self.neutral, *self.irrelevant))

    def unlisted(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that stand in no list."""
        return [key for key in keys if key not in self.listed]

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Refuses a key that is not listed, or has a value that would not be honoured.

        A key that is not listed may be None, which sets nothing.

        Args:
          values: The configuration, by key.
          where: The file, or the kind of configuration, for the message.

        Raises:
          UserError: names the first such key, its value, and what is supported.
        """
        limited = {**self.choices, **self.neutral}
        for key, value in values.items():
            if key in limited:
                if not any(_equal(value, each) for each in limited[key]):
                    allowed = " or ".join(str(each) for each in limited[key])
                    verb = "are" if len(limited[key]) > 1 else "is"
                    raise UserError(
                        f"{where}: {key}={_short(value)} is not supported, only {allowed} {verb}"
                    )
            elif value is not None and key not in self.listed:
                raise UserError(
                    f"{where}: the setting {key}={_short(value)} is not known here and would be "
                    "ignored; remove it if the model does not depend on it"
                )


def _equal(value: object, other: object) -> bool:
    """Whether both are the same value of a JSON file; 1 is not True, but 1 is 1.0."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
