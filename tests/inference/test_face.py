"""`import moresjax as mj`: every name is there, none is loaded before it is used."""

import subprocess
import sys

import pytest
from conftest import clean_environment

import moresjax as mj


def test_every_name_of_the_face_is_there():
    assert sorted(mj._PLACES) == sorted(set(mj.__all__) - {"__version__"})
    assert dir(mj) == sorted(mj.__all__)
    for name in mj.__all__:
        assert getattr(mj, name) is not None
    assert mj.analyze.attention.__module__ == "moresjax.inference.analyze"
    for name in ("learn", "ground_text", "measure_shift", "coarse", "logit_lens", "States"):
        assert callable(getattr(mj.analyze, name))
    with pytest.raises(AttributeError, match="'moresjax' has no attribute 'trian'"):
        mj.trian  # noqa: B018


def test_the_face_is_quick():
    code = (
        "import sys, moresjax as mj; dir(mj); mj.UserError; "
        "print([name for name in ('jax', 'flax', 'transformers', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
