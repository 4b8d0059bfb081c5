"""What happens to samples that cannot be used: none is dropped without being counted."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moresjax.core.errors import UserError, choice_error

T = TypeVar("T")

logger = logging.getLogger(__name__)

CHOICES = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class SkipPolicy:
    """Ends a run at the first bad sample, or skips bad samples and keeps a list of them.

    Attributes:
      on_bad_sample: `raise` ends the run with the sample's error; `skip` goes on without it.
      num_samples: How many samples there are; the last good one must not be skipped.
      skipped: The error message of every skipped sample, by its number.
    """

    on_bad_sample: str
    num_samples: int
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_bad_sample not in CHOICES:
            raise choice_error("on_bad_sample", self.on_bad_sample, CHOICES)

    def attempt(self, number: int, make: Callable[[], T]) -> T | None:
        """What `make` returns, or None where its sample is bad and skipped.

        Args:
          number: The number of the sample.
          make: Reads the sample; it raises a `UserError` when the sample is bad.

        Raises:
          UserError: What `make` raised, unless bad samples are skipped; also when every sample is
            bad.
        """
        try:
            return make()
        except UserError as error:
            if self.on_bad_sample == "raise":
                raise
            if number not in self.skipped:
                logger.warning("skipped: %s", error)
            self.skipped[number] = str(error)
        if len(self.skipped) == self.num_samples:
            raise UserError(
                f"all {self.num_samples} samples are bad, the last one: {self.skipped[number]}"
            )
        return None

    def save(self, path: Path) -> None:
        """Adds the skipped samples to a JSON file, which is made only if there are some."""
        skipped = dict(self.skipped)  # reading threads may add to it meanwhile
        if not skipped:
            return
        known = json.loads(path.read_text())["samples"] if path.is_file() else {}
        known |= {str(number): message for number, message in sorted(skipped.items())}
        report = {"skipped": len(known), "samples": known}
        path.write_text(json.dumps(report, indent=2) + "\n")
