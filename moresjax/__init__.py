"""moresjax: train, evaluate and explain multimodal LLMs by editing representations."""

from moresjax._version import __version__ as __version__

__all__ = ["Model", "load"]


def __getattr__(name):
    # Loaded on first use: `moresjax params` should not wait for the data and generation stacks.
    if name in __all__:
        from moresjax.inference import load as loading

        return getattr(loading, name)
    raise AttributeError(f"module 'moresjax' has no attribute {name!r}")
