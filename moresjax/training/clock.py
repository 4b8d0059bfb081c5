"""What a run does by the clock: it is saved every so many minutes, and tells where it is stuck."""

import contextlib
import faulthandler
import logging
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed

logger = logging.getLogger(__name__)

# Steps between the announcement of a save and the save. Processes are fewer steps apart than that:
# each waits for the loss of earlier steps, which all of them have to take.
AHEAD = 8
_KEY = "moresjax-saves/{}"


class SaveTimer:
    """Says when a run is saved by the clock, at the same step in every process.

    The clock is that of process 0, which announces the step of the next save.

    Args:
      minutes: The time between two saves; 0: never.
      store: The key-value store of several processes; default: that of JAX, if there are several.
      number: The number of this process; default: that of JAX.
    """

    def __init__(self, minutes: float, store: Any = None, number: int | None = None) -> None:
        self._seconds, self._last = 60 * minutes, time.monotonic()
        several = store is None and jax.process_count() > 1
        self._store: Any = distributed.global_state.client if several else store
        self._number = jax.process_index() if number is None else number
        self._saves, self._at = 0, 0  # of the next announced save; 0: none is

    def due(self, step: int) -> bool:
        """Whether the run is saved behind this step; every process asks at every step."""
        if not self._seconds:
            return False
        late = time.monotonic() - self._last >= self._seconds
        if self._store is None:
            found = late
        else:
            self._at = self._at or self._announced(step, late)
            found = 0 < self._at <= step
        if found:
            self._saves, self._at, self._last = self._saves + 1, 0, time.monotonic()
        return found

    def _announced(self, step: int, late: bool) -> int:
        key = _KEY.format(self._saves)
        if self._number == 0:
            if late:
                self._store.key_value_set(key, str(step + AHEAD))
            return step + AHEAD if late else 0
        with contextlib.suppress(Exception):  # the store raises when there is no such key
            return int(self._store.key_value_try_get(key))
        return 0


class Watchdog:
    """Says once where a run stands when a step does not come for long, and waits on.

    Args:
      seconds: How long; 0: never.
      step: The number of the last step.
    """

    def __init__(self, seconds: float, step: int) -> None:
        self._seconds, self._over = seconds, threading.Event()
        self.at(step)
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, step: int) -> None:
        """A step has been taken."""
        self._step, self._since, self._told = step, time.monotonic(), False

    def close(self) -> None:
        """Ends the watching."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 10.0)):
            waited = time.monotonic() - self._since
            if waited < self._seconds or self._told:
                continue
            self._told = True
            told = "step %d has not come for %.0f seconds; here is where every thread stands"
            logger.warning(told, self._step + 1, waited)
            with contextlib.suppress(Exception):  # a stream without a file
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
