"""Settings of the host process, tried in processes of their own."""

import subprocess
import sys

import pytest

CALLS = """
import sys
from moresjax.parallel.host import keep_freed_memory
answers = [keep_freed_memory() for _ in range({calls})]
assert all(type(answer) is bool for answer in answers), answers
assert len(set(answers)) == 1, answers
blocks = [bytearray(n << 20) for n in (1, 40, 200)]
del blocks
import jax.numpy as jnp
x = jnp.ones((256, 256))
assert float((x @ x).sum()) == 256.0**3
print(answers[0])
"""


@pytest.mark.parametrize("calls", [1, 2])
def test_keeping_freed_memory_is_harmless(calls):
    done = subprocess.run(
        [sys.executable, "-c", CALLS.format(calls=calls)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "False")


def test_another_system_is_left_alone():
    code = "import sys; sys.platform = 'darwin'\n"
    code += "from moresjax.parallel.host import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
