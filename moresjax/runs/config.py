"""The configuration of a run: every key, its default, and how config files are read.

A config file defines `get_config(arg=None)`, starts from `base_config()` and changes values. It is
named with arguments after a colon, and single values are overridden on the command line:

    moresjax train --config configs/digits.py:stage=finetune,tuning=mores --config.steps=100
"""

import ast
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections

from moresjax.core.errors import UserError, choice_error

RANDOM = "random"
# Dicts whose keys are checked where they are used: options of a source, fields of a part.
# Keys that version 0.1 had, and what they are called now.
RENAMED = {
    "length": "max_seq_len",
    "images": "images_per_row",
    "window": "pack_window",
    "reading_threads": "num_workers",
    "probe_every": "lmar_every",
}
OPEN = ("data", "validation.data", "model.llm", "model.vision")


def base_config() -> ml_collections.ConfigDict:
    """Every key with its default. Keys not listed here are refused."""
    config = ml_collections.ConfigDict(
        {
            "name": "run",
            "seed": 0,
            # Parts by zoo name, or a dict of configuration fields; vision "" for a plain LLM.
            "model": {"llm": "", "vision": "", "connector": "mlp2x_gelu", "classes": ()},
            "dtype": "",  # of activations, in all parts; "": as each part says
            "remat": False,  # compute activations again in the backward pass, in all parts
            "attention": "auto",  # of the LLM: "xla", or a kernel: "splash" (TPU), "cudnn" (GPU)
            "quantize": "",  # "int8": the LLM's blocks, frozen, in eight bits
            # Where each part's weights come from: "random", a workdir of an earlier run, or a
            # Hugging Face folder. Paths with a leading dot start from the run's own workdir.
            "init": {"llm": RANDOM, "vision": RANDOM, "connector": RANDOM},
            "objective": "next_token",
            "tuning": "none",
            "also_train": ("connector",),
            "tokenizer": "",  # "digits" or a folder that transformers can load
            # A folder with an image processor of transformers; "": images are scaled to the square.
            "image_processor": "",
            "image_aspect": "square",  # "pad": first made square with the mean colour
            "template": "vicuna_v1",
            "data": {"name": "digits"},
            "max_seq_len": 2048,  # tokens per row
            "images_per_row": 1,
            "batching": "pad",  # "pack": several samples per row; "bucket": rows of like length
            "pack_window": 0,  # samples that are packed, or sorted, together; 0: a usual number
            "buckets": (),  # lengths of rows in buckets; (): quarters of `max_seq_len`
            "on_bad_sample": "raise",  # "skip": go on, count and list them
            "num_workers": 1,
            "batch_size": 128,
            "microbatches": 1,
            "steps": 1000,
            "optimizer": {
                "lr": 1e-3,
                "lr_by_component": "",  # PATTERN=LR;... by parameter path
                "schedule": "cosine",
                "warmup": 0.03,
                "end": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip": 1.0,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "checkpoint": {"every": 500, "keep": 2},
            "log_every": 20,
            # Every so many steps and at the end, loss and accuracy on a source of its own (`data`)
            # or on a share of the training samples, which then never train. 0 steps: never.
            # `batches` of batch_size / microbatches rows; 0: as many as there are.
            "validation": {"data": {}, "share": 0.0, "every": 0, "batches": 0},
            "lmar_every": 0,  # steps between attention statistics (LMAR); 0: never
            "tensorboard": True,
        }
    )
    return config.lock()


def load_config(name: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Reads `FILE[:args]` and applies `key=value` overrides.

    Raises:
      UserError: for a missing file, an unknown key, or a value of another type.
    """
    path, _, argument = name.partition(":")
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    spec = importlib.util.spec_from_file_location("moresjax_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path} defines no get_config(arg)")
    try:
        config = module.get_config(argument or None)
    except (AttributeError, KeyError) as error:
        for old, new in RENAMED.items():
            if f'Key "{old}" does not exist' in str(error):
                raise UserError(f"{path}: config key {old} is now {new}") from None
        raise
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} is not of the form key=value")
        set_value(config, key, value)
    return config


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
    """Arguments of a config file, `a=1,b=text`, over their defaults; types follow the defaults.

    A tuning spec may itself contain `,` and `=`: a piece that names no argument belongs to the
    value before it.

    Raises:
      UserError: for an unknown argument.
    """
    values = dict(defaults)
    last = None
    for piece in filter(None, (arg or "").split(",")):
        key, equals, value = piece.partition("=")
        if equals and key in defaults:
            values[key], last = _convert(key, value, defaults[key]), key
        elif last is not None and isinstance(defaults[last], str):
            values[last] += "," + piece
        else:
            raise choice_error("config argument", piece, defaults)
    return ml_collections.ConfigDict(values)


def set_value(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets `a.b` from text, keeping the type.

    Raises:
      UserError: for an unknown key or a value of another type.
    """
    if key in RENAMED:
        raise UserError(f"config key {key} is now {RENAMED[key]}")
    *parents, last = key.split(".")
    node = config
    for name in (*parents, last):
        opened = name is last and ".".join(parents) in OPEN
        if not isinstance(node, ml_collections.ConfigDict) or not (name in node or opened):
            allowed = sorted(node) if isinstance(node, ml_collections.ConfigDict) else ()
            raise choice_error("config key", key, allowed)
        if name is not last:
            node = node[name]
    if last in node:
        node[last] = _convert(key, text, node[last])
    else:
        with node.unlocked():
            node[last] = _literal(text)


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(key: str, text: str, like):
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


def save_config(config: ml_collections.ConfigDict, path: str | Path) -> None:
    Path(path).write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(path: str | Path) -> ml_collections.ConfigDict:
    """A config written by `save_config`; keys that it lacks have their defaults.

    Raises:
      UserError: when the file is not one.
    """
    config = base_config().unlock()
    try:
        with config.ignore_type():
            values = json.loads(Path(path).read_text())
            config.update({RENAMED.get(key, key): value for key, value in values.items()})
        # JSON has no tuples.
        config.also_train = tuple(config.also_train)
        config.buckets = tuple(config.buckets)
        config.model.classes = tuple(config.model.classes)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from None
    return config.lock()


def differences(a: Mapping, b: Mapping, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two configs."""
    found = []
    for key in sorted({*a, *b}):
        # JSON has no tuples: a list is the same.
        x, y = (list(v) if isinstance(v, tuple) else v for v in (a.get(key), b.get(key)))
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(prefix + key)
    return found
