"""Kills inside every write of JSON: what is there is the old file or the new one."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import clean_environment


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.all_faults)])
def test_a_write_that_is_killed_anywhere_leaves_the_old_file_or_the_new_one(stride, tmp_path):
    program = Path(__file__).with_name("kill_writes.py")
    arguments = [sys.executable, str(program), str(tmp_path), str(stride)]
    done = subprocess.run(arguments, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000 // stride
