"""What happens to samples that cannot be used: none is dropped or cut without being counted."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from moresjax.core.errors import UserError, choice_error
from moresjax.core.folders import set_aside
from moresjax.core.json_files import read_object, write_json
from moresjax.data.records import ChangedFile

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
      cut: What its source left out of a sample, by its number.
      told: How many skipped samples are named in the log; None for all.
    """

    on_bad_sample: str
    num_samples: int
    skipped: dict[int, str] = dataclasses.field(default_factory=dict)
    cut: dict[int, str] = dataclasses.field(default_factory=dict)
    told: int | None = None

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
            bad, or the file of the samples has changed.
        """
        try:
            return make()
        except ChangedFile:
            raise
        except UserError as error:
            if self.on_bad_sample == "raise":
                raise
            if number not in self.skipped and (self.told is None or len(self.skipped) < self.told):
                logger.warning("skipped: %s", error)
            self.skipped[number] = str(error)
        if len(self.skipped) == self.num_samples:
            raise UserError(
                f"all {self.num_samples} samples are bad, the last one: {self.skipped[number]}"
            )
        return None

    def note_cut(self, number: int, name: str, what: str) -> None:
        """Remembers what a sample goes without; the first one is told at once."""
        if number in self.cut:
            return
        if not self.cut:
            logger.warning("cut: sample %s: %s; all such samples are listed", name, what)
        self.cut[number] = f"sample {name}: {what}"

    def save(self, path: Path) -> None:
        """Adds the skipped and the cut samples to a JSON file, made only if there are some."""
        skipped, cut = dict(self.skipped), dict(self.cut)  # reading threads may add to them
        if not skipped and not cut:
            return
        known, known_cut = _told_before(path)
        known, known_cut = known | _by_number(skipped), known_cut | _by_number(cut)
        report: dict = {"skipped": len(known), "samples": known}
        if known_cut:
            report |= {"cut": len(known_cut), "cut_samples": known_cut}
        write_json(path, report)


def _told_before(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The skipped and the cut samples of a file; a damaged one is set aside, none is lost."""
    if not path.is_file():
        return {}, {}
    try:
        report = read_object(path)
        return dict(report.get("samples", {})), dict(report.get("cut_samples", {}))
    except (UserError, ValueError, TypeError) as error:
        logger.warning("%s; it is kept as %s, and a new one is begun", error, set_aside(path).name)
        return {}, {}


def _by_number(told: Mapping[int, str]) -> dict[str, str]:
    return {str(number): text for number, text in sorted(told.items())}
