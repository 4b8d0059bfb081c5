"""What all rooms share: the type of arrays in signatures, and dataclasses that are pytrees."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast, dataclass_transform

import jax
import numpy as np
from jaxtyping import Int

AnyArray = jax.Array | np.ndarray
Ids = Sequence[int] | Int[AnyArray, "_"]  # token ids of one text
Numbers = AnyArray | int | float | Sequence  # an array, a number, or numbers in lists
# A fast tokenizer of `transformers`, whose import takes seconds; its classes differ in their types.
Tokenizer = Any
T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree; fields with `metadata={"static": True}` are no leaves.

    JAX rebuilds trees with whatever leaves it needs (shapes, shardings, None). Here, unlike with
    `jax.tree_util.register_dataclass`, that does not go through `__init__`, whose run-time checks
    are for what people construct.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cast(Any, cls))  # a type checker does not know that it has some
    static = [f.name for f in fields if f.metadata.get("static")]
    leaves = [f.name for f in fields if f.name not in static]

    def flatten(tree: T) -> tuple[list, tuple]:
        return [getattr(tree, n) for n in leaves], tuple(getattr(tree, n) for n in static)

    def flatten_with_keys(tree: T) -> tuple[list, tuple]:
        children, aux = flatten(tree)
        keys = map(jax.tree_util.GetAttrKey, leaves)
        return list(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple, children: Iterable) -> T:
        tree = object.__new__(cls)
        for name, value in [*zip(leaves, children, strict=True), *zip(static, aux, strict=True)]:
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
