"""What the study of loss landscapes says, on surfaces that are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from moresjax.analysis.landscape import flatness, make_axis
from moresjax.evaluation.landscape.run import LandscapeOptions
from moresjax.studies import landscape as module
from moresjax.studies.papers import STUDIES

# How steep a bowl each method lies in.
STEEP = {"mrt": 1.0, "lora r=8": 1.0, "m2pt": 2.0, "mixlora": 0.3}


class CannedPipeline:
    """Folders alone, whose names are those of methods."""

    seeds, out, split, fast = range(5), Path("out"), "test", False

    def folder(self, seed, name):
        return Path(f"{seed}/{name}")


def bowls(runs, out, options, source):
    assert out == Path("out") / f"seed{source.seed}" / "landscape"
    assert source.split == "test"
    axis, models = make_axis(options.points, options.span), {}
    for name in runs:
        steep = STEEP[name] + (0.05 * np.sin(source.seed) if name == "lora r=8" else 0)
        grid = 0.2 + steep * np.add.outer(axis**2, axis**2)
        pair = flatness(grid, axis)
        mean = {key: {"mean": value} for key, value in (pair | {"curvature": 2 * steep}).items()}
        models[name] = {"centre": 0.2, "pairs": [{"losses": grid.tolist()}], "mean": mean}
    return {"axis": axis.tolist(), "pairs": 1, "models": models}


def test_differences_from_mrt_are_said_where_intervals_allow(monkeypatch):
    monkeypatch.setattr(module, "measure_landscapes", bowls)
    monkeypatch.setattr(module, "OPTIONS", LandscapeOptions(points=21, pairs=1))
    study = STUDIES["mrt-landscape"]
    outcome = study.make(CannedPipeline(), study)
    json.dumps(outcome.values)
    assert outcome.values["rise"]["m2pt"] == pytest.approx([2 * (0.2**2 + 0.1**2)] * 5)
    first, shares, _, bend = outcome.findings
    assert "as in the paper for m2pt; against the paper for mixlora" in first
    assert "higher with mixlora" in shares
    assert "lower with m2pt" in shares
    assert "no difference could be shown for lora r=8" in shares
    assert "higher with m2pt (+200.0" in bend
    for table in outcome.tables:
        assert [row[0] for row in table.rows] == [run.name for run in study.runs]
        assert all(len(row) == len(table.head) for row in table.rows)
    assert len(outcome.figures) == 1
