"""`moresjax serve`: a model and its adapters behind OpenAI's API, and a page to talk to them."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moresjax.cli.options import Commands, adapter_folders, add_command, add_loading, load_model
from moresjax.core.errors import UserError

if TYPE_CHECKING:
    from moresjax.inference.model import Model
    from moresjax.serve.server import ServerConfig

KEY_VARIABLE = "MORESJAX_API_KEY"


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    help = "answer requests of OpenAI's API and show a page to chat with a model"
    serve = add_command(commands, "serve", run, help, compiles=True)
    serve.add_argument(
        "model", metavar="DIR", help="a workdir, a Hugging Face folder, or the result of a demo"
    )
    serve.add_argument("--name", help="what clients call the model; default: the folder's name")
    serve.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)"
    )
    serve.add_argument(
        "--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may call the server by, beside localhost; may be repeated",
    )
    serve.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"file with the key that clients have to send; default: the variable {KEY_VARIABLE}, "
        "else no key",
    )
    serve.add_argument(
        "--rows",
        type=int,
        default=32,
        metavar="N",
        help="requests answered at a time (default: %(default)s)",
    )
    serve.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; more are refused with status 429 (default: %(default)s)",
    )
    serve.add_argument(
        "--max-new-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="the most tokens of an answer (default: %(default)s)",
    )
    serve.add_argument(
        "--max-body",
        type=int,
        default=64,
        metavar="MB",
        help="the most megabytes of a request (default: %(default)s)",
    )
    serve.add_argument(
        "--max-pixels",
        type=float,
        default=64,
        metavar="MILLIONS",
        help="the most pixels of an image (default: %(default)s)",
    )
    serve.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="a public host whose addresses of images are fetched; may be repeated (default: none, "
        "images come in the request)",
    )
    serve.add_argument(
        "--vector",
        action="append",
        default=[],
        metavar="[NAME=]FILE.npz[:KEY]",
        help="steering vectors that clients choose by name, such as vectors.npz of `analyze "
        "steer`; may be repeated",
    )
    serve.add_argument(
        "--check", action="store_true", help="answer one question with one token, and end"
    )
    add_loading(serve, "clients choose among these and the base model by name")


def run(args: argparse.Namespace) -> None:
    """Serves a model until it is interrupted."""
    config = _config(args)
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("`moresjax serve` needs its extra: pip install 'moresjax[serve]'") from None
    from moresjax.serve.run import check, serve
    from moresjax.serve.server import Server
    from moresjax.serve.steering import read_shelf

    model, folders = _load(args)
    llm = model.config.llm
    shelf = read_shelf(args.vector, llm.hidden_size, llm.num_layers)
    name = args.name or Path(args.model).resolve().name
    server = Server(model, name, config, shelf, {name: folders.pop(""), **folders})
    if args.check:
        check(server)
    else:
        serve(server, args.host, args.port, as_json=args.json)


def _config(args: argparse.Namespace) -> "ServerConfig":
    """What the options allow."""
    from moresjax.serve.images import ImageLimits
    from moresjax.serve.remote_images import RemoteLimits, check_host
    from moresjax.serve.server import ServerConfig

    for name in ("rows", "max_waiting", "max_new_tokens", "max_body", "max_pixels"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port must be from 0 to 65535, got {args.port}")
    return ServerConfig(
        rows=args.rows,
        max_waiting=args.max_waiting,
        max_new_tokens=args.max_new_tokens,
        max_body=args.max_body << 20,
        images=ImageLimits(
            max_pixels=int(args.max_pixels * 1e6),
            remote=RemoteLimits(tuple(map(check_host, args.image_host))),
        ),
        api_key=_key(args.api_key_file),
        hosts=(args.host, *args.allow_host),
    )


def _key(file: str | None) -> str | None:
    """The key that clients have to send, which no message ever shows."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--api-key-file {file} cannot be read") from None
    if not key:
        raise UserError(f"--api-key-file {file} is empty")
    return key


def _load(args: argparse.Namespace) -> "tuple[Model, dict[str, str]]":
    """The model with the adapters that clients choose from, and their folders by name.

    An adapter without a name is always on; the result of a demo has all of its own. The folder of
    the model itself has the name "".
    """
    from moresjax.studies.demo_result import demo_result

    pairs, folder = adapter_folders(args), args.model
    if demo := demo_result(folder):
        folder = str(demo.base)
        pairs = [*((name, str(path)) for name, path in demo.adapters.items()), *pairs]
        for name, path in demo.alone.items():
            alone = f"moresjax serve {folder} --adapter {path}"
            print(f"{name} changes the LLM that all rows share; alone: {alone}", file=sys.stderr)
    names = [name for name, _ in pairs]
    if len(pairs) == 1 and not names[0]:
        return load_model(args, folder, pairs[0][1]), {"": folder}
    if not all(names):
        raise UserError("several --adapter need names of their own: --adapter NAME=DIR")
    if len(set(names)) < len(names):
        raise UserError("two --adapter have the same name")
    return load_model(args, folder, dict(pairs) or None), {"": folder, **dict(pairs)}
