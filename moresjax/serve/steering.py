"""Steering of single requests: vectors of a shelf or of the request, in rows of one batch.

What a request adds in every layer is one array per selector of tokens, strengths included. With the
adapter that it is added to it makes an adapter of its own, of which a few are held at a time; the
next request with the same steering finds it there. Only the first of a kind compiles.

Axis legend: L layers, D hidden size.
"""

import dataclasses
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from moresjax.analysis.vectors import FACTS, read_vector_facts
from moresjax.core.errors import UserError
from moresjax.inference.model import Model
from moresjax.serve.errors import ApiError
from moresjax.serve.fields import Fields
from moresjax.tuning.attach import Tuning, numbered
from moresjax.tuning.methods.steer import read_vector
from moresjax.tuning.multi_adapter import HeldAdapter, stack_adapters, without_idle_kinds
from moresjax.weights.adapter import add_tunings

OWN = "\0own"  # the tuning that a model was loaded with, beside steerings
POSITIONS = "last_prompt|generated"
MOST = 8  # vectors of one request
HELD = 8  # different steerings of requests under way


@dataclasses.dataclass(frozen=True)
class ShelfVector:
    """A vector that clients know by name.

    Attributes:
      name: The name.
      file: Where it comes from, as `steer:vector=` takes it.
      vector: What is added at every layer, or at each its own.
      layers: The layers that it is meant for; None: all.
    """

    name: str
    file: str
    vector: Float[np.ndarray, "*L D"]
    layers: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The vector as `/v1/steering_vectors` lists it."""
        norm = float(np.linalg.norm(self.vector, axis=-1).max())
        layers = None if self.layers is None else list(self.layers)
        told = {"name": self.name, "layers": layers, "positions": POSITIONS}
        return told | {"norm": norm, "file": self.file}


def read_shelf(sources: Sequence[str], dim: int, layers: int) -> dict[str, ShelfVector]:
    """The vectors of files `[NAME=]FILE.npz[:KEY]`; without a key all vectors of the file.

    A file that `moresjax analyze steer` wrote tells the layer of each.

    Args:
      sources: The files.
      dim: D.
      layers: L.

    Raises:
      UserError: A file or a vector cannot be read, or two have the same name.
    """
    shelf: dict[str, ShelfVector] = {}
    for source in sources:
        name, equals, file = source.partition("=")
        if not equals or ".npz" in name:
            name, file = "", source
        path, dot, key = file.partition(".npz")
        path = Path(path + dot)
        facts = read_vector_facts(path.parent) if (path.parent / FACTS).is_file() else {}
        for one in [key.removeprefix(":")] if key else _keys(path):
            title = name if name and key else f"{name}{one}"
            if title in shelf:
                raise UserError(f"two steering vectors are called {title!r}")
            vector = read_vector(f"{path}:{one}", dim, layers)
            known = facts.get(one, {}).get("layer")
            own = (known,) if isinstance(known, int) and 0 <= known < layers else None
            shelf[title] = ShelfVector(title, f"{path}:{one}", vector, own)
    return shelf


def _keys(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.keys())
    except Exception:  # whatever numpy raises for a file that is none
        raise UserError(f"--vector {path} is not a readable FILE.npz") from None


@dataclasses.dataclass(frozen=True)
class Steering:
    """What a request adds: by selector of tokens, an array for all layers."""

    parts: Mapping[str, Float[np.ndarray, "L D"]]

    @property
    def key(self) -> str:
        """A digest that tells steerings apart."""
        digest = hashlib.sha256()
        for positions, vector in sorted(self.parts.items()):
            digest.update(positions.encode() + b"\0" + vector.tobytes())
        return digest.hexdigest()[:24]


def read_steering(
    given: Any, shelf: Mapping[str, ShelfVector], dim: int, layers: int
) -> Steering | None:
    """The field `steer` of a request; None where nothing is added.

    Args:
      given: The field.
      shelf: The vectors with names.
      dim: D.
      layers: L.

    Raises:
      ApiError: A vector is unknown or has another size, or a field is out of range.
    """
    if given is None:
        return None
    if not isinstance(given, list) or len(given) > MOST:
        raise ApiError(f"steer must be a list of at most {MOST} vectors", param="steer")
    parts: dict[str, np.ndarray] = {}
    for number, item in enumerate(given):
        fields = Fields(item, f"steer[{number}]")
        alpha = fields.number("alpha", 1.0, -1e6, 1e6)
        vector, own = _vector(fields, shelf, dim, layers)
        chosen = fields.get("layers")
        if chosen is None:
            chosen = own if own is not None else range(layers)
        elif not isinstance(chosen, list) or not all(
            type(x) is int and 0 <= x < layers for x in chosen
        ):
            raise fields.wrong("layers", f"a list of numbers from 0 to {layers - 1}")
        positions = fields.text("positions") or POSITIONS
        added = np.zeros((layers, dim), np.float32)
        with np.errstate(over="ignore"):  # what is infinite is refused below
            added[list(chosen)] = alpha * np.broadcast_to(vector, (layers, dim))[list(chosen)]
            parts[positions] = parts.get(positions, 0) + added
        if not np.isfinite(parts[positions]).all():
            raise fields.wrong("alpha", "so small that no sum of vectors is infinite")
    parts = {positions: vector for positions, vector in parts.items() if vector.any()}
    return Steering(parts) if parts else None


def _vector(
    fields: Fields, shelf: Mapping[str, ShelfVector], dim: int, layers: int
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """A vector and the layers that it is meant for."""
    given = fields.get("vector")
    if isinstance(given, str):
        if given not in shelf:
            known = ", ".join(shelf) or "none; start the server with --vector"
            raise ApiError(f"there is no steering vector {given!r}; there are {known}", 404)
        return shelf[given].vector, shelf[given].layers
    try:
        vector = np.asarray(given, np.float32)
    except (TypeError, ValueError, OverflowError):
        vector = np.zeros(0, np.float32)
    if vector.shape not in ((dim,), (layers, dim)) or not np.isfinite(vector).all():
        raise ApiError(
            f"a steering vector must be a name or {dim} finite numbers, or {layers} lists of them",
            param="steer",
        )
    return vector, None


class NoRoom(Exception):
    """The program has no room for a steering of this kind: it has to be compiled once more."""


class SteeredAdapters:
    """The adapters that steerings make with those of a model; used on the scheduler's thread.

    Args:
      model: The model.
      steers: Whether steering is expected: a tuning that the model was loaded with then becomes one
        that rows choose.

    Attributes:
      base: The adapter that stands for the model as it was loaded; None for the bare one.

    Raises:
      UserError: That tuning cannot be chosen per row.
    """

    def __init__(self, model: Model, *, steers: bool) -> None:
        self._model, self.base = model, None
        if steers:
            self.keep_own()
        self._names: OrderedDict[tuple[str | None, str], str] = OrderedDict()
        self._used: Counter[str] = Counter()
        self._count = 0

    def keep_own(self) -> None:
        """Makes a tuning that the model was loaded with one that rows choose, beside others.

        Raises:
          UserError: It cannot be chosen per row; all is then as it was.
        """
        model = self._model
        if not model.mllm.tuning.held and model.tuning != "none":
            add_tunings(model.mllm, {OWN: model.mllm.tuning})
            model.service.update()
            self.base = OWN

    def named(self, adapter: str | None) -> str | None:
        """The name by which the model knows an adapter now.

        Requests name none for the model as it was loaded, whose tuning gets a name when it is held
        with others; hence they are asked for when their turn has come.

        Raises:
          ApiError: The adapter has been taken away.
        """
        if adapter is None:
            return self.base
        if adapter not in self._model.adapters:
            raise ApiError(
                f"the adapter {adapter!r} has been unloaded", 404, "model", "model_not_found"
            )
        return adapter

    def hold(self, adapter: str | None, steering: Steering, *, may_compile: bool) -> str:
        """The name of an adapter with a steering, which stays until `release`.

        Args:
          adapter: What it is added to; None for the base model.
          steering: What is added.
          may_compile: Whether no answer is under way, so that programs may change.

        Raises:
          NoRoom: It needs another program, and that may not be now.
          ApiError: Too many steerings are under way, the selector does not fit, or the adapter has
            been taken away.
        """
        self._hold_own(may_compile)
        adapter = self.named(adapter)
        key = adapter, steering.key
        if key not in self._names:
            self._drop_one()
            self._add(key, steering, may_compile)
        self._names.move_to_end(key)
        name = self._names[key]
        self._used[name] += 1
        return name

    def _hold_own(self, may_compile: bool) -> None:
        """Lets rows choose a tuning that the model was loaded with, to which they add."""
        model = self._model
        if model.mllm.tuning.held or model.tuning == "none":
            return
        if not may_compile:
            raise NoRoom
        try:
            self.keep_own()
        except UserError as error:
            raise ApiError(str(error), param="steer") from None

    def release(self, name: str) -> None:
        """Says that a request has ended; its steering may be forgotten."""
        self._used[name] -= 1
        if not self._used[name]:
            del self._used[name]
            if name not in self._names.values():  # what it was added to has been taken away
                self._model.unload_adapter(name)

    def forget(self, adapter: str) -> None:
        """Drops the steerings of an adapter, those under way when their requests have ended."""
        for key, name in [pair for pair in self._names.items() if pair[0][0] == adapter]:
            del self._names[key]
            if not self._used[name]:
                self._model.unload_adapter(name)

    def _drop_one(self) -> None:
        """Makes place for one more."""
        if len(self._names) < HELD:
            return
        for key, name in self._names.items():
            if not self._used[name]:
                del self._names[key]
                self._model.unload_adapter(name)
                return
        raise ApiError(
            f"{HELD} different steerings are under way; try again later", 429, retry_after=1
        )

    def _add(self, key: tuple[str | None, str], steering: Steering, may_compile: bool) -> None:
        model, (adapter, _) = self._model, key
        held = model.mllm.tuning.held
        source: Mapping[str, HeldAdapter] = held.source.adapters if held else {}
        own = source[adapter] if adapter else None
        try:
            tuning = _composed(model, own.tuning if own else None, steering)
        except UserError as error:
            raise ApiError(str(error), param="steer") from None
        self._count += 1
        name = f"{adapter or ''}\0steered {self._count}"  # no name that a client can ask for
        connector = own.connector if own else None
        connectors = {} if connector is None else {name: connector}
        before = model.mllm.tuning
        if may_compile:
            reserve = len(source) + HELD
            if held:
                model.mllm.tuning = without_idle_kinds(before)
            add_tunings(model.mllm, {name: tuning}, connectors, reserve=reserve)
            model.fit_processor()
            model.service.update()
        else:
            if not held:
                raise NoRoom
            after = stack_adapters({name: tuning}, connectors, beside=before)
            if not model.service.engine().update(after):
                raise NoRoom
            model.mllm.tuning = after
        self._names[key] = name


def _composed(model: Model, adapter: Tuning | None, steering: Steering) -> Tuning:
    """The methods of an adapter and what is added after them."""
    composed = Tuning("none", model.config) if adapter is None else nnx.clone(adapter)
    for positions, vector in steering.parts.items():
        steer = Tuning(f"steer:positions={positions}", model.config)
        if any(kind in positions for kind in ("roi", "mark(", "word(")):
            raise UserError(f"positions {positions} need what a request cannot say")
        steer.initialize()
        steer.set_constants("steer", {"vector": vector, "alpha": 1.0})
        methods = [method for _, method in (*composed.methods, *steer.methods)]
        composed.methods = numbered(methods)
        key = composed.methods[-1][0]
        composed.params[key] = steer.params["steer"]
        composed.layer_masks[key] = steer.layer_masks["steer"]
    return composed
