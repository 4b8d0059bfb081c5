"""`moresjax analyze attention`: how much attention goes to the image."""

import argparse
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moresjax.cli.options import (
    Commands,
    adapter_folders,
    add_command,
    add_loading,
    add_questions,
    add_sample,
    load_model,
    show,
)
from moresjax.core.errors import UserError
from moresjax.core.folders import named_folder

if TYPE_CHECKING:
    from moresjax.evaluation.tasks import BenchmarkTask

LIMIT = 100  # questions of a task, where no number is given


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "how much attention goes to the image, and LMAR"
    attention = add_command(kinds, "attention", run_attention, help, compiles=True)
    attention.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="a model, and its name in the plots; may be repeated",
    )
    attention.add_argument(
        "--tasks",
        metavar="A,B",
        help="benchmarks, presets, questions of yours (FILE.jsonl or FILE.json), or code that "
        "makes them (FILE.py:NAME); default: the runs' validation data",
    )
    add_questions(attention)
    attention.add_argument(
        "--limit", type=int, metavar="N", help=f"items per task (default: {LIMIT}, or --sample)"
    )
    add_sample(attention)
    add_loading(
        attention,
        "several, or one for each of several models: NAME=DIR; the name is that of the model that "
        "it is put on, or, with a single --model, its own in the plots",
    )
    attention.add_argument("--out", required=True, metavar="DIR", help="directory for the plots")


def run_attention(args: argparse.Namespace) -> None:
    """Measures attention and draws it."""
    from moresjax.evaluation.attention_log import attention_line
    from moresjax.reports.attention import attention_report

    models = _models(args)
    limit = LIMIT if args.limit is None and args.sample is None else args.limit
    summaries = attention_report(
        [
            (name, functools.partial(load_model, args, folder, adapter))
            for name, folder, adapter in models
        ],
        _tasks(args, [folder for _, folder, _ in models], limit),
        args.out,
        {name: folder for name, folder, _ in models},
        {name: adapter for name, _, adapter in models},
        data_root=args.data_root,
        image_root=args.image_root,
        limit=limit,
        sample=args.sample,
        seed=args.seed,
        split=args.split,
        batch_size=args.batch_size,
    )
    lines = [attention_line(name, summary) for name, summary in summaries.items()]
    show(args, summaries, "\n".join([*lines, f"plots: {args.out}"]))


def _tasks(
    args: argparse.Namespace, folders: Sequence[str], limit: int | None
) -> "list[str] | list[BenchmarkTask]":
    """The tasks that are named, or the runs' validation data."""
    from moresjax.evaluation.validation import validation_task

    if args.tasks:
        return args.tasks.split(",")
    for name in ("data_root", "image_root", "split"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is about --tasks, which name what the models are asked")
    return [validation_task(folders, limit=limit, sample=args.sample, seed=args.seed)]


def _models(args: argparse.Namespace) -> list[tuple[str, str, str | None]]:
    """Name, folder and adapter folder of everything that is asked."""
    models = [named_folder(value) for value in args.model]
    adapters = adapter_folders(args)
    found: list[tuple[str, str, str | None]]
    if len(models) == 1 and adapters:
        ((given, folder),) = models
        found = [(name or given or Path(put_on).name, folder, put_on) for name, put_on in adapters]
    else:
        names = [name or Path(folder).name for name, folder in models]
        for name, put_on in adapters:
            if name not in names:
                raise UserError(
                    f"--adapter {put_on} needs the name of the model that it is put on; choose "
                    f"from: {', '.join(names)}"
                )
        _check_different([name for name, _ in adapters], "--adapter")
        of = dict(adapters)
        found = [(n, folder, of.get(n)) for n, (_, folder) in zip(names, models, strict=True)]
    _check_different([name for name, _, _ in found], "models")
    return found


def _check_different(names: Sequence[str], what: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"two {what} have the name {twice[0]!r}; give NAME=DIR with other names")
