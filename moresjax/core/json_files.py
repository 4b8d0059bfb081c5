"""JSON files of others, which may be damaged."""

from pathlib import Path
from typing import Any

from moresjax.core.reading import read_json


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      UserError: The file is damaged, or holds something else.
    """
    return read_json(file, dict[str, Any])
