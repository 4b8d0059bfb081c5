"""Settings of the host process, tried in processes of their own."""

import os
import subprocess
import sys

CODE = """
import os, sys
from moresjax.hardware.host import use_huge_pages
print("started", sys.argv[1:], flush=True)
real = sys.platform, sys.executable
{before}
use_huge_pages()
sys.platform, sys.executable = real
import jax.numpy as jnp
x = jnp.ones((256, 256))
assert float((x @ x).sum()) == 256.0**3
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"))
"""


def run(tunables: str | None = None, before: str = "") -> tuple[list[str], int]:
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    env |= {"GLIBC_TUNABLES": tunables} if tunables is not None else {}
    command = [sys.executable, "-c", CODE.format(before=before), "an argument", "--b"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return lines, process.pid


def test_the_same_process_starts_again_once_with_its_arguments():
    (*started, last), pid = run()
    assert started == ["started ['an argument', '--b']"] * 2
    assert last == f"{pid} glibc.malloc.hugetlb=1"


def test_other_settings_of_the_c_library_stay():
    assert run("glibc.malloc.check=0")[0][-1].endswith(
        " glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    )


def test_a_choice_is_respected_and_other_systems_are_left_alone():
    for lines in (
        run("glibc.malloc.hugetlb=0")[0],
        run(before="sys.platform = 'darwin'")[0],
        run(before="sys.executable = ''")[0],
    ):
        assert len(lines) == 2
        assert "hugetlb=1" not in lines[1]
