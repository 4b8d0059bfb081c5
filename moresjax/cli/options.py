"""Options that several subcommands share, and what they stand for."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moresjax.core.errors import UserError
from moresjax.core.folders import named_folder

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


def add_config(command: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--config`; `app` then also takes `--config.key=value`."""
    command.add_argument(
        "--config",
        required=required,
        metavar="FILE[:args]",
        help="configuration file and its arguments; --config.key=value changes single keys",
    )


def add_planned_workdir(command: argparse.ArgumentParser) -> None:
    """Adds `--workdir` to what looks at a run that need not exist."""
    command.add_argument(
        "--workdir",
        default=".",
        metavar="DIR",
        help="the run's directory, from which paths such as ../llm start (default: here)",
    )


def add_mesh(command: argparse.ArgumentParser) -> None:
    """Adds `--mesh`, which `mesh_of` reads."""
    names = "replicated, fsdp or fsdp+tensor"
    command.add_argument("--mesh", metavar="PRESET", help=f"use all devices: {names}")


def add_loading(command: argparse.ArgumentParser, several: str = "") -> None:
    """Adds what `load_model` wants to know: devices, prompting, and what is put on the model.

    Args:
      command: The subcommand.
      several: What several `--adapter NAME=DIR` do, for the help; empty where one is allowed.
    """
    add_mesh(command)
    add_prompting(command)
    add_tuning(command, several)


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
        "--roi",
        metavar="REGION",
        help="regions of interest of a tuning that acts on them: boxes (of the prompts; default), "
        "all, center(60%%), random(60%%), random, attention(LAYER;20%%), or x0,y0,x1,y1 in shares "
        "of the image's sides",
    )
    command.add_argument(
        "--dtype",
        metavar="TYPE",
        help="dtype of activations, a judge's too: float32, bfloat16, float16 or stored; default: "
        "a run's own; Hugging Face folders: as stored on TPUs and GPUs, float32 on CPUs",
    )


def add_question_analysis(
    kinds: Commands, name: str, run: Run, help: str
) -> argparse.ArgumentParser:
    """Adds an analysis of one prompt with its images, which writes a new directory."""
    command = add_command(kinds, name, run, help, compiles=True)
    command.add_argument("--model", required=True, metavar="DIR", help="the model")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    command.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image; may be repeated"
    )
    add_marks(command, "--prompt")
    command.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    add_loading(command)
    return command


def add_marks(command: argparse.ArgumentParser, of: str, option: str = "--mark") -> None:
    """Adds `--mark`, which `marks_of` reads, about the text that the help calls `of`."""
    command.add_argument(
        option,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help=f"a piece of {of} that selectors mark(NAME) mean; may be repeated",
    )


def marks_of(pieces: Sequence[str], option: str = "--mark") -> dict[str, list[str]] | None:
    """The texts of `--mark` by name; None without one.

    Raises:
      UserError: A piece is not NAME=TEXT.
    """
    marks: dict[str, list[str]] = {}
    for piece in pieces:
        name, equals, text = piece.partition("=")
        if not (name and equals and text):
            raise UserError(f"{option} takes NAME=TEXT, got {piece!r}")
        marks.setdefault(name, []).append(text)
    return marks or None


TASKS_HELP = (
    "benchmarks, presets, tasks of lm_eval, questions of yours (FILE.jsonl or FILE.json), or code "
    "that makes them (FILE.py:NAME)"
)


def add_questions(command: argparse.ArgumentParser) -> None:
    """Adds where the questions of `--tasks` come from, and how many are asked at a time."""
    add_image_root(command)
    command.add_argument("--data-root", metavar="DIR", help="folder with the benchmarks' files")
    command.add_argument(
        "--split", metavar="SPLIT | TASK=SPLIT,..", help="default: each benchmark's own"
    )
    add_batch_size(command)


def add_batch_size(command: argparse.ArgumentParser, rows: int = 64) -> None:
    """Adds `--batch-size`, of which the default is `rows`."""
    command.add_argument(
        "--batch-size",
        type=int,
        default=rows,
        metavar="ROWS",
        help="prompts answered at a time (default: %(default)s)",
    )


def add_image_root(command: argparse.ArgumentParser) -> None:
    """Adds `--image-root`, which images of files of questions start from."""
    command.add_argument(
        "--image-root", metavar="DIR", help="folder of a question file's images; default: its own"
    )


def add_sample(command: argparse.ArgumentParser, more: str = "") -> None:
    """Adds `--sample` and `--seed`, which draw the questions of benchmarks.

    Args:
      command: The subcommand.
      more: What else the seed is for, for the help.
    """
    command.add_argument(
        "--sample", type=int, metavar="N", help="N questions of a task drawn at random"
    )
    command.add_argument(
        "--seed", type=int, default=0, help=f"seed for --sample{more} (default: %(default)s)"
    )


def add_select(command: argparse.ArgumentParser) -> None:
    """Adds `--select`, by which questions are chosen."""
    command.add_argument(
        "--select",
        action="append",
        default=[],
        metavar="FIELD~WORD;WORD",
        help="ask only questions whose field holds one of the words, or is one (FIELD=VALUE); a "
        "field is answer (the majority's, or the first caption), prompt, id or of the metadata; "
        "may be repeated",
    )


def add_length_limit(command: argparse.ArgumentParser) -> None:
    """Adds `--max-new-tokens`, for answers to benchmarks."""
    command.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the most tokens of a written answer; default: each benchmark's own limit",
    )


def add_tuning(command: argparse.ArgumentParser, several: str = "") -> None:
    """Adds what is put on a model: `--tuning`, or `--adapter` and what its folder may need.

    Args:
      command: The subcommand.
      several: What several `--adapter NAME=DIR` do, for the help; empty where one is allowed.
    """
    command.add_argument(
        "--tuning",
        metavar="SPEC",
        help="a tuning to attach with initial parameters, such as steer:vector=FILE.npz, or none; "
        "default: the model's own",
    )
    more = f"; {several}" if several else ""
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help=f"an adapter folder of moresjax, peft or pyreft, or rt_modules.bin of MRT{more}",
    )
    add_pyreft(command)


def add_pyreft(command: argparse.ArgumentParser) -> None:
    """Adds what an adapter folder of pyreft needs beside its path."""
    command.add_argument(
        "--edits",
        default="",
        metavar="SPEC",
        help="methods and tokens of an adapter of pyreft or MRT, which does not name them, such as "
        "mores:positions=image (default: loreft with its own positions; mrt-code)",
    )
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickles: an adapter of pyreft or MRT, *.bin of a folder without safetensors",
    )


def numbers(option: str, text: str, kind: type = float) -> list[Any]:
    """The numbers of an option, between commas or semicolons.

    Raises:
      UserError: A part is no number of that kind.
    """
    try:
        return [kind(piece) for piece in text.replace(";", ",").split(",") if piece.strip()]
    except ValueError:
        raise UserError(f"{option} takes numbers between commas, got {text!r}") from None


def adapter_folders(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and folder of every `--adapter`; the name is empty for a folder without one."""
    return [named_folder(value) for value in args.adapter]


def only_adapter(args: argparse.Namespace) -> str | None:
    """The folder of `--adapter`; None without the option.

    Raises:
      UserError: There are several.
    """
    folders = [folder for _, folder in adapter_folders(args)]
    if len(folders) > 1:
        raise UserError(f"{args.command} takes one --adapter, got {len(folders)}")
    return folders[0] if folders else None


def load_tuned_model(args: argparse.Namespace) -> "Model":
    """The model of `--model` with the one `--adapter` that there may be.

    Raises:
      UserError: There are several adapters, options contradict each other, or a folder is bad.
    """
    return load_model(args, adapter=only_adapter(args))


def load_model(
    args: argparse.Namespace,
    folder: str | None = None,
    adapter: str | Mapping[str, str] | None = None,
) -> "Model":
    """The model of `--model` on the mesh of `--mesh`, with what `add_loading` asks for.

    Args:
      args: The arguments of the command.
      folder: The model's folder; default: that of `--model`.
      adapter: The adapter folder to put on it, or several by name.

    Raises:
      UserError: Options contradict each other, or a folder is bad.
    """
    from moresjax.inference.load import load

    if args.adapter and args.tuning is not None:
        raise UserError("--tuning and --adapter both say what to put on the model; give one")
    if args.edits and not args.adapter:
        raise UserError("--edits describes an --adapter of pyreft; give its folder")
    names = "template", "image_aspect", "dtype", "split_special_tokens", "roi", "tuning"
    options = {name: getattr(args, name) for name in names}
    allow = args.allow_pickle
    model = load(folder or args.model, mesh=mesh_of(args), allow_pickle=allow, **options)
    if isinstance(adapter, str):
        model.load_adapter(adapter, edits=args.edits, allow_pickle=allow)
    elif adapter:
        model.load_adapters(adapter, edits=args.edits, allow_pickle=allow)
    return model


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
