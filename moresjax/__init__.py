"""moresjax: train, evaluate and explain multimodal LLMs by editing representations."""

__version__ = "0.1.0"
__all__ = ["Model", "load"]


def __getattr__(name):
    # Loaded on first use: `moresjax params` should not wait for the data and generation stacks.
    if name in __all__:
        from moresjax import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'moresjax' has no attribute {name!r}")
