"""The device mesh and where arrays go on it.

Three mesh axes: `data` (replicas), `fsdp` (replicas that also split the parameters), `tensor`
(split features). Modules name the axes of their parameters; `RULES` maps those names to mesh axes.
A rule whose mesh axis does not divide the dimension is left out, so every preset works on every
model.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moresjax.core.errors import UserError, choice_error

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
RULES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
# Named meshes: sizes of the axes from how many devices there are and how many share features.
PRESETS: dict[str, Callable[[int, int], tuple[int, int, int]]] = {
    "replicated": lambda devices, tensor: (devices, 1, 1),
    "fsdp": lambda devices, tensor: (1, devices, 1),
    "fsdp+tensor": lambda devices, tensor: (1, devices // tensor, tensor),
}
# Parameters without named axes (tuning) are split only when they are large.
SPLIT_FROM = 1 << 20


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh over all devices.

    >>> mesh = make_mesh(**mesh_preset("fsdp", jax.device_count()))
    >>> mesh.axis_names
    ('data', 'fsdp', 'tensor')

    Args:
      data: Replicas of the parameters; -1: as many as the devices allow.
      fsdp: Replicas that also split the parameters among themselves; -1 likewise.
      tensor: Devices that split the features of a layer; -1 likewise.
      devices: The devices; default: all of them.

    Raises:
      UserError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, at most one of them -1")
    known = math.prod(size for size in sizes if size > 0)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_preset(name: str, devices: int) -> dict[str, int]:
    """Sizes of the axes of a named mesh, for `make_mesh` and for `config.mesh`.

    >>> mesh_preset("fsdp+tensor", 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2}

    Args:
      name: `replicated` (every device holds all parameters), `fsdp` (parameters split over all
        devices), or `fsdp+tensor` (features split over 2 neighbours too; over 4 from 16 devices
        on).
      devices: The number of devices.

    Raises:
      UserError: for another name, or a number of devices that has no such mesh.
    """
    if name not in PRESETS:
        raise choice_error("mesh preset", name, PRESETS)
    tensor = 4 if devices >= 16 else 2
    sizes = PRESETS[name](devices, tensor)
    if math.prod(sizes) != devices:
        raise UserError(f"mesh preset {name} needs a multiple of {tensor} devices, got {devices}")
    return dict(zip(AXES, sizes, strict=True))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch_sharding(x: Array) -> Array:
    """Says inside a jitted function that activations `[B, ...]` are split by rows and nothing else.

    Without being told, XLA may follow the parameters instead: split features, and every row on
    every device. Does nothing where no mesh is in use (`use_mesh`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Context in which functions are traced for a mesh (None: for none)."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def parameter_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of every parameter, in a state of the same structure."""

    def choose(variable: nnx.Variable) -> nnx.Variable:
        spec = _spec(np.shape(variable.get_value()), variable.get_metadata().get("axes"), mesh)
        return variable.replace(NamedSharding(mesh, spec))

    return jax.tree.map(choose, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _spec(shape: tuple[int, ...], axes: Sequence[str | None] | None, mesh: Mesh) -> PartitionSpec:
    if axes is None:
        return _split_largest(shape, mesh)
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)  # stacked blocks lead with layers
    spec = [None if name is None else RULES.get(name) for name in names]
    fits = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=True)]
    return PartitionSpec(*fits)


def _split_largest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if math.prod(shape) < SPLIT_FROM:
        return PartitionSpec()
    largest = max(range(len(shape)), key=lambda i: shape[i])
    if shape[largest] % mesh.shape["fsdp"]:
        return PartitionSpec()
    return PartitionSpec(*("fsdp" if i == largest else None for i in range(len(shape))))


def shard_params(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The state on the mesh, each parameter in its sharding."""
    return jax.device_put(state, parameter_shardings(state, mesh))
