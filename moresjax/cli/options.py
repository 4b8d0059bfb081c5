"""Options that several subcommands share, and what they stand for."""

import argparse
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moresjax.inference.model import Model

Commands = argparse._SubParsersAction
Run = Callable[[argparse.Namespace], None]


def add_command(
    commands: Commands, name: str, run: Run, help: str, *, compiles: bool = False
) -> argparse.ArgumentParser:
    """Adds a subcommand with the options that every one has.

    Args:
      commands: The subcommands of the command line, or of a subcommand.
      name: The word that calls it.
      run: What it does with its arguments.
      help: Its line in the list of subcommands.
      compiles: Whether its compiled programs are kept for the next process.
    """
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run, compiles=compiles)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers methods, benchmarks, sources, templates or objectives; "
        "may be repeated",
    )
    return command


def add_config(command: argparse.ArgumentParser) -> None:
    """Adds `--config`; `app` then also takes `--config.key=value`."""
    command.add_argument(
        "--config",
        required=True,
        metavar="FILE[:args]",
        help="configuration file and its arguments; --config.key=value changes single keys",
    )


def add_mesh(command: argparse.ArgumentParser) -> None:
    """Adds `--mesh`, which `mesh_of` reads."""
    names = "replicated, fsdp or fsdp+tensor"
    command.add_argument("--mesh", metavar="PRESET", help=f"use all devices: {names}")


def add_prompting(command: argparse.ArgumentParser) -> None:
    """Adds how a model is asked, which `load_model` reads."""
    command.add_argument(
        "--template", metavar="NAME", help="conversation template; default: the model's own"
    )
    command.add_argument(
        "--image-aspect",
        metavar="KIND",
        help="square, or pad as LLaVA-1.5 does; default: the model's own",
    )
    command.add_argument(
        "--split-special-tokens",
        action=argparse.BooleanOptionalAction,
        help="read control tokens such as </s> in a prompt as text (default), or as control "
        "tokens, as LLaVA does",
    )
    command.add_argument(
        "--dtype",
        metavar="TYPE",
        help="of activations: float32, bfloat16, float16 or stored; default: a run's own, for a "
        "Hugging Face folder as stored on TPUs and GPUs, float32 on CPUs",
    )


def add_pyreft(command: argparse.ArgumentParser) -> None:
    """Adds what an `--adapter` of pyreft needs beside its folder."""
    command.add_argument(
        "--edits",
        default="",
        metavar="SPEC",
        help="methods and tokens of an adapter of pyreft, whose folder does not name them, such as "
        "mores:positions=image (default: loreft with its own positions)",
    )
    command.add_argument(
        "--allow-pickle", action="store_true", help="read an adapter of pyreft: it is pickled"
    )


def load_model(args: argparse.Namespace) -> "Model":
    """The model of `--model`, on the mesh of `--mesh`."""
    from moresjax.inference.load import load

    names = "template", "image_aspect", "dtype", "split_special_tokens"
    options = {name: getattr(args, name) for name in names}
    return load(args.model, mesh=mesh_of(args), **options)


def mesh_of(args: argparse.Namespace) -> "Mesh | None":
    """The mesh of `--mesh` over all devices; None without the option."""
    if args.mesh is None:
        return None
    import jax

    from moresjax.sharding.mesh import make_mesh, mesh_preset

    sizes = mesh_preset(args.mesh, jax.device_count())
    return make_mesh(sizes["data"], sizes["fsdp"], sizes["tensor"])


def show(args: argparse.Namespace, data: Mapping, text: str) -> None:
    """Prints a result: the data as one JSON object with `--json`, else the text."""
    print(json.dumps(data) if args.json else text)
