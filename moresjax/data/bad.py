"""What happens to samples that cannot be used: nothing is dropped without being counted."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moresjax.core.errors import UserError, choice_error

T = TypeVar("T")

logger = logging.getLogger(__name__)

POLICIES = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class BadSamples:
    """Lets the errors of bad samples pass, or collects them.

    Attributes:
      policy: `raise` ends the run with the first one; `skip` goes on without it.
      total: samples there are.
      found: message by number of the sample.
    """

    policy: str
    total: int
    found: dict[int, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise choice_error("on_bad_sample", self.policy, POLICIES)

    def guard(self, index: int, make: Callable[[], T]) -> T | None:
        """What `make` returns; None for a bad sample that is skipped.

        Raises:
          UserError: what `make` raised under `raise`; when there is no good sample.
        """
        try:
            return make()
        except UserError as error:
            if self.policy == "raise":
                raise
            if index not in self.found:
                logger.warning("skipped: %s", error)
            self.found[index] = str(error)
        if len(self.found) == self.total:
            raise UserError(f"all {self.total} samples are bad, the last one: {self.found[index]}")
        return None

    def save(self, path: Path) -> None:
        """Adds what was found to a JSON file; no file is made for nothing."""
        found = dict(self.found)  # reading threads may add to it meanwhile
        if not found:
            return
        known = json.loads(path.read_text())["samples"] if path.is_file() else {}
        known |= {str(index): message for index, message in sorted(found.items())}
        report = {"skipped": len(known), "samples": known}
        path.write_text(json.dumps(report, indent=2) + "\n")
