"""What makes a run the one it was: its settings, its frozen parts, its tokenizer and its data.

Every checkpoint carries it, and a run that resumes compares its own. Versions 0.1 and 0.2 did not
write it; such a run resumes by the settings in its `config.json`.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import matches, named_parameters
from moresjax.data.processor import Processor
from moresjax.data.sources import Source
from moresjax.runs.config import differences, present_names
from moresjax.runs.run_config import RunConfig, resolve

# Keys that may change between two starts of a run: how long it trains, what is logged, saved and
# measured beside it, and the devices.
MAY_CHANGE = (
    *("steps", "samples", "epochs"),
    *("name", "log_every", "watchdog", "tensorboard", "checkpoint", "lmar_every", "plugins"),
    *("validation.data", "validation.every", "validation.batches"),
    *("mesh", "num_workers", "remat"),
)
# Keys that say where things are. They may change where the things themselves are compared.
PATHS = (
    *("init", "tokenizer", "image_processor"),
    *("data.files", "data.image_root", "data.folder", "data.data_dir"),
)
_VALUES = 64  # of every frozen array


def changed_settings(
    earlier: Mapping[str, Any], config: RunConfig, *, paths_may_change: bool
) -> list[str]:
    """Keys that differ from an earlier start and must not.

    Args:
      earlier: The configuration as JSON, written by any version.
      config: The present one.
      paths_may_change: Whether what paths hold is compared elsewhere.
    """
    free = MAY_CHANGE + (PATHS if paths_may_change else ())
    found = differences(_comparable(resolve(present_names(earlier))), _comparable(config))
    return [key for key in found if not any(matches(key, pattern) for pattern in free)]


def _comparable(config: RunConfig) -> dict[str, Any]:
    """The settings with the source of every part, which up to version 0.2 was always written."""
    return config.to_dict() | {"init": config.init.sources}


def run_identity(
    config: RunConfig, frozen: nnx.State, processor: Processor, source: Source
) -> dict[str, Any]:
    """The identity of a run, as JSON.

    Args:
      config: The run's configuration.
      frozen: Everything of the model that does not train.
      processor: The processor of the model.
      source: The training samples.
    """
    sizes, image = np.asarray(getattr(source, "sizes", ()), np.int64), processor.image
    normalised = (image.size, image.mean, image.std) if image else ()
    words = sorted(processor.tokenizer.get_vocab().items())
    return {
        "config": config.to_dict(),
        "frozen parts": _frozen_digest(frozen),
        "tokenizer": _digest(words),
        "image processor": _digest(normalised),
        "training samples": f"{len(source)}-{zlib.crc32(sizes.tobytes()):08x}",
    }


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any], place: str) -> None:
    """Refuses to go on from a checkpoint of something else.

    Args:
      saved: The identity in the checkpoint.
      own: The run's.
      place: The run's directory, for the message.

    Raises:
      UserError: names what differs.
    """
    for what, value in own.items():
        if what != "config" and saved.get(what, value) != value:
            raise UserError(
                f"the {what} of {place} are not those that its checkpoint was trained with; give "
                "the earlier paths, or another --workdir"
            )


def _digest(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value).encode()):08x}"


def _frozen_digest(frozen: nnx.State) -> str:
    """A checksum of a few values of every array, the same on any devices and in any precision."""
    named = {name: x.get_value() for name, x in named_parameters(frozen).items()}
    spread = [_spread(x) for x in named.values() if x.size]
    if not spread:
        return _digest([])
    values, known = (np.stack(each) for each in zip(*spread, strict=True))
    if jax.process_count() > 1:
        values, known = (np.asarray(multihost_utils.process_allgather(x)) for x in (values, known))
        first = known.argmax(axis=0)  # the first process that has it
        values = np.take_along_axis(values, first[None], axis=0)[0]
    rounded = values.astype(jax.numpy.bfloat16).tobytes()
    return _digest([*named, zlib.crc32(rounded)])


def _spread(x: jax.Array) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Values spread over an array, and which of them this process holds."""
    numbers = np.linspace(0, x.size - 1, _VALUES).astype(int)
    chosen = np.zeros((_VALUES, 0), int)  # the only place of a single number
    if x.ndim:
        chosen = np.stack(np.unravel_index(numbers, x.shape), axis=-1)
    values, known = np.zeros(_VALUES, np.float32), np.zeros(_VALUES, bool)
    for piece, starts in _pieces(x):
        shape, place = np.asarray(piece.shape, int), chosen - starts
        inside = ((place >= 0) & (place < shape)).all(axis=-1) & ~known
        if not inside.any():
            continue
        at = tuple(np.clip(place, 0, shape - 1).T)
        # On a CPU this takes no copy; from other devices only these values are fetched.
        on_cpu = {device.platform for device in piece.devices()} == {"cpu"}
        data = np.asarray(piece) if on_cpu else piece
        read = np.broadcast_to(np.asarray(data[at]).astype(np.float32), _VALUES)
        values[inside] = read[inside]
        known |= inside
    return values, known


def _pieces(x: jax.Array) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """The pieces of an array on this process's devices, and where each starts."""
    if x.is_fully_replicated:  # `addressable_shards` fails where other processes have copies
        yield x.addressable_data(0), np.zeros(x.ndim, int)
        return
    for shard in x.addressable_shards:
        yield shard.data, np.asarray([part.start or 0 for part in shard.index], int)
