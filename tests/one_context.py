"""JAX lowers all programs of a thread in one MLIR context.

It makes a context for each, with tens of thousands of operations registered anew, which costs more
than the small programs of tests themselves, and keeps them all while their programs live.
"""

import threading

from jax._src.interpreters import mlir

LOCAL = threading.local()


def use_one_context() -> None:
    """Makes JAX do so."""
    initialise = mlir.ModuleContext.__init__

    def with_context(self, *, context=None, **options):
        if context is None and not hasattr(LOCAL, "context"):
            LOCAL.context = mlir.make_ir_context()
        initialise(self, context=context or LOCAL.context, **options)

    mlir.ModuleContext.__init__ = with_context


def forget_context() -> None:
    """Lets the next program of this thread begin another: constants stay in a context for ever."""
    if hasattr(LOCAL, "context"):
        del LOCAL.context
