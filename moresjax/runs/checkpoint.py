"""Checkpoints of what trains: parameters, optimizer, step and data position (Orbax).

The frozen backbone is never saved, so a checkpoint of a tuning run is megabytes and is written in
the background. Parameters are stored under their names. Every checkpoint carries a checksum per
array; one that does not come back with the same bytes counts as damaged.
"""

import contextlib
import logging
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moresjax.core.errors import UserError
from moresjax.core.folders import disk_reason, disk_sentence, explain_disk
from moresjax.core.parameter_names import current_name, named_parameters, path_name
from moresjax.runs.orbax_signals import use_signals
from moresjax.runs.state import TrainState

logger = logging.getLogger(__name__)
Arrays = dict[str, jax.Array]
# Orbax numbers its operations by a counter of the process: one thread at a time.
_orbax = threading.RLock()
# A step, its arrays by item and name, and what was saved beside them.
Restored = tuple[int, dict[str, Arrays], dict[str, Any]]


def named(state: nnx.State) -> Arrays:
    """Parameters by dotted name."""
    return {name: variable.get_value() for name, variable in named_parameters(state).items()}


def renamed(state: nnx.State, arrays: Mapping[str, jax.Array]) -> nnx.State:
    """A state of the same structure with the values of `arrays`."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p, v.replace(arrays[path_name(p)])) for p, v in flat])


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>/`.

    Args:
      directory: The folder of the checkpoints.
      keep: How many of them are kept.

    Attributes:
      identity: What is saved with every checkpoint, for `saved_identity` (JSON).
    """

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        self.identity: Mapping[str, Any] = {}
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        # Weights hardly compress, and Orbax would hold what it compresses beside the arrays.
        handlers = {
            "meta": ocp.JsonCheckpointHandler(),
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "optimizer": ocp.PyTreeCheckpointHandler(use_compression=False),
        }
        self._signals, self._failed, self._under_way = use_signals(), False, False
        with _orbax, explain_disk(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Mapping) -> None:
        """Saves in the background; a later save, `wait` or `close` waits for it.

        Outside of the main thread, where other runs may want to save, it waits itself.

        Args:
          state: what trains.
          data: state of the data iterator (JSON).

        Raises:
          UserError: This checkpoint, or the one before, cannot be written.
        """
        trees = {"params": named(state.trainable), "optimizer": _numbered(state.opt_state)}
        checksums = {name: x for tree in trees.values() for name, x in _checksums(tree).items()}
        # Orbax refuses empty trees: an imported model has no optimizer.
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items() if tree}
        saved = {"data": data, "checksums": checksums, "identity": dict(self.identity)}
        meta = ocp.args.JsonSave(saved)
        with self._saving():
            self._manager.save(int(state.step), args=ocp.args.Composite(meta=meta, **items))
            self._under_way = True
        if threading.current_thread() is not threading.main_thread():
            self.wait()

    def restore(self, like: TrainState) -> tuple[TrainState, dict] | None:
        """The newest intact checkpoint: state and data position; None when there is none at all.

        Damaged newer ones are moved out of the way, to `damaged-STEP` beside the directory.

        Raises:
          UserError: when there are checkpoints but all of them are damaged.
        """
        optimizer = _numbered(like.opt_state)
        found = self._newest(
            {"params": _abstract(named(like.trainable)), "optimizer": _abstract(optimizer)}
        )
        if found is None:
            return None
        step, items, meta = found
        self._set_aside([newer for newer in self.steps if newer > step])
        leaves = [items["optimizer"][name] for name in optimizer]
        state = TrainState(
            jax.device_put(jnp.asarray(step, jnp.int32), like.step.sharding),
            renamed(like.trainable, items["params"]),
            jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves),
        )
        return state, meta["data"]

    def restore_parameters(self) -> tuple[int, Arrays]:
        """Step and parameters, by name, of the newest intact checkpoint.

        Raises:
          UserError: when there is none.
        """
        found = self._newest({"params": None})
        if found is None:
            raise UserError(f"{self.directory} holds no checkpoint")
        return found[0], found[1]["params"]

    def _newest(self, abstract: Mapping[str, Any]) -> Restored | None:
        """The newest checkpoint that is intact; None when there is none at all."""
        for step in reversed(self.steps):
            try:
                with _orbax:
                    return self._read(step, abstract)
            except Exception as error:  # Orbax raises many kinds for broken files
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                logger.warning("checkpoint %d is damaged and is passed over: %s", step, reason)
        if self.steps:
            raise UserError(f"every checkpoint in {self.directory} is damaged")
        return None

    def _read(self, step: int, abstract: Mapping[str, Any]) -> Restored:
        """One checkpoint; raises what Orbax raises, or ValueError, when it is damaged."""
        stored = {item: self._stored(step, item) for item in abstract}
        trees = {
            item: _everywhere(stored[item]) if tree is None else _as_stored(tree, stored[item])
            for item, tree in abstract.items()
        }
        restores = {
            name: ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in trees.items()
        }
        args = ocp.args.Composite(meta=ocp.args.JsonRestore(), **restores)
        found: Mapping[str, Any] = dict(self._manager.restore(step, args=args).items())
        items = {name: dict(found[name]) for name in abstract}
        read = _checksums({k: v for item in items.values() for k, v in item.items()})
        saved = found["meta"]["checksums"]
        # Parts of arrays that several processes held had none.
        if any(saved.get(name, checksum) != checksum for name, checksum in read.items()):
            raise ValueError("checksums differ")
        items = {
            item: {current_name(name): x for name, x in arrays.items()}
            for item, arrays in items.items()
        }
        return step, items, found["meta"]

    def _stored(self, step: int, item: str) -> dict:
        """Shapes and dtypes of what a checkpoint has, by the names that it was saved under."""
        handler = ocp.StandardCheckpointHandler()
        stored = dict(handler.metadata(epath.Path(self.directory / str(step) / item)).tree)
        handler.close()
        return stored

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps if jax.process_index() == 0 else ():
            target = self.directory.parent / f"damaged-{step}"
            while target.exists():
                target = target.with_name(target.name + "x")
            (self.directory / str(step)).rename(target)
        if steps:
            self._manager.reload()

    def wait(self) -> None:
        """Waits for a running save.

        Raises:
          UserError: The checkpoint cannot be written.
        """
        with self._saving():
            self._manager.wait_until_finished()
        self._under_way = False

    def check(self) -> None:
        """Raises what went wrong in the background, if a save has ended.

        Raises:
          UserError: The checkpoint cannot be written.
        """
        if self._under_way and not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits for a running save; one that has failed, or was interrupted, is left alone."""
        if not self._failed:
            with self._saving():
                self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Ends every thread of a save that fails, and says in a sentence that the disk is full."""
        try:
            with _orbax:
                yield
        except BaseException as error:
            self._failed = True
            if self._signals is not None:
                self._signals.fail()
            if isinstance(error, OSError):
                raise UserError(self._told(disk_sentence(error, self.directory))) from None
            if reason := disk_reason(error):
                text = f"{self.directory} cannot be written: {reason}"
                raise UserError(self._told(text)) from None
            raise

    def _told(self, sentence: str) -> str:
        """A sentence about a save that failed, and what there is in its place."""
        for path in self.directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(path, ignore_errors=True)  # it may be what the disk is full of
        names = (path.name for path in self.directory.glob("[0-9]*"))
        newest = max((int(name) for name in names if name.isdigit()), default=0)
        return f"{sentence} (checkpoint {newest} is whole)" if newest else sentence


def _numbered(tree: Any) -> Arrays:
    return {f"optimizer.{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _everywhere(stored: Mapping) -> dict[str, jax.ShapeDtypeStruct]:
    """Asks for whole arrays on every process, whichever processes wrote them."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in stored.items()
    }


def _as_stored(tree: Mapping, stored: Mapping) -> dict:
    """`tree` under the names that a checkpoint of an earlier version may have."""
    names = {current_name(name): name for name in stored}
    return {names.get(name, name): x for name, x in tree.items()}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """CRC-32 of every array that this process holds completely."""
    whole = {
        name: x for name, x in arrays.items() if x.is_fully_addressable or x.is_fully_replicated
    }
    return {
        name: zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data) for name, x in whole.items()
    }
