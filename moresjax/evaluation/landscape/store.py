"""Finished points of landscapes: `points.json` says what they are, `points.jsonl` has them.

A line of `points.jsonl` is a chunk of points of one model and pair of directions, written when it
is done; a killed process loses one chunk at most. A model is known by its weights, so that models
that come later use the same folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moresjax.core.errors import UserError
from moresjax.core.folders import check_new
from moresjax.core.json_files import append_log, read_log, read_object, write_json, write_log
from moresjax.evaluation.rows import LandscapeRow

POINTS, FACTS, RESULT = "points.jsonl", "points.json", "landscape.json"
CURVATURE = -1  # in place of the first point of a chunk


class PointStore:
    """Finished chunks of points in a folder, or in memory alone.

    Args:
      folder: The folder; None keeps nothing. Several processes share it, and the first writes.
      facts: What the points are, which must be what the folder says.

    Attributes:
      facts: The same.

    Raises:
      UserError: The folder holds something else, or points of other facts.
    """

    def __init__(self, folder: str | Path | None, facts: Mapping[str, Any]) -> None:
        self.facts, self._folder = dict(facts), None if folder is None else Path(folder)
        self._writes = self._folder is not None and jax.process_index() == 0
        self._chunks: dict[tuple[str, int], dict[int, list[Any]]] = {}
        if self._folder is None:
            return
        self._check(self._folder)
        path = self._folder / POINTS
        rows = read_log(path, LandscapeRow)
        for row in rows:
            self._chunks.setdefault((row["model"], row["pair"]), {})[row["first"]] = row["losses"]
        if rows and self._writes:
            write_log(path, rows)  # without half a line that a killed process left

    def _check(self, folder: Path) -> None:
        path = folder / FACTS
        if not path.is_file():
            check_new(folder, "landscape")
            if self._writes:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, self.facts)
            return
        there = read_object(path)
        for name, value in self.facts.items():
            if there.get(name) != value:
                raise UserError(
                    f"{folder} holds points with {name}={there.get(name)!r}, not {value!r}; choose "
                    "another folder"
                )

    def chunks(self, model: str, pair: int) -> dict[int, list[float]]:
        """Losses of chunks by their first points."""
        known = self._chunks.get((model, pair), {})
        return {first: losses for first, losses in known.items() if first != CURVATURE}

    def curvature(self, model: str, pair: int) -> list[list[float]] | None:
        """The curvature of a pair, where it is known."""
        return self._chunks.get((model, pair), {}).get(CURVATURE)

    def add(self, model: str, pair: int, first: int, losses: list[Any]) -> None:
        """Keeps a chunk, or a curvature with `CURVATURE` for its first point."""
        if self._folder is not None and self._writes:
            row = {"model": model, "pair": pair, "first": first, "losses": losses}
            append_log(self._folder / POINTS, row)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes the result."""
        if self._folder is not None and self._writes:
            write_json(self._folder / RESULT, result, indent=1)
