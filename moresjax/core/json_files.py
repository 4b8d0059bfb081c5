"""JSON files of others, which may be damaged."""

import json
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: The file is damaged, or holds something else.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be used: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} cannot be used: it is no object")
    return values
