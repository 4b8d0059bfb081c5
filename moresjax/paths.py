"""Names of parameters, and patterns over them."""

import re


def path_name(path) -> str:
    """Dotted name of a parameter."""
    return ".".join(str(part) for part in path)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter name is the pattern, lies below it, or matches it as a whole regex."""
    return name == pattern or name.startswith(pattern + ".") or bool(re.fullmatch(pattern, name))
