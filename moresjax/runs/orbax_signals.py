"""How the threads of an Orbax save wait for each other in a process that runs alone.

Orbax's own way waits for five minutes after one of them has failed, since nobody tells the others,
and takes the time of day for a duration: when the clock is set back by a year, it waits that year.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint._src.futures import signaling_client

from moresjax.core.folders import disk_reason


class SaveSignals(signaling_client.ThreadSafeKeyValueSignalingClient):
    """Signals between threads, which can be told that what they wait for will not come."""

    def __init__(self) -> None:
        super().__init__()
        self._failures = 0

    def fail(self) -> None:
        """Ends the waiting of every thread that waits now."""
        with self._condition:
            self._failures += 1
            self._condition.notify_all()

    def blocking_key_value_get(self, key: str, timeout_secs: int) -> str:
        """The value of a key, once it has one.

        Args:
          key: The key.
          timeout_secs: The longest time to wait, by a clock that nobody sets.

        Raises:
          TimeoutError: It did not come in time, or `fail` was called.
        """
        end = time.monotonic() + timeout_secs
        with self._condition:
            before = self._failures
            while key not in self._data:
                left = end - time.monotonic()
                if self._failures > before or left <= 0:
                    raise TimeoutError(f"{key} did not come")
                # A condition waits by the monotonic clock, too.
                self._condition.wait(min(left, threading.TIMEOUT_MAX))
            return self._data[key]


_signals = SaveSignals()


def use_signals() -> SaveSignals | None:
    """The signals of this process, which Orbax uses from now on.

    None for one of several processes, whose saves wait for each other with the help of JAX.
    """
    if jax.distributed.is_initialized():
        return None
    if signaling_client.get_signaling_client is not _own:
        signaling_client.get_signaling_client = _own
        sys.unraisablehook = _Unraisable(sys.unraisablehook)
        logging.getLogger("asyncio").addFilter(_of_others)
    return _signals


def _own() -> SaveSignals:
    return _signals


def _of_others(record: logging.LogRecord) -> bool:
    """Whether asyncio tells of something else than the part of a save whose disk is full."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not disk_reason(error)


class _Unraisable:
    """Leaves out what TensorStore prints of a save that failed, which is raised elsewhere, too."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, found: Any) -> None:
        closed = found.object is None and str(found.exc_value) == "Event loop is closed"
        if not closed:
            self._before(found)
