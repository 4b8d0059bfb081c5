"""What a finished demo left behind: its base model and the adapters of stage 2."""

import dataclasses
from pathlib import Path

from moresjax.core.json_files import read_object
from moresjax.weights.adapter import DESCRIPTION

# Adapters that are the whole LLM, which rows of one batch share.
WHOLE = ("full", "partial")


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The models of a demo.

    Attributes:
      base: The workdir of stage 1, which all adapters are put on.
      adapters: The adapter folders by name, one of which every row of a batch may choose.
      alone: Those that train the LLM itself, and have to be loaded alone.
    """

    base: Path
    adapters: dict[str, Path]
    alone: dict[str, Path]


def demo_result(folder: str | Path) -> DemoResult | None:
    """The models of the demo in a folder; None for a folder of another kind.

    Raises:
      UserError: An adapter's file is damaged.
    """
    base, adapters = Path(folder) / "seed0" / "pretrain", Path(folder) / "adapters"
    if not (base.is_dir() and adapters.is_dir()):
        return None
    found = sorted(path for path in adapters.iterdir() if (path / DESCRIPTION).is_file())
    specs = {path: str(read_object(path / DESCRIPTION).get("spec")) for path in found}
    alone = {path.name: path for path in found if specs[path].partition(":")[0] in WHOLE}
    return DemoResult(base, {p.name: p for p in found if p.name not in alone}, alone)
