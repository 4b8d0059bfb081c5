"""What a finished run leaves: every method in every format, as docs/how-to/export.md says."""

import functools
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moresjax.tuning  # noqa: F401 - registers the methods
from moresjax.core.errors import UserError
from moresjax.core.parameter_names import named_parameters
from moresjax.inference import convert
from moresjax.inference.convert import export_loaded
from moresjax.inference.formats import FORMATS
from moresjax.inference.load import attach_saved
from moresjax.models.mllm import MLLM
from moresjax.testing.models import tiny_config
from moresjax.tuning.base import METHODS, Edit
from moresjax.tuning.merge import merged
from moresjax.weights.adapter import attach_adapter
from moresjax.weights.edits import written_params
from moresjax.weights.hf import load_pretrained

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "export.md"
# Keys where the defaults are too large for the tiny model, or would only take time.
SIZES = {
    "adapter": "bottleneck=4",
    "boft": "block_size=4,targets=q",
    "dora": "rank=2,targets=q",
    "houlsby": "bottleneck=4",
    "lora": "rank=2,targets=q;down",
    "m2pt": "visual_length=2,length=2",
    "oft": "block_size=4,targets=q",
    "oft-legacy": "blocks=4,targets=q",
    "ptum": "length=3",
    "qlora": "rank=2,targets=q;down",
    "vera": "rank=4,targets=q",
    "vpt": "length=2",
}
OURS = sorted(name for name, cls in METHODS.items() if cls.__module__.startswith("moresjax."))
SPECS = {name: f"{name}:{SIZES[name]}" if name in SIZES else name for name in OURS}
TOWERS = ("llm.block.", "vision.block.")  # parameters there have an axis of layers
CELL = re.compile(r"use format (\w+)$")


def filled(spec: str = "none", *, int8: bool = False) -> MLLM:
    """A tiny model whose parameters are drawn by numpy, which compiles nothing."""
    model = MLLM(tiny_config(vocab_size=31, num_layers=2, int8=int8), spec)
    for name, variable in named_parameters(model).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        drawn = 0.2 * rng.standard_normal(variable.shape)
        if variable.dtype == jnp.int8:
            drawn = 100 * drawn
        variable.set_value(jnp.asarray(drawn, variable.dtype))
    return model


def run_of(method: str) -> MLLM:
    """The end of a run: its tuning, and another connector than its base had."""
    model = filled(SPECS[method], int8=method == "qlora")
    for sites in model.tuning.params.values():
        for leaves in sites.values():
            if "vector" in leaves:  # is given, not trained
                leaves["vector"][...] = leaves["vector"][...] + 0.5
    for name, variable in named_parameters(model).items():
        if name.startswith("connector."):
            variable.set_value(variable.get_value() + 0.25)
    return model


def values(model: MLLM) -> dict[str, np.ndarray]:
    """What decides about logits: weights, and parameters of a tuning as its passes use them."""
    named = named_parameters(model).items()
    found = {n: np.asarray(x.get_value()) for n, x in named if not n.startswith("tuning.")}
    for key, method in model.tuning.methods:
        for site, leaves in model.tuning.params.get(key, {}).items():
            for leaf, x in written_params(method, leaves).items():
                x = np.asarray(x)
                if site.startswith(TOWERS):  # of layers that act
                    x = x[np.asarray(model.tuning.layer_masks[key][site][...])]
                found[f"{key}.{site}.{leaf}"] = x
    return found


def back(format: str, folder: Path, run: MLLM) -> MLLM:
    """The model that a folder makes, of adapters on the base that the run started from."""
    if format in ("hf", "merged", "tinyllava"):
        model = load_pretrained(folder)
        attach_saved(model, folder, allow_pickle=True)
        return model
    model = filled(int8=run.config.llm.int8)
    spec = "/".join(
        f"{m.name}:positions={m.positions}" for _, m in run.tuning.methods if isinstance(m, Edit)
    )
    pyreft = format == "pyreft"
    attach_adapter(model, folder, edits=spec if pyreft else "", allow_pickle=pyreft)
    return model


@pytest.fixture(autouse=True)
def merged_once(monkeypatch):
    """Merging a run once is enough for all of its formats."""
    monkeypatch.setattr(convert, "merged", functools.cache(merged))


def refused(run: MLLM, out: Path, format: str) -> str:
    """Why the run is not written; empty if it is."""
    try:
        export_loaded(run, out, format, also_train=("connector",))
    except UserError as error:
        return str(error)
    return ""


def cells(method: str, tmp_path: Path) -> list[str]:
    """What becomes of the run of a method in each format, and that it is true."""
    tuned, found = run_of(method), []
    # Whole weights are those that the eight bits of `qlora` are made of.
    whole = run_of("lora") if method == "qlora" else tuned
    for format in FORMATS:
        out = tmp_path / format
        run = whole if format in ("hf", "merged", "tinyllava") else tuned
        if refusal := refused(run, out, format):
            assert "\n" not in refusal
            assert len(refusal) < 200
            other = CELL.search(refusal)
            assert other is not None, refusal
            found.append(f"no: use `{other[1]}`")
            assert not out.exists()
            continue
        folds = format in ("merged", "tinyllava")
        expected, got = (
            values(convert.merged(run) if folds else run),
            values(back(format, out, run)),
        )
        assert expected.keys() == got.keys(), (method, format)
        for name, x in expected.items():
            np.testing.assert_allclose(got[name], x, atol=2e-5, err_msg=f"{method} {format} {name}")
        found.append("yes")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        format for format, cell in zip(FORMATS, found, strict=True) if cell == "yes"
    )
    for cell in found:
        if other := re.fullmatch(r"no: use `(\w+)`", cell):
            assert found[FORMATS.index(other[1])] == "yes"
    return found


@functools.cache
def documented() -> dict[str, list[str]]:
    """The cells of the page's table by method."""
    lines = PAGE.read_text().splitlines()
    rows = [line.strip("| \n").split(" | ") for line in lines if "|" in line]
    first = next(number for number, row in enumerate(rows) if row[0] == "method")
    assert rows[first][1:] == [f"`{format}`" for format in FORMATS]
    named = [(re.findall(r"`([\w-]+)`", row[0]), row[1:]) for row in rows[first + 2 :]]
    named = [(names, row) for names, row in named if len(row) == len(FORMATS)]
    return {name: row for names, row in named for name in names}


@pytest.mark.parametrize("method", OURS)
def test_each_format_holds_a_run_or_names_one_that_does(method, tmp_path):
    with jax.disable_jit():  # each program would run once
        assert cells(method, tmp_path) == documented()[method]


def test_the_page_names_every_method():
    assert sorted(documented()) == OURS
