"""How fast a run is and what memory it takes, between one logged step and the next.

The clock runs from the moment the host sees one logged step end to the moment it sees the next one
end; nothing waits for the devices that would not have waited anyway. Reading data and saving count;
the first step, which compiles, and the evaluators do not.
"""

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import jax
from flax import nnx

from moresjax.core.layout import Batch
from moresjax.hardware.chips import GIB, chip_of
from moresjax.models.flops import train_flops
from moresjax.runs.architecture import model_config
from moresjax.runs.run_config import RunConfig


class ThroughputMeter:
    """Adds up what the steps of an interval did.

    Args:
      config: The run's configuration.
      trainable: Parameters that train, for their shapes.
      frozen: Parameters that do not train, for their shapes.
      device_kind: Kind of all devices; MFU needs a chip whose peak is known.
    """

    def __init__(
        self, config: RunConfig, trainable: nnx.State, frozen: nnx.State, device_kind: str
    ) -> None:
        chip = chip_of(device_kind)
        self._peak = chip.flops * jax.device_count() if chip else 0.0
        self._start: float | None = None
        self._steps = self._tokens = self._labels = self._flops = 0.0
        shapes = jax.eval_shape(lambda *parts: parts, trainable, frozen)

        @functools.cache
        def flops(length: int, images: int) -> float:
            sizes = {"rows": config.batch_size, "length": length, "images": images}
            return train_flops(model_config(config), *shapes, **sizes).model

        self._step_flops = flops
        self._counted = config.is_language_model

    def flops(self, batch: Batch | Mapping[str, jax.Array]) -> float:
        """Model FLOPs of a step over this batch, padding included; 0 for a vision encoder alone."""
        if not (self._counted and isinstance(batch, Batch)):
            return 0.0
        return self._step_flops(
            batch.layout.shape[1], 0 if batch.pixels is None else batch.pixels.shape[1]
        )

    def start(self) -> None:
        """Begins a new interval."""
        self._start = time.monotonic()
        self._steps = self._tokens = self._labels = self._flops = 0.0

    def add(self, tokens: float, labels: float, flops: float) -> None:
        """One step has ended."""
        self._steps += 1
        self._tokens += tokens
        self._labels += labels
        self._flops += flops

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time."""
        begin = time.monotonic()
        yield
        if self._start is not None:
            self._start += time.monotonic() - begin

    def read(self) -> dict[str, float]:
        """Rates of the interval, after which a new one begins, and the peak memory so far.

        `mfu_4n6n` is model FLOPs (4 per frozen parameter and token with gradients passing through,
        6 per trained one, nothing for rematerialisation) over the chips' peak.
        """
        found = peak_memory()
        if self._start is None or not self._steps:
            return found
        seconds = time.monotonic() - self._start
        found |= {
            "step_seconds": seconds / self._steps,
            "tokens_per_second": self._tokens / seconds,
            "label_tokens_per_second": self._labels / seconds,
        }
        if self._flops:
            found["flops_per_second"] = self._flops / seconds
            if self._peak:
                found["mfu_4n6n"] = self._flops / seconds / self._peak
        self.start()
        return found


def peak_memory() -> dict[str, float]:
    """`memory_gib`, the most that a device of this process has held.

    Where the backend does not count it, `host_memory_gib`, the most that the process itself has
    held.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return {"memory_gib": max(peaks) / GIB}
    unit = 1 if sys.platform == "darwin" else 1024  # <sys/resource.h>
    return {"host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
