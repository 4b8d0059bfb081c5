"""Several trained adapters held at once, one chosen for every row of a batch.

Axis legend: B rows, L layers, A adapters and, last, the base model, K pieces of a kind and, last,
one that does nothing.

Adapters may differ in everything: in methods, ranks, layers, linears and connectors. What they are
made of is grouped by kind (`tuning.kinds`) and stacked into one `Tuning`, whose program depends on
kinds and shapes alone: leaves are `[L, K, ...]` at layered sites and `[K, ...]` elsewhere, and
`Tuning.places` says which piece of a kind an adapter has. The number of the base model is -1.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from moresjax.core.errors import UserError, choice_error
from moresjax.core.types import AnyArray
from moresjax.tuning.attach import CONNECTOR, Tuning, numbered
from moresjax.tuning.base import Edit, ModelConfig, VirtualTokens
from moresjax.tuning.kinds import Arrays, Kind, find_in_order, merge_orders, pieces_of
from moresjax.tuning.sites import num_layers
from moresjax.tuning.variables import (
    Constant,
    Held,
    LayerMask,
    Lengths,
    OwnParameter,
    Places,
    Shared,
)

BASE = "base"
ConnectorParams = Mapping[str, AnyArray]  # its parameters by name
# How many adapters there is room for: of the kinds that are held, or of some specs.
Reserve = int | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Room:
    """What a program is compiled for.

    Attributes:
      adapters: How many adapters.
      kinds: The kinds of their methods, in order.
      connectors: How many of them may have their own connector.
    """

    adapters: int = 0
    kinds: tuple[Kind, ...] = ()
    connectors: int = 0


@dataclasses.dataclass(frozen=True)
class HeldAdapter:
    """An adapter among several.

    Attributes:
      number: Its number, which it keeps as long as it is held.
      tuning: Its own tuning.
      connector: Its own connector; None: the base's.
    """

    number: int
    tuning: Tuning
    connector: ConnectorParams | None = None


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """What a stacked tuning was made of.

    Attributes:
      adapters: The adapters by name.
      room: The room that it has.
      base_connector: The connector of rows without their own.
    """

    adapters: Mapping[str, HeldAdapter]
    room: Room
    base_connector: ConnectorParams


def stack_adapters(
    tunings: Mapping[str, Tuning],
    connectors: Mapping[str, ConnectorParams] | None = None,
    *,
    config: ModelConfig | None = None,
    base_connector: ConnectorParams | None = None,
    reserve: Reserve = 0,
    beside: Tuning | None = None,
) -> Tuning:
    """One tuning from which `Batch.adapter` chooses for every row.

    Args:
      tunings: Tunings by name.
      connectors: The connectors of those that have their own.
      config: The model's configuration; default: that of the first tuning.
      base_connector: The model's connector; needed where one has its own.
      reserve: The room for adapters that may come later: so many in all, of whatever kinds there
        are now, or for each of some specs how many adapters have its methods, with ranks up to its
        own; `connector` stands for own connectors.
      beside: A stacked tuning whose adapters stay, and whose room is kept.

    Raises:
      UserError: when a name is `base`, a method cannot be chosen per row, the room is not a number,
        or a spec does not fit the model.
    """
    if BASE in tunings or not (tunings or beside or reserve):
        raise UserError(f"adapters need names other than {BASE!r}, got {[*tunings]}")
    held, room = {}, Room()
    if beside is not None and beside.held:
        source: AdapterSource = beside.held.source
        held, room, config = dict(source.adapters), source.room, beside.config
        base_connector = source.base_connector
    if config is None:
        config = next(iter(tunings.values())).config
    for name, tuning in tunings.items():
        taken = {own.number for other, own in held.items() if other != name}
        number = min(set(range(len(taken) + 1)) - taken)
        number = held[name].number if name in held else number
        held[name] = HeldAdapter(number, tuning, (connectors or {}).get(name))
    return _stacked(
        held, _with_reserve(_fitting(room, held), reserve, config), config, base_connector or {}
    )


def without_adapter(several: Tuning, name: str) -> Tuning:
    """A stacked tuning without one of its adapters, whose room stays.

    Raises:
      UserError: for an unknown adapter.
    """
    if not several.held or name not in several.adapters:
        raise choice_error("adapter", name, several.adapters or ("(none is loaded)",))
    source: AdapterSource = several.held.source
    held = {other: own for other, own in source.adapters.items() if other != name}
    return _stacked(held, source.room, several.config, source.base_connector)


def without_idle_kinds(several: Tuning) -> Tuning:
    """A stacked tuning whose room is for the kinds of its adapters only; their numbers stay."""
    assert several.held  # it is stacked
    source: AdapterSource = several.held.source
    kinds, used = source.room.kinds, set()
    for own in source.adapters.values():
        used |= {*_places(kinds, [kind for _, kind in pieces_of(own.tuning)])}
    room = dataclasses.replace(source.room, kinds=tuple(kinds[n] for n in sorted(used)))
    return _stacked(source.adapters, room, several.config, source.base_connector)


def _fitting(room: Room, held: Mapping[str, HeldAdapter]) -> Room:
    """The smallest room in which a room and all adapters fit."""
    users: dict[int, int] = {}
    pieces = [[kind for _, kind in pieces_of(own.tuning)] for own in held.values()]
    kinds = [*room.kinds]
    for own in pieces:
        kinds = _with_kinds(kinds, own)
    for own in pieces:
        for place in _places(kinds, own):
            users[place] = users.get(place, 0) + 1
    kinds = [
        dataclasses.replace(kind, places=max(kind.places, users.get(n, 0)))
        for n, kind in enumerate(kinds)
    ]
    last = max((own.number for own in held.values()), default=-1)
    connected = sum(own.connector is not None for own in held.values())
    return Room(max(room.adapters, last + 1), tuple(kinds), max(room.connectors, connected))


def _with_kinds(kinds: Sequence[Kind], own: Sequence[Kind]) -> list[Kind]:
    """Kinds in which those of one more adapter fit."""
    order = merge_orders([k.method for k in kinds], [k.method for k in own])
    found: list[Kind | None] = [None] * len(order)
    for some in (kinds, own):
        for place, kind in zip(_find(order, some), some, strict=True):
            before = found[place]
            found[place] = kind if before is None else before.with_room_for(kind)
    return [kind for kind in found if kind is not None]


def _find(order: Sequence, kinds: Sequence[Kind]) -> list[int]:
    places = find_in_order(order, [kind.method for kind in kinds])
    assert places is not None  # the order was merged from these
    return places


def _places(kinds: Sequence[Kind], own: Sequence[Kind]) -> list[int]:
    """Which of the kinds the pieces of an adapter are."""
    return _find([kind.method for kind in kinds], own)


def _with_reserve(room: Room, reserve: Reserve, config: ModelConfig) -> Room:
    """The room with more for adapters that may come later."""
    counts = [reserve] if isinstance(reserve, int) else [*reserve.values()]
    if any(not isinstance(count, int) or count < 0 for count in counts):
        raise UserError(f"reserve takes numbers of adapters, from 0 on, got {reserve!r}")
    if isinstance(reserve, int):
        kinds = tuple(dataclasses.replace(k, places=max(k.places, reserve)) for k in room.kinds)
        connectors = max(room.connectors, reserve) if room.connectors else 0
        return Room(max(room.adapters, reserve), kinds, connectors)
    kinds, more = [*room.kinds], sum(n for spec, n in reserve.items() if spec != CONNECTOR)
    for spec, count in reserve.items():
        if spec == CONNECTOR:
            continue
        own = [kind for _, kind in pieces_of(Tuning(spec, config))]
        kinds = _with_kinds(kinds, [dataclasses.replace(kind, places=0) for kind in own])
        for place in _places(kinds, own):
            kinds[place] = dataclasses.replace(kinds[place], places=kinds[place].places + count)
    connectors = max(room.connectors, reserve.get(CONNECTOR, 0))
    return Room(max(room.adapters, more), tuple(kinds), connectors)


def _stacked(
    held: Mapping[str, HeldAdapter],
    room: Room,
    config: ModelConfig,
    base_connector: ConnectorParams,
) -> Tuning:
    """The tuning of some adapters in a room that they fit in."""
    stacked = Tuning("none", config)
    stacked.held = Held(
        {name: own.number for name, own in held.items()}, AdapterSource(held, room, base_connector)
    )
    stacked.methods = numbered([kind.wide for kind in room.kinds])
    members: list[list[tuple[HeldAdapter, str]]] = [[] for _ in room.kinds]
    for own in held.values():
        keyed = pieces_of(own.tuning)
        for (key, _), place in zip(
            keyed, _places(room.kinds, [kind for _, kind in keyed]), strict=True
        ):
            members[place].append((own, key))
    for (key, _), kind, pieces in zip(stacked.methods, room.kinds, members, strict=True):
        _fill_kind(stacked, key, kind, pieces)
        numbers = [own.number for own, _ in pieces]
        stacked.places[key] = _places_variable(room.adapters, numbers, kind.places)
    if room.connectors:
        connected = [own for own in held.values() if own.connector is not None]
        for name, base in base_connector.items():
            values = [np.asarray((own.connector or {})[name]) for own in connected]
            values += [np.asarray(base)] * (room.connectors + 1 - len(values))
            stacked.connector[name] = OwnParameter(jnp.asarray(np.stack(values)))
        numbers = [own.number for own in connected]
        stacked.places[CONNECTOR] = _places_variable(room.adapters, numbers, room.connectors)
    return stacked


def _places_variable(adapters: int, numbers: Iterable[int], nothing: int) -> Places:
    """The place of every adapter, and of the base; `nothing` where it has none."""
    places = np.full(adapters + 1, nothing, np.int32)
    for place, number in enumerate(numbers):
        places[number] = place
    return Places(jnp.asarray(places))


def _fill_kind(
    stacked: Tuning, key: str, kind: Kind, pieces: Sequence[tuple[HeldAdapter, str]]
) -> None:
    """Stacks the pieces of one kind."""
    config, of = stacked.config, Constant if kind.constant else nnx.Param
    stacked.params[key], stacked.layer_masks[key] = nnx.Dict(), nnx.Dict()
    if kind.common:
        stacked.shared[key] = nnx.Dict({n: Shared(jnp.asarray(x)) for n, x in kind.common.items()})
    empty = kind.places - len(pieces) + 1
    for site in kind.shapes:
        layers, nothing = num_layers(site, config), kind.neutral(site)
        axis, values, masks = 1 if layers else 0, [], []
        for own, own_key in pieces:
            found = _raw(own.tuning, own_key, site)
            acts = _acts(own.tuning, own_key, site, layers) if found else None
            values.append(kind.piece(site, found, acts) if found else nothing)
            masks.append(acts if acts is not None else np.full(layers or (), bool(found)))
        values += [nothing] * empty
        masks += [np.zeros(layers or (), bool)] * empty
        stacked.params[key][site] = nnx.Dict(
            {n: of(jnp.asarray(np.stack([x[n] for x in values], axis))) for n in nothing}
        )
        if isinstance(kind.method, Edit):
            stacked.layer_masks[key][site] = LayerMask(jnp.asarray(np.stack(masks, axis)))
    if isinstance(kind.method, VirtualTokens):
        lengths = [method_length(own.tuning, own_key) for own, own_key in pieces] + [0] * empty
        stacked.lengths[key] = Lengths(jnp.asarray(lengths, jnp.int32))


def method_length(tuning: Tuning, key: str) -> int:
    """How many virtual tokens a method of a tuning has."""
    method = dict(tuning.methods)[key]
    assert isinstance(method, VirtualTokens)
    return method.length


def _raw(tuning: Tuning, key: str, site: str) -> Arrays:
    """The parameters of a method at a site, as its kind means them; empty where it has none."""
    if site not in tuning.params[key]:
        return {}
    variables = tuning.params[key][site].items()
    params: dict[str, AnyArray] = {n: np.asarray(x[...]) for n, x in variables}
    return {n: np.asarray(x) for n, x in dict(tuning.methods)[key].of_kind(params).items()}


def _acts(tuning: Tuning, key: str, site: str, layers: int) -> np.ndarray | None:
    """The layers that a method acts on at a site; None outside the blocks."""
    mask = tuning.layer_mask(key, site)
    if mask is None:
        return np.ones(layers, bool) if layers else None
    return np.asarray(mask)


def adapter_ids(
    tuning: Tuning, names: Sequence[str | None] | None, rows: int
) -> Int[np.ndarray, " B"] | None:
    """The numbers that `Batch.adapter` takes, from the names of the rows' adapters.

    Args:
      tuning: What is attached to the model.
      names: One name per row; None and `base` stand for the base model. Without names all rows get
        the base model.
      rows: The number of rows.

    Returns:
      A number per row, or None when the model has a single tuning.

    Raises:
      UserError: for an unknown name, another number of names than rows, or a single tuning.
    """
    if not tuning.held:
        if names is not None:
            raise UserError("the model has a single tuning; call `load_adapters` to choose")
        return None
    names = [None] * rows if names is None else names
    if len(names) != rows:
        raise UserError(f"{rows} prompts but {len(names)} adapters")
    numbers: dict[str | None, int] = {**tuning.held.numbers, BASE: -1, None: -1}
    for name in names:
        if name not in numbers:
            raise choice_error("adapter", name, (*tuning.adapters, BASE))
    return np.asarray([numbers[name] for name in names], np.int32)
