"""The other processes of a run: whoever fails tells them, and whoever is gone is missed in time.

JAX's own processes wait for each other for minutes, then abort without saying why. Here every
process shows once a second that it lives, in the key-value store of JAX's coordination service,
which is in process 0. One that ends by an error leaves its reason there. The others say it in one
sentence and end with exit code 2, within `SECONDS` of the last sign of life.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

from moresjax.core.errors import UserError
from moresjax.core.folders import disk_error
from moresjax.core.locks import release_all

# A process that shows no sign of life for so long is gone.
SECONDS = 20.0
_BEAT, _HEARD = 1.0, 5.0  # seconds between two signs, and for others to hear of an error
_ALIVE, _FAILED, _DONE = (f"moresjax/{name}/" for name in ("alive", "failed", "done"))

_abort_handler: list[Any] = []  # which the system calls: it must not be collected


class Peers:
    """Watches the other processes of a run from two threads.

    One of them talks to the store, which may block for long when process 0 is gone; the other one
    looks at the clock.

    Args:
      client: JAX's client of the coordination service.
      number: The number of this process.
      count: How many processes there are.
      seconds: How long a process may show no sign of life.
      end: Ends this process with a sentence.
    """

    def __init__(
        self,
        client: Any,
        number: int,
        count: int,
        seconds: float = SECONDS,
        end: "Callable[[str], object] | None" = None,
    ) -> None:
        self._client, self._number, self._seconds = client, number, seconds
        self._end, self._guard, self._over = end or end_process, threading.Lock(), False
        now = time.monotonic()
        self._others = [other for other in range(count) if other != number]
        self._signs = dict.fromkeys(self._others, "")
        self._seen = dict.fromkeys(self._others, now)
        self._talked = now
        for target in (self._talk, self._judge):
            threading.Thread(target=target, name=f"peers{target.__name__}", daemon=True).start()

    def fail(self, sentence: str, key: str = _FAILED) -> None:
        """Tells the others that this process ends, and why; process 0 waits until they know."""
        self._over = True
        telling = threading.Thread(target=self._tell, args=[key, sentence], daemon=True)
        telling.start()
        telling.join(_HEARD)  # without process 0 it never ends

    def _tell(self, key: str, sentence: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{key}{self._number}", sentence, True)
            while self._number == 0 and self._others_left():
                time.sleep(0.1)

    def done(self) -> None:
        """Tells the others that this process has ended well."""
        self._client.key_value_set(f"{_DONE}{self._number}", "", True)

    def _others_left(self) -> set[int]:
        """The others that have not said that they end."""
        gone = {key.rpartition("/")[2] for key in self._read() if _ALIVE not in key}
        return {other for other in self._others if str(other) not in gone}

    def _read(self) -> dict[str, str]:
        return dict(self._client.key_value_dir_get("moresjax/"))

    def _talk(self) -> None:
        beat = 0
        while not self._over:
            beat += 1
            with contextlib.suppress(Exception):  # the clock tells for how long there was no answer
                self._client.key_value_set(f"{_ALIVE}{self._number}", str(beat), True)
                self._look(self._read())
                self._talked = time.monotonic()
            time.sleep(_BEAT)

    def _look(self, found: dict[str, str]) -> None:
        for other in self._others:
            if (reason := found.get(f"{_FAILED}{other}")) is not None:
                told = f"process {other} has ended, and this one ends, too: {reason}"
                self._stop(told, _DONE)  # the others have heard of it from that process
            sign = "done" if f"{_DONE}{other}" in found else found.get(f"{_ALIVE}{other}", "")
            if sign != self._signs[other] or sign == "done":
                self._signs[other], self._seen[other] = sign, time.monotonic()

    def _judge(self) -> None:
        while not self._over:
            time.sleep(_BEAT)
            now = time.monotonic()
            if now - self._talked > self._seconds:
                self._stop(self._missing(0, now - self._talked))
            for other, seen in self._seen.items():
                if self._talked - seen > self._seconds:
                    self._stop(self._missing(other, self._talked - seen))

    def _missing(self, other: int, seconds: float) -> str:
        return (
            f"process {other} has shown no sign of life for {seconds:.0f} seconds; it was killed, "
            "or its machine or the network is down; the same commands go on from the checkpoint"
        )

    def _stop(self, sentence: str, key: str = _FAILED) -> None:
        with self._guard:  # one of the threads speaks
            if not self._over:
                self.fail(sentence, key)
                self._end(sentence)


def end_process(sentence: str, code: int = 2) -> NoReturn:
    """Ends this process at once, without waiting for any other, after one sentence."""
    with contextlib.suppress(Exception):
        if sentence:
            print(f"moresjax: error: {sentence}", file=sys.stderr)
        release_all()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def say_aborts() -> None:
    """Lets a process that JAX aborts say why, and end with exit code 2.

    JAX aborts a process when the coordination service is gone, from a thread without Python, where
    a signal handler of Python's own would not be called any more.
    """
    if not _abort_handler:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
        _abort_handler.append(kind(_aborted))
        ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler[0])


def _aborted(_: int) -> None:
    end_process("process 0 is gone; the same commands go on from the checkpoint")


@contextlib.contextmanager
def watched_peers() -> Iterator[None]:
    """Ends this process when another one is gone, and tells the others when this one fails.

    For a process that has joined others; an error inside ends the process, for waiting for the
    others at its exit, as JAX does, would keep all of them.
    """
    client = distributed.global_state.client
    if client is None or jax.process_count() == 1:
        yield
        return
    say_aborts()
    peers = Peers(client, jax.process_index(), jax.process_count())
    try:
        yield
        peers.done()
    except KeyboardInterrupt:
        peers.fail("it was interrupted")
        print("moresjax: interrupted", file=sys.stderr)
        end_process("", 130)
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else disk_error(error)
        if sentence:
            peers.fail(sentence)
            end_process(sentence)
        # Perhaps a collective operation has failed for another process's sake, which is told then.
        time.sleep(2 * _BEAT if peers._over else SECONDS + 2 * _BEAT)
        peers.fail(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        traceback.print_exception(error)
        end_process("", 1)
