"""What tests of a server's threads wait for."""

import threading
from collections.abc import Callable


def until(condition: Callable[[], object]) -> None:
    """Returns when a condition holds.

    Raises:
      AssertionError: It does not within ten seconds.
    """
    for _ in range(5000):
        if condition():
            return
        threading.Event().wait(0.002)
    raise AssertionError("it never happens")
