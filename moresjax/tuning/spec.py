"""Spec strings: `method[:key=value,...]`, several joined by `/`.

mores:rank=1,positions=image:f4+l5,layers=0;2;4/lora:rank=8

A preset is a name for a method with some keys, to which further keys may be added:
`mores-large:layers=deep`. A method may stand for several others (`Method.parts`).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import load_plugins
from moresjax.tuning.base import METHODS, Method

MAX_LENGTH = 10_000  # characters of a spec
PRESETS: dict[str, str] = {}

# Not the slashes inside the path of a file.
_BETWEEN_METHODS = re.compile(r"/(?![^,=]*\.npz)")


def preset(name: str, spec: str) -> None:
    """Makes `name` stand for `method:key=value,...` in spec strings."""
    PRESETS[name] = spec


def parse_spec(spec: str) -> tuple[Method, ...]:
    """Parses a tuning spec.

    >>> import moresjax.tuning  # registers the methods
    >>> steering, lora = parse_spec("mores:rank=2,layers=0;2/lora:rank=8,targets=q;v")
    >>> steering.rank, steering.layers, lora.targets
    (2, '0;2', 'q;v')
    >>> format_spec([steering, lora])
    'mores:layers=0;2,rank=2/lora:targets=q;v'

    Raises:
      UserError: for an unknown method or key or a value of the wrong type.
    """
    load_plugins()
    if len(spec) > MAX_LENGTH:
        raise UserError(f"tuning {spec!r} has {len(spec):,d} characters; at most {MAX_LENGTH:,d}")
    pieces = _BETWEEN_METHODS.split(spec)
    return tuple(part for piece in pieces for part in _parse_method(piece.strip()).parts())


def keys_of(spec: str) -> tuple[str, ...]:
    """The keys of the last method of a spec; none where there is no such method.

    >>> keys_of("mores:rank=2/vera:rank=4")
    ('layers', 'rank', 'dropout', 'seed', 'targets')
    """
    load_plugins()
    name = _BETWEEN_METHODS.split(spec)[-1].partition(":")[0].strip()
    name = PRESETS.get(name, name).partition(":")[0]
    return keys_of_method(METHODS[name]) if name in METHODS else ()


def keys_of_method(method: type[Method]) -> tuple[str, ...]:
    """The keys of a method in spec strings."""
    return tuple(field.name for field in dataclasses.fields(method) if field.init)


def with_defaults(spec: str, defaults: Mapping[str, Mapping[str, object]]) -> str:
    """A spec whose methods have some keys, where it does not set them itself.

    >>> with_defaults("full/mores-base:layers=deep", {"mores": {"dropout": 0.05}})
    'full/mores-base:layers=deep,dropout=0.05'

    Args:
      spec: The spec.
      defaults: Keys and their values, by method; those of a preset are its method's.
    """
    pieces = []
    for piece in _BETWEEN_METHODS.split(spec):
        name, _, arguments = piece.strip().partition(":")
        method, _, preset_arguments = PRESETS.get(name, name).partition(":")
        given = {item.partition("=")[0] for item in f"{preset_arguments},{arguments}".split(",")}
        more = [f"{k}={x}" for k, x in defaults.get(method, {}).items() if k not in given]
        keys = ",".join([*filter(None, [arguments]), *more])
        pieces.append(name + (f":{keys}" if keys else ""))
    return "/".join(pieces)


def format_spec(methods: Iterable[Method]) -> str:
    """The spec string of methods, default values left out; the inverse of `parse_spec`."""
    return "/".join(_format_method(method) for method in methods) or "none"


def _format_method(method: Method) -> str:
    changed = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if value != field.default and field.init:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            changed.append(f"{field.name}={text}")
    return method.name + (":" + ",".join(changed) if changed else "")


def _parse_method(piece: str) -> Method:
    name, _, arguments = piece.partition(":")
    if name in PRESETS:
        name, _, given = PRESETS[name].partition(":")
        arguments = f"{given},{arguments}"
    if name not in METHODS:
        raise choice_error("tuning method", name, sorted({*METHODS, *PRESETS}))
    cls = METHODS[name]
    types = get_type_hints(cls)
    keys = keys_of_method(cls)
    values = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if key not in keys or not equals:
            raise choice_error(f"key of tuning method {name!r}", argument, keys or ("none",))
        values[key] = _convert(name, key, value, types[key])
    return cls(**values)


def _convert(method: str, key: str, value: str, kind: Any) -> object:
    # Of a key that may be left out, which is what None stands for.
    kind = next((other for other in get_args(kind) if other is not type(None)), kind)
    if kind is bool:
        if value not in ("true", "false"):
            raise choice_error(f"value of {method}:{key}", value, ("true", "false"))
        return value == "true"
    try:
        return kind(value)
    except ValueError:
        raise UserError(
            f"{method}:{key} takes {'a whole number' if kind is int else 'a number'}, got {value!r}"
        ) from None


def check_choice(method: Method, key: str, allowed: tuple[str, ...]) -> None:
    """For `__post_init__`: the field must have one of the allowed values."""
    if getattr(method, key) not in allowed:
        raise choice_error(f"value of {method.name}:{key}", getattr(method, key), allowed)
