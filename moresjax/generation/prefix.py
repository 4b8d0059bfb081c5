"""What prompts have in common at their beginning, so that it is read once for all of them.

The questions of a benchmark begin with the same system prompt, those of a few-shot task with the
same examples. Keys and values of these tokens depend on nothing that comes after them, unless an
attached method looks ahead.
"""

from collections.abc import Sequence

import numpy as np

from moresjax.data.processor import FIELDS, Row
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Edit, WeightDelta
from moresjax.tuning.selectors import REGIONS, parse_selector

LEAST = 8  # tokens in common
SAVED = 256  # tokens of all rows, below which another program is not worth compiling


def common_prefix(rows: Sequence[Row], tuning: Tuning) -> Row | None:
    """The row of the tokens that all prompts begin with, up to the first image.

    Every prompt keeps a token of its own. None where the tokens are few, or where a method would
    treat them otherwise if they were the whole prompt.
    """
    size = min((len(row["tokens"]) for row in rows), default=1) - 1
    first = rows[0] if rows else {}
    for row in rows:
        equal = np.all([row[n][:size] == first[n][:size] for n in ("tokens", *FIELDS)], axis=0)
        equal &= row["image"][:size] < 0
        size = size if equal.all() else int(np.argmin(equal))
    if size < LEAST or size * (len(rows) - 1) < SAVED:
        return None
    head = {name: first[name][:size] for name in ("tokens", *FIELDS)}
    return head if _stands_alone(tuning, set(head["segment"].tolist())) else None


def _stands_alone(tuning: Tuning, segments: set[int]) -> bool:
    """Whether what the methods do to tokens of these segments, all that come first in a prompt,
    does not depend on the rest of it."""
    for _, method in tuning.methods:
        if isinstance(method, WeightDelta) and method.sees_tokens:
            return False
        if not isinstance(method, Edit):
            continue
        for region, part in parse_selector(method.positions).parts:
            counted = part.kind != "all" and segments & set(REGIONS[region])
            if counted or region == "last_prompt":
                return False
    return True
