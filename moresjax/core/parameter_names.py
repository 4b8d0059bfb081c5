"""Names of parameters, and patterns over them."""

import re
from collections.abc import Iterable

from flax import nnx

from moresjax.core.patterns import full_match


def path_name(path: Iterable[object]) -> str:
    """Dotted name of a parameter.

    >>> path_name(("llm", "blocks", "attn", "q", "kernel"))
    'llm.blocks.attn.q.kernel'
    """
    return ".".join(str(part) for part in path)


def named_parameters(model: nnx.Module | nnx.State) -> dict[str, nnx.Variable]:
    """The parameters of a model by name; of a state, all its variables."""
    state = model if isinstance(model, nnx.State) else nnx.state(model, nnx.Param)
    return {path_name(path): variable for path, variable in nnx.to_flat_state(state)}


def layered_parameters(model: nnx.Module) -> dict[str, list[nnx.Variable]]:
    """The parameters of a model by the names they have while the LLM's blocks are stacked.

    Blocks that are held one by one, as in a model that has generated, give a variable per layer;
    all other names have a single one.
    """
    stem, layers = "llm.blocks.", {}
    for name, variable in named_parameters(model).items():
        layer, _, rest = name.removeprefix(stem).partition(".")
        one_by_one = name.startswith(stem) and layer.isdigit()
        own = layers.setdefault(stem + rest if one_by_one else name, {})
        own[int(layer) if one_by_one else 0] = variable
    return {name: [own[number] for number in sorted(own)] for name, own in layers.items()}


# Other names of some parameters in patterns.
ALIASES = {"lm_head": "llm.head"}


def current_name(name: str) -> str:
    """The present name of a parameter that any version has saved."""
    return re.sub(r"^tuning\.theta\b", "tuning.params", name)


def first_name(name: str) -> str:
    """The name of a parameter in version 0.1, by which fingerprints still go."""
    return re.sub(r"^tuning\.params\b", "tuning.theta", name)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter.

    >>> matches("llm.blocks.attn.q.kernel", "llm.blocks")
    True
    >>> matches("llm.blocks.attn.q.kernel", "llm[.].*[.]q[.].*")
    True

    Args:
      name: The dotted name of the parameter.
      pattern: The name itself, the beginning of a name up to a dot, or a regex for all of it.
        `lm_head` stands for `llm.head`, `vision:lastN` for the last N blocks of the vision encoder.

    Raises:
      UserError: The pattern is no regex, or takes too long.
    """
    pattern = "vision.last" if pattern.startswith("vision:last") else ALIASES.get(pattern, pattern)
    return name == pattern or name.startswith(pattern + ".") or full_match(pattern, name)
