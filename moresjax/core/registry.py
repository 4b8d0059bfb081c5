"""Registries: what can be chosen by name in a config, from the package itself and from plug-ins."""

from collections.abc import Callable
from typing import Any, TypeVar

from moresjax.core.errors import UserError

T = TypeVar("T")


def add_entry(registry: dict[str, T], kind: str, name: str, entry: T) -> None:
    """Puts an entry under its name; the same code may do so again (a notebook cell run twice).

    Args:
      registry: All entries by name.
      kind: What the registry holds, for the error message.
      name: The name of the entry.
      entry: A class or a function, or a value that is compared with the one of that name.

    Raises:
      UserError: The name belongs to something else.
    """
    known = registry.get(name)
    if known is not None and known != entry and not _same_definition(known, entry):
        raise UserError(f"the {kind} name {name!r} is taken; choose another")
    registry[name] = entry


def registrar(registry: dict[str, T], kind: str, name: str) -> Callable[[Any], Any]:
    """A decorator that puts what it decorates under a name and leaves it as it is.

    Args:
      registry: All entries by name.
      kind: What the registry holds, for the error message.
      name: The name of the entry.

    Raises:
      UserError: The name belongs to something else.
    """

    def register(entry: Any) -> Any:
        add_entry(registry, kind, name, entry)
        return entry

    return register


def _same_definition(one: object, other: object) -> bool:
    places = [
        (getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (one, other)
    ]
    return places[0] == places[1] and None not in places[0]
