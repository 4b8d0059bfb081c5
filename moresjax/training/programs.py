"""Compiled programs that several threads use."""

import threading
from collections.abc import Callable
from typing import Any

import jax


class OneCompiler:
    """A jitted function that threads may call at the same time; it compiles in one at a time.

    JAX alone would compile a program in every thread that asks for it before it is there.

    Args:
      function: The jitted function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._known: set[Any] = set()

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, *((x.shape, x.dtype) for x in leaves))
        if key in self._known:
            return self._function(*arguments)
        with self._lock:
            result = self._function(*arguments)
            self._known.add(key)
        return result
