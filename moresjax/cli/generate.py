"""`moresjax generate`: answers a prompt, a file of prompts, or a person at the terminal."""

import argparse

from moresjax.cli.options import (
    Commands,
    adapter_folders,
    add_batch_size,
    add_command,
    add_loading,
    add_marks,
    load_model,
    marks_of,
    show,
)
from moresjax.core.errors import UserError

EARLY_STOPPING = {"false": False, "true": True, "never": "never"}


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    generate = add_command(commands, "generate", run, "answer a prompt about images", compiles=True)
    generate.add_argument(
        "--model", required=True, metavar="DIR", help="a workdir or a Hugging Face folder"
    )
    generate.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="an image; may be repeated"
    )
    generate.add_argument("--prompt", help="default: a chat, or the prompts of --prompts")
    generate.add_argument("--prompts", metavar="JSONL", help="id, prompt and images per line")
    add_marks(generate, "--prompt")
    generate.add_argument(
        "--out",
        metavar="JSONL",
        help="file for the answers to --prompts; with --json or --logprobs they have their tokens "
        "and stop reasons, too",
    )
    generate.add_argument(
        "--image-root",
        metavar="DIR",
        help="folder that --prompts names images in; default: its own",
    )
    add_batch_size(generate, 16)
    generate.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt; default: the template's. Records of --prompts may have their own",
    )
    add_loading(
        generate,
        "with names, several may be given beside the base model; each record of --prompts "
        "chooses one, and /adapter NAME in a chat",
    )
    generate.add_argument(
        "--steer",
        metavar="SPEC",
        help="a steering vector beside what is on the model, such as "
        "steer:vector=FILE.npz:KEY,alpha=2,layers=5; several between slashes",
    )
    generate.add_argument(
        "--adapter-for",
        default="adapter",
        metavar="FIELD",
        help="field of --prompts that names a record's adapter (default: %(default)s); records "
        "without it, or with the name base, are answered by the base model",
    )
    generate.add_argument(
        "--logprobs",
        action="store_true",
        help="with --json or --prompts: also the log-probabilities of the new tokens",
    )
    _add_decoding(generate)


def _add_decoding(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0 chooses the likeliest token (default)"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the likeliest with this probability"
    )
    generate.add_argument(
        "--top-k", type=int, default=0, help="draw among so many likeliest tokens; 0: among all"
    )
    generate.add_argument(
        "--repetition-penalty",
        type=float,
        help="above 1 avoids earlier tokens; default: as the model's folder says",
    )
    generate.add_argument("--seed", type=int, default=0, help="seed for --temperature")
    generate.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="beam search for one --prompt"
    )
    generate.add_argument(
        "--length-penalty", type=float, default=1.0, help="above 0 prefers longer beams"
    )
    generate.add_argument(
        "--early-stopping",
        choices=EARLY_STOPPING,
        default="false",
        help="when the beam search ends, with the meaning of `transformers`",
    )
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="an answer ends before this text; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    """Generates for `--prompt`, `--prompts` or a chat."""
    from moresjax.cli.chat import chat_at_terminal
    from moresjax.generation.sampling import Sampling
    from moresjax.inference.files import generate_file
    from moresjax.inference.steering import add_steering

    names = "temperature", "top_k", "top_p", "repetition_penalty", "seed"
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "stop": args.stop}
    options["system"] = args.system
    if bool(args.prompts) != bool(args.out) or (args.prompts and args.prompt):
        raise UserError("a file of prompts needs --prompts and --out, and no --prompt")
    if args.num_beams != 1 and args.prompt is None:
        raise UserError("--num-beams goes with a single --prompt")
    if args.logprobs and not (args.prompts or (args.json and args.prompt is not None)):
        raise UserError("--logprobs goes with --prompts, or with --prompt and --json")
    if args.mark and args.prompt is None:
        raise UserError(
            "--mark goes with --prompt; records of --prompts have `marks`, and a chat has /mark"
        )
    marks = marks_of(args.mark)
    model = load_model(args, adapter=_adapters(args))
    if args.steer:
        add_steering(model, args.steer)
    if args.prompts:
        options |= {"image_root": args.image_root, "batch_size": args.batch_size}
        options |= {"adapter_field": args.adapter_for, "logprobs": args.logprobs}
        details = args.json or args.logprobs
        counts = generate_file(model, args.prompts, args.out, details=details, **options)
        text = f"{args.out}: {counts['records']} prompts, {counts['errors']} errors"
        show(args, counts, text)
        if counts["errors"]:
            raise UserError(
                f"{counts['errors']} of {counts['records']} prompts have no answer; {args.out} has "
                "the reason of each"
            )
        return
    if args.prompt is None:
        chat_at_terminal(model, args.model, args.image, options)
        return
    options |= {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
    options |= {"early_stopping": EARLY_STOPPING[args.early_stopping], "logprobs": args.logprobs}
    answer = model.generate(args.prompt, args.image, marks=marks, details=True, **options)
    asked = {"prompt": args.prompt, "images": args.image}
    show(args, asked | answer.to_dict(), answer.text)


def _adapters(args: argparse.Namespace) -> str | dict[str, str] | None:
    """The folder of the only `--adapter`, or those that records of `--prompts` or a chat choose."""
    pairs = adapter_folders(args)
    if len(pairs) > 1:
        if not all(name for name, _ in pairs):
            raise UserError("several --adapter need names of their own: --adapter NAME=DIR")
        if args.prompt is not None:
            raise UserError("a single --prompt takes one --adapter")
        if len(dict(pairs)) < len(pairs):
            raise UserError("two --adapter have the same name")
    if args.prompt is None and any(name for name, _ in pairs):
        return dict(pairs)
    return pairs[0][1] if pairs else None
