"""The identity of a run that its checkpoints carry, read without anything else of them."""

import json
from pathlib import Path
from typing import Any


def saved_identity(directory: str | Path) -> tuple[int, dict[str, Any]]:
    """Step of the newest checkpoint, and the identity of the run that is saved with it.

    Returns:
      0 where there is no checkpoint; an empty identity where none was saved or it is damaged.
    """
    steps = [int(path.name) for path in Path(directory).glob("[0-9]*") if path.name.isdigit()]
    newest = max(steps, default=0)
    try:
        meta = json.loads((Path(directory) / str(newest) / "meta" / "metadata").read_text())
        return newest, dict(meta.get("identity", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return newest, {}
