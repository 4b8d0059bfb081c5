"""How configurations are written: config files, `key=value` overrides, and `config.json` of a run.

A config file defines `get_config(arg=None)`, starts from `base_config()` and assigns values. It is
named with arguments after a colon, and single values are overridden on the command line:

    moresjax train --config digits:stage=finetune,tuning=mores --config.steps=100

`moresjax.runs.run_config` lists every key.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from moresjax.core.errors import UserError, choice_error
from moresjax.core.json_files import read_object, write_json
from moresjax.core.plugins import use_plugins
from moresjax.core.ranges import check_ranges
from moresjax.models.zoo import LLMS, VISION
from moresjax.runs.run_config import BUDGET, RENAMED_KEYS, RunConfig, check_spelling, resolve
from moresjax.runs.saved_identity import saved_identity
from moresjax.tuning.spec import keys_of

logger = logging.getLogger(__name__)

# Dicts whose keys are checked where they are used: options of a source, fields of a part.
OPEN = ("data", "validation.data", "model.llm", "model.vision")
# Fields of parts that version 0.1 wrote under another name.
RENAMED_FIELDS = {"last_layers": "num_trainable_blocks"}


def base_config() -> ml_collections.ConfigDict:
    """Every key with its default, to be changed by assignment.

    Example:
      >>> config = base_config()
      >>> config.model.vision = "clip-l-14-336"
      >>> config.data = {"name": "llava", "files": "mine.json", "image_root": "images"}
      >>> config.max_seq_len
      2048

    Keys that are not listed in `RunConfig` are refused when the configuration is used.
    """
    return ml_collections.ConfigDict(RunConfig().to_dict(), type_safe=False)


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file and applies overrides.

    Example:
      >>> load_config("digits:stage=finetune,tuning=mores:rank=2", ["steps=5"]).steps
      5

    Args:
      name: `FILE[:args]`, or `NAME[:args]` of a packaged config.
      overrides: Texts `key=value`. One of `steps`, `samples` and `epochs` takes the place of the
        one that the file gives.

    Raises:
      UserError: for a missing file, an unknown key, a value of another type, or a number outside of
        its range.
    """
    place, _, argument = name.partition(":")
    path = find_config(place)
    spec = importlib.util.spec_from_file_location("moresjax_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _told_with_its_line(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path} defines no get_config(arg)")
    with _told_with_its_line(path):
        config = module.get_config(argument or None)
    if not isinstance(config, RunConfig | ml_collections.ConfigDict | Mapping):
        raise UserError(f"get_config of {path} returned {config!r}, which is no configuration")
    if not isinstance(config, ml_collections.ConfigDict):
        config = ml_collections.ConfigDict(resolve(config).to_dict(), type_safe=False)
    _clear_budget(config, overrides)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} is not of the form key=value")
        set_value(config, key, value)
    resolved = resolve(config)
    check_ranges(resolved, "config key ")
    use_plugins(resolved.plugins)
    return resolved


@contextlib.contextmanager
def _told_with_its_line(path: Path) -> Iterator[None]:
    """Where a config file runs: what goes wrong in it is told with its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else [None, *lines][-1]
        reason = " ".join(str(error).split())
        raise UserError(
            f"config file {path}, line {line}: {type(error).__name__}: {reason}"
        ) from error


def _clear_budget(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Takes back how long a config file's run is, where an override says it."""
    named = [key for key in BUDGET if any(o.startswith(f"{key}=") for o in overrides)]
    if len(named) > 1:
        raise UserError(
            f"give one of {', '.join(BUDGET)}: how long the run is; got {' and '.join(named)}"
        )
    for key in BUDGET if named else ():
        config[key] = getattr(RunConfig(), key)


def find_config(place: str) -> Path:
    """The config file at a path, or the packaged one of that name: `digits`, `configs/digits.py`.

    Raises:
      UserError: when there is neither; names the packaged ones.
    """
    path = Path(place)
    if path.is_file():
        return path
    packaged = _packaged_configs()
    folder = str(path.parent)
    if path.stem in packaged and path.suffix in ("", ".py") and folder in (".", "configs"):
        return packaged[path.stem]
    raise UserError(
        f"config file {place} does not exist; the packaged configs are {', '.join(packaged)}"
    )


def _packaged_configs() -> dict[str, Path]:
    """The config files that come with the package, by name.

    Their folder is asked of Python: an editable install leaves it outside of `moresjax/`.
    """
    spec = importlib.util.find_spec("moresjax.configs")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return {f.stem: f for folder in folders for f in sorted(Path(folder).glob("[!_]*.py"))}


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Arguments of a config file, `a=1,b=text`, over their defaults; types follow the defaults.

    A tuning spec may itself contain `,` and `=`: a piece that names no argument belongs to the
    value before it. In brackets everything does: `tuning=[vera:rank=4,seed=7]`.

    Example:
      >>> parse_arg("tuning=mores:rank=1,positions=image,seed=3", tuning="none", seed=0).seed
      3

    Raises:
      UserError: for an unknown argument, one that is given twice, or a piece that may be an
        argument as well as a key of the tuning method before it.
    """
    values = dict(defaults)
    last, given = None, set()
    for piece in _pieces(arg or ""):
        key, equals, value = piece.partition("=")
        if equals and key in defaults:
            if last is not None and key in keys_of(str(values[last])):
                raise UserError(
                    f"{piece} after {last}={values[last]} may be the run's {key} or the method's; "
                    f"write {last}=[{values[last]}], with {piece} inside or outside of the brackets"
                )
            if key in given:
                raise UserError(f"config argument {key} is given twice")
            given.add(key)
            last = key
            if isinstance(defaults[key], str) and value.startswith("["):
                if value.find("]") != len(value) - 1:
                    raise UserError(f"config argument {piece} must end with the bracket's end")
                value, last = value[1:-1], None
            values[key] = _convert(key, value, defaults[key])
        elif last is not None and isinstance(defaults[last], str):
            values[last] += "," + piece
        else:
            raise choice_error("config argument", piece, defaults)
    return ml_collections.ConfigDict(values)


def _pieces(arg: str) -> list[str]:
    """What stands between commas, except for commas in brackets."""
    return [piece for piece in re.findall(r"(?:[^,\[]|\[[^]]*\]?)+", arg) if piece]


def set_value(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets `a.b` from text, keeping the type.

    `model.vision.feature_layer` and the like change a field of a part that has a name.

    Raises:
      UserError: for an unknown key or a value of another type.
    """
    check_spelling(key)
    *parents, last = key.split(".")
    _name_to_fields(config, parents)
    node: Any = config
    default: Any = base_config()
    for name in (*parents, last):
        opened = name is last and ".".join(parents) in OPEN
        if not isinstance(node, ml_collections.ConfigDict) or not (name in node or opened):
            allowed = sorted(node) if isinstance(node, ml_collections.ConfigDict) else ()
            raise choice_error("config key", key, allowed)
        known = isinstance(default, ml_collections.ConfigDict) and name in default
        default = default[name] if known else node.get(name)
        if name is not last:
            node = node[name]
    if key == "model.vision.feature_layer" and text.startswith("["):
        default = None  # one layer or a list
    with config.ignore_type():
        node[last] = _literal(text) if default is None else _convert(key, text, default)


def _name_to_fields(config: ml_collections.ConfigDict, parents: Sequence[str]) -> None:
    """Writes a named part as its fields, so that one of them can be set."""
    zoo = {"model.llm": LLMS, "model.vision": VISION}.get(".".join(parents), {})
    parts: Any = config.get("model")
    name = parts.get(parents[-1]) if zoo and parts else None
    if isinstance(name, str) and name in zoo:
        parts[parents[-1]] = dataclasses.asdict(zoo[name])


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deep
        return text


def _convert(key: str, text: str, like: Any) -> Any:
    """Text as a value of the type of `like`."""
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise choice_error(f"value of {key}", text, ("true", "false"))
        return text.lower() == "true"
    value = _literal(text)
    if isinstance(like, tuple):
        return tuple(value) if isinstance(value, tuple | list) else (text,)
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(value, bool) or (like is not None and not isinstance(value, type(like))):
        raise UserError(
            f"config key {key} takes a value of type {type(like).__name__}, got {text!r}"
        )
    return value


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes a configuration as JSON."""
    write_json(path, config.to_dict(), sort_keys=True)


def read_config(path: str | Path) -> RunConfig:
    """A configuration written by `save_config`; keys that it lacks have their defaults.

    In place of a damaged one stands that of the newest checkpoint beside it.

    Raises:
      UserError: when the file is not one, and no checkpoint has it.
    """
    path = Path(path)
    try:
        return _resolved(read_object(path))
    except (ValueError, TypeError, AttributeError) as error:
        wrong = f"{path} is not a run's configuration: {error}"
    _, identity = saved_identity(path.parent / "checkpoints")
    try:
        found = _resolved(identity["config"])
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(wrong) from None
    logger.warning("%s; the newest checkpoint's is used", wrong)
    return found


def _resolved(values: Mapping[str, Any]) -> RunConfig:
    return resolve(present_names(values))


def present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """What version 0.1 or this one saved, with this one's names."""

    def renamed(part: Any) -> Any:
        if isinstance(part, list):
            return [renamed(item) for item in part]
        if not isinstance(part, Mapping):
            return part
        return {RENAMED_FIELDS.get(key, key): renamed(item) for key, item in part.items()}

    named = {RENAMED_KEYS.get(key, key): value for key, value in values.items()}
    if "model" in named:
        named["model"] = renamed(named["model"])
    return named


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two configurations."""
    found = []
    for key in sorted({*one, *other}):
        # JSON has no tuples: a list is the same.
        x, y = (list(v) if isinstance(v, tuple) else v for v in (one.get(key), other.get(key)))
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(prefix + key)
    return found
