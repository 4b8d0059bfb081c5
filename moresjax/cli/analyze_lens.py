"""`moresjax analyze lens`: what every layer would say next."""

import argparse
from pathlib import Path

from moresjax.cli.options import (
    Commands,
    add_question_analysis,
    load_tuned_model,
    marks_of,
    show,
)


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "what every layer would say next, at each token and visual token (logit lens)"
    command = add_question_analysis(kinds, "lens", run_lens, help)
    command.add_argument(
        "--words",
        metavar="A,B",
        help="words whose first tokens are looked at in every layer and on the images; default: "
        "what the last layer finds likeliest",
    )
    command.add_argument(
        "--top", type=int, default=5, metavar="K", help="likeliest tokens to keep (default: 5)"
    )


def run_lens(args: argparse.Namespace) -> None:
    """Reads the layers, writes `lens.json` and draws them."""
    from moresjax.core.folders import check_new, new_folder
    from moresjax.core.json_files import write_json
    from moresjax.inference.lens import logit_lens
    from moresjax.reports.plots import save
    from moresjax.reports.prompt_figures import lens_figure, lens_on_image, pictures, plain

    check_new(Path(args.out), "analysis")
    model = load_tuned_model(args)
    words = [word.strip() for word in args.words.split(",")] if args.words else None
    lens = logit_lens(
        model, args.prompt, args.image, words=words, top=args.top, marks=marks_of(args.mark)
    )
    content = {
        **model.provenance,
        "prompt": args.prompt,
        "images": args.image,
        "tokens": lens.tokens,
        "top": lens.top,
        "logprobs": lens.logprobs.tolist(),
        "words": [*lens.words],
        "word_logprobs": lens.word_logprobs.tolist(),
        "grids": None if lens.grids is None else plain(lens.grids),
    }
    with new_folder(args.out, "analysis") as folder:
        write_json(folder / "lens.json", content, indent=None)
        save(lens_figure(lens), folder / "lens.png", dpi=150)
        if lens.grids is not None:
            for number, picture in enumerate(pictures(model, args.image)):
                name = f"image{number + 1}.png"
                save(lens_on_image(picture, lens, number), folder / name, dpi=150)
    lines = [
        f"layer {layer}: "
        + ", ".join(f"{text!r} {value:.2f}" for text, value in zip(own[-1], logs[-1], strict=True))
        for layer, (own, logs) in enumerate(zip(lens.top, lens.logprobs, strict=True))
    ]
    show(args, content, "\n".join([*lines, f"figures: {args.out}"]))
