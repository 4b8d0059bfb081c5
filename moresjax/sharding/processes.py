"""The processes of a run: what they keep, how they meet, and when they are told to stop."""

import os
import signal
import threading
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from moresjax.core.errors import UserError
from moresjax.sharding.peers import end_process

_LAST = 20  # seconds between the ends of the first and the last process
_ALONE = (
    "--distributed {}: the other processes did not come within {} seconds; start all of them, with "
    "an address that all of them reach, or give --join-timeout"
)


def use_compile_cache() -> None:
    """Keeps compiled programs, so that the next process need not compile them again.

    They are in `$XDG_CACHE_HOME/moresjax` (default `~/.cache/moresjax`), unless
    `JAX_COMPILATION_CACHE_DIR` names another folder.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "moresjax"))


def join_processes(where: str, seconds: int = 20) -> None:
    """Makes this process one of several that run the same program.

    Args:
      where: Says how the processes find each other: `auto` on TPU pods, Slurm and the like, or
        `HOST:PORT,PROCESSES,NUMBER`.
      seconds: How long to wait for the others to come; the process ends when they do not.

    Raises:
      UserError: when the processes cannot find each other.
    """
    try:
        address, processes, number = None, None, None
        if where != "auto":
            address, *numbers = where.split(",")
            processes, number = map(int, numbers)
        # JAX's own limit aborts the process, which it must not reach.
        alone = threading.Timer(seconds, end_process, [_ALONE.format(where, seconds)])
        alone.daemon = True
        alone.start()
        try:
            jax.distributed.initialize(
                address,
                processes,
                number,
                initialization_timeout=10 * seconds,
                shutdown_timeout_seconds=_LAST,
            )
        finally:
            alone.cancel()
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--distributed {where}: {reason}; give auto where a cluster says what the processes "
            "are, else HOST:PORT,PROCESSES,NUMBER"
        ) from None


class PreemptionHandler:
    """Notices that the process was asked to end (SIGTERM, Ctrl-C), until it is closed.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self._asked = False
        # Of several processes perhaps only one is asked; JAX's own handler tells all of them, and
        # they agree on a step that none has passed.
        self._alone = jax.process_count() == 1
        in_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if self._alone and in_main else ()
        self._before = {number: signal.signal(number, self._ask) for number in signals}

    def _ask(self, number: int, *_: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def ask(self) -> None:
        """Asks the process to end, as a signal does."""
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end."""
        return self._asked

    def at(self, step: int) -> bool:
        """Whether to stop after this step; the same in all processes."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Hands the signal back to who had it before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
