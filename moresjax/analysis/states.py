"""A store of hidden states: arrays `[N, D]` of sites and layers, and a row of facts for each state.

A folder holds `states.json` (what the states are), shards `SITE.LAYER.pPROCESS.NUMBER.npy` of at
most 65,536 states, and for the shards of a process and number `index.pPROCESS.NUMBER.jsonl`, with a
line for each state. Every file appears whole, and the part of the index last: a process killed at
any time loses only the states that it had not written yet, and a later one goes on by ids.

Axis legend: N states, D hidden size.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Int

from moresjax.core.errors import UserError, choice_error
from moresjax.core.json_files import read_object

META, INDEX = "states.json", "index"
ROWS = 65_536  # states of a shard
BYTES = 1 << 28  # of states that wait for their shard
SECONDS = 60  # that states wait for it
DTYPES = ("float16", "bfloat16", "float32")
BF16 = np.dtype(ml_dtypes.bfloat16)
Key = tuple[str, int]


class States:
    """Hidden states of many samples, in memory or in a folder.

    >>> states = States.from_arrays(
    ...     {("llm.block.out", 3): np.eye(2, 4)}, [{"id": "a"}, {"id": "b", "found": False}]
    ... )
    >>> len(states), states.sites, states.layers, states.found.tolist()
    (2, ['llm.block.out'], [3], [True, False])
    >>> states.take(states.found).matrix("llm.block.out", 3)
    array([[1., 0., 0., 0.]])

    Sites without layers, such as `llm.norm.out`, have the single layer 0.

    Args:
      folder: A folder that `StatesWriter` wrote; it is only read.

    Attributes:
      meta: The content of `states.json`: `sites`, `layers` (of each site), `take`, `size` (D),
        `dtype`, and what the states were read from.
      index: A row of facts for each state: `id`, `images`, `prompt`, `answers`, `prediction`,
        `found`, `place`, `count` and `metadata`, where they are known.

    Raises:
      UserError: The folder is no store, or is damaged.
    """

    meta: dict[str, Any]
    index: list[dict[str, Any]]

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / META).is_file():
            raise UserError(f"{folder} holds no states: it has no {META}")
        self.meta, self.index = read_object(folder / META), []
        keys = [(site, layer) for site in self.meta["sites"] for layer in self.meta["layers"][site]]
        self._arrays: dict[Key, list[np.ndarray]] = {key: [] for key in keys}
        for file in _index_files(folder):
            rows, numbers = _read_index(file), _numbers(file.name)
            self.index += rows
            for key, arrays in self._arrays.items():
                shard = folder / _shard_name(key, *numbers)
                arrays.append(_open_shard(shard, len(rows), self.meta))
        self._rows: Int[np.ndarray, " N"] | None = None

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[Key, Float[np.ndarray, "N D"]],
        index: Sequence[Mapping[str, Any]],
        meta: Mapping[str, Any] | None = None,
    ) -> "States":
        """States in memory.

        Args:
          arrays: The states of each site and layer.
          index: The facts of each state.
          meta: What the states are.

        Raises:
          ValueError: The arrays have other numbers of rows than the index.
        """
        lengths = {len(array) for array in arrays.values()} | {len(index)}
        if len(lengths) > 1 or not arrays:
            raise ValueError(f"states and rows of the index must be equally many, got {lengths}")
        states = cls.__new__(cls)
        first = next(iter(arrays.values()))
        facts = {"size": first.shape[1], "dtype": first.dtype.name}
        states.meta = _describe(arrays) | facts | dict(meta or {})
        states.index = [dict(row) for row in index]
        states._arrays = {key: [np.asarray(array)] for key, array in arrays.items()}
        states._rows = None
        return states

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"States({len(self)} states of {self.sites}, layers {self.layers})"

    @property
    def sites(self) -> list[str]:
        """The names of the sites."""
        return list(dict.fromkeys(site for site, _ in self._arrays))

    @property
    def layers(self) -> list[int]:
        """The layers of all sites, in order."""
        return sorted({layer for _, layer in self._arrays})

    @property
    def keys(self) -> list[Key]:
        """Every site and layer that there are states of."""
        return list(self._arrays)

    @property
    def ids(self) -> list[str]:
        """The name of each state's sample."""
        return [row["id"] for row in self.index]

    @property
    def found(self) -> Bool[np.ndarray, " N"]:
        """Whether each state is one: samples without the token that was looked for have zeros."""
        return np.array([row.get("found", True) for row in self.index], bool)

    def matrix(self, site: str | None = None, layer: int | None = None) -> Float[np.ndarray, "N D"]:
        """The states of a site and layer: a memory map where they are one shard on disk.

        Several shards are read into memory; `chunks` reads them piece by piece.

        Args:
          site: The site; it may be left out where there is only one.
          layer: The layer of the site; likewise.

        Raises:
          UserError: There are no states of this site and layer.
        """
        arrays = self._arrays[self._key(site, layer)]
        if self._rows is not None:
            return _gather(arrays, self._rows)
        if not arrays:
            return np.empty((0, self.meta["size"]), np.dtype(self.meta["dtype"]))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def width(self, site: str | None = None, layer: int | None = None) -> int:
        """D of the states of a site and layer; nothing is read.

        Raises:
          UserError: There are no states of this site and layer.
        """
        arrays = self._arrays[self._key(site, layer)]
        return arrays[0].shape[1] if arrays else self.meta["size"]

    def chunks(
        self, site: str | None = None, layer: int | None = None, rows: int = ROWS
    ) -> Iterator[Float[np.ndarray, "M D"]]:
        """The states of a site and layer in order, at most `rows` at a time.

        Args:
          site: The site; it may be left out where there is only one.
          layer: The layer of the site; likewise.
          rows: The most states of a piece.

        Raises:
          UserError: There are no states of this site and layer.
        """
        arrays = self._arrays[self._key(site, layer)]
        chosen = np.arange(len(self)) if self._rows is None else self._rows
        for first in range(0, len(self), rows):
            yield _gather(arrays, chosen[first : first + rows])

    def take(
        self, rows: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"] | Sequence[int]
    ) -> "States":
        """Some of the states, in the order given; nothing is read.

        Args:
          rows: Their numbers, or a mask.
        """
        numbers = np.arange(len(self))[np.asarray(rows, None if len(rows) else np.int64)]
        states = States.__new__(States)
        states.meta, states._arrays = self.meta, self._arrays
        states.index = [self.index[number] for number in numbers]
        states._rows = numbers if self._rows is None else self._rows[numbers]
        return states

    def _key(self, site: str | None, layer: int | None) -> Key:
        if site is None:
            if len(self.sites) > 1:
                raise UserError(f"states of several sites: choose one of {', '.join(self.sites)}")
            (site,) = self.sites
        if site not in self.sites:
            raise choice_error("site of these states", site, self.sites)
        layers = [own for of, own in self._arrays if of == site]
        if layer is None:
            if len(layers) > 1:
                raise UserError(f"states of several layers of {site}: choose one of {layers}")
            (layer,) = layers
        if layer not in layers:
            raise choice_error(f"layer of the states of {site}", layer, layers)
        return site, layer


class StatesWriter:
    """Writes a store, shard by shard; a later writer on the same folder goes on with it.

    >>> import tempfile
    >>> out = tempfile.mkdtemp()
    >>> key = "llm.block.out", 3
    >>> with StatesWriter(out, [key], 4) as writer:
    ...     writer.add({"id": "a"}, {key: np.ones(4)})
    >>> States(out).matrix().tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    >>> StatesWriter(out, [key], 4).done
    {'a'}

    Each process of a run writes shards and an index of its own.

    Args:
      folder: A new folder, or one with a store of the same `meta`.
      keys: The sites and layers.
      size: D.
      meta: What the states are; all of it must agree with a store that is there.
      dtype: `float16`, `bfloat16` or `float32`.
      process: The number of this process.
      rows: The most states of a shard.

    Attributes:
      done: The ids that have been written.

    Raises:
      UserError: The folder holds something else, other states, or is being written to.
    """

    def __init__(
        self,
        folder: str | Path,
        keys: Sequence[Key],
        size: int,
        meta: Mapping[str, Any] | None = None,
        *,
        dtype: str = "float16",
        process: int = 0,
        rows: int = ROWS,
    ) -> None:
        if dtype not in DTYPES:
            raise choice_error("dtype of states", dtype, DTYPES)
        self._folder, self._keys, self._process = Path(folder), list(keys), process
        self._dtype, width = np.dtype(dtype), 4 * size * len(self._keys)
        self._limit = max(min(rows, ROWS, BYTES // width), 1)
        self._waiting: list[tuple[dict[str, Any], dict[Key, np.ndarray]]] = []
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._folder, process)
        whole = _describe(keys) | {"size": size, "dtype": dtype} | dict(meta or {})
        self._check(json.loads(json.dumps(whole)))
        files = _index_files(self._folder, process)
        self.done: set[str] = {row["id"] for file in files for row in _read_index(file)}
        self._number, self._since = len(files), time.monotonic()

    def __enter__(self) -> "StatesWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, row: Mapping[str, Any], states: Mapping[Key, Float[np.ndarray, " D"]]) -> None:
        """A sample's state at every site and layer, with its facts.

        Args:
          row: The facts, `id` among them.
          states: The states.
        """
        self.extend([(row, states)])

    def extend(
        self, pairs: Sequence[tuple[Mapping[str, Any], Mapping[Key, Float[np.ndarray, " D"]]]]
    ) -> None:
        """Several states of one sample, which are written together or not at all.

        Args:
          pairs: As `add` takes them.

        Raises:
          UserError: A state does not fit the dtype.
        """
        if len(self._waiting) + len(pairs) > self._limit:
            self.flush()
        for row, states in pairs:
            own = {key: np.asarray(states[key]) for key in self._keys}
            largest = max(float(np.abs(state).max()) for state in own.values())
            if largest > float(ml_dtypes.finfo(self._dtype).max):
                raise UserError(
                    f"the states of {row['id']} reach {largest:.3g}, which {self._dtype.name} "
                    "does not hold; choose bfloat16 or float32"
                )
            small = {key: state.astype(self._dtype) for key, state in own.items()}
            self._waiting.append((dict(row), small))
        self.done |= {row["id"] for row, _ in pairs}
        if len(self._waiting) >= self._limit or time.monotonic() - self._since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits: a shard of every site and layer, then their part of the index."""
        if self._waiting:
            for key in self._keys:
                array = np.stack([states[key] for _, states in self._waiting])
                self._write(_shard_name(key, self._process, self._number), array)
            lines = "".join(json.dumps(row) + "\n" for row, _ in self._waiting)
            self._write(f"{INDEX}.p{self._process}.{self._number:05d}.jsonl", lines)
            self._number, self._waiting = self._number + 1, []
        self._since = time.monotonic()

    def close(self) -> None:
        """Writes what waits and lets others write."""
        try:
            self.flush()
        finally:
            self._lock.close()

    def _write(self, name: str, content: np.ndarray | str) -> None:
        """A file that is there whole or not at all."""
        partial = self._folder / f".{name}.partial"
        with partial.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:  # NumPy's format has no name for bfloat16
                np.save(file, content.view(np.uint16) if content.dtype == BF16 else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._folder / name)

    def _check(self, meta: dict[str, Any]) -> None:
        """Writes `states.json`, or compares the one that is there."""
        path = self._folder / META
        if not path.is_file():
            others = [f.name for f in self._folder.iterdir() if not f.name.startswith(".")]
            if others:
                raise UserError(f"{self._folder} holds {others[0]}; states need a new folder")
            self._write(META, json.dumps(meta, indent=2) + "\n")
            return
        there = read_object(path)
        for name in sorted({*there, *meta}):
            if there.get(name) != meta.get(name):
                raise UserError(
                    f"{self._folder} holds states with {name}={there.get(name)!r}, not "
                    f"{meta.get(name)!r}; choose another folder"
                )


def _describe(keys: Iterable[Key]) -> dict[str, Any]:
    """Sites and layers as `states.json` has them."""
    layers: dict[str, list[int]] = {}
    for site, layer in keys:
        layers.setdefault(site, []).append(layer)
    return {"sites": list(layers), "layers": layers}


def _index_files(folder: Path, process: int | str = "*") -> list[Path]:
    """The parts of the index, in order of processes and shards."""
    found = folder.glob(f"{INDEX}.p{process}.*.jsonl")
    return sorted(found, key=lambda file: _numbers(file.name))


def _numbers(name: str) -> tuple[int, int]:
    """The process and the number of a part of the index."""
    _, process, number, _ = name.split(".")
    return int(process[1:]), int(number)


def _read_index(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _shard_name(key: Key, process: int, number: int) -> str:
    site, layer = key
    return f"{site}.{layer}.p{process}.{number:05d}.npy"


def _open_shard(file: Path, rows: int, meta: Mapping[str, Any]) -> np.ndarray:
    """The memory map of a shard.

    Raises:
      UserError: The shard is missing or damaged.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be used: {error}") from None
    if array.shape != (rows, meta["size"]):
        raise UserError(f"{file} has shape {array.shape}, its index {(rows, meta['size'])}")
    return array.view(BF16) if meta["dtype"] == "bfloat16" else array


def _gather(arrays: Sequence[np.ndarray], rows: Int[np.ndarray, " M"]) -> Float[np.ndarray, "M D"]:
    """Rows of shards that follow each other; the others are not read."""
    ends = np.cumsum([len(array) for array in arrays])
    owner = np.searchsorted(ends, rows, side="right")
    out = np.empty((len(rows), arrays[0].shape[1]), arrays[0].dtype)
    for number in np.unique(owner):
        here = owner == number
        out[here] = arrays[number][rows[here] - (ends[number] - len(arrays[number]))]
    return out


def _lock(folder: Path, process: int) -> IO[str]:
    """A lock that ends with the process.

    Raises:
      UserError: Another process has it.
    """
    file = (folder / f".lock.p{process}").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"another process writes states into {folder}") from None
    return file
