"""`moresjax analyze attribute`: which parts of the model and the prompt an answer comes from."""

import argparse
import dataclasses
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
    help = "which heads, MLPs, tokens and patches an answer comes from"
    command = add_question_analysis(kinds, "attribute", run_attribute, help)
    command.add_argument("--answer", metavar="TEXT", help="default: what the model answers")
    command.add_argument(
        "--against",
        metavar="TEXT",
        help="another answer: what speaks for the first rather than for this one",
    )
    command.add_argument(
        "--method",
        default="input_x_gradient",
        help="scores of tokens: input_x_gradient or gradient_norm (default: %(default)s)",
    )


def run_attribute(args: argparse.Namespace) -> None:
    """Splits up the answer, writes `attribution.json` and draws it."""
    import numpy as np

    from moresjax.core.folders import check_new, new_folder
    from moresjax.core.json_files import write_json
    from moresjax.inference.attribution import attribute_logit, attribute_tokens
    from moresjax.reports.plots import save
    from moresjax.reports.prompt_figures import (
        attribution_figure,
        attribution_on_image,
        parts_figure,
        pictures,
        plain,
    )

    check_new(Path(args.out), "analysis")
    model = load_tuned_model(args)
    question = args.prompt, args.image
    options, marks = {"answer": args.answer, "against": args.against}, marks_of(args.mark)
    found = attribute_tokens(model, *question, **options, marks=marks, method=args.method)
    options["answer"] = found.answer
    parts = attribute_logit(model, *question, **options, marks=marks)
    values = {name: np.asarray(x).tolist() for name, x in dataclasses.asdict(parts).items()}
    content = {
        **model.provenance,
        "prompt": args.prompt,
        "images": args.image,
        "answer": found.answer,
        "against": args.against,
        "method": args.method,
        "value": found.value,
        "tokens": found.tokens,
        "scores": found.scores.tolist(),
        "grids": plain(found.grids),
        "parts": values,
    }
    with new_folder(args.out, "analysis") as folder:
        write_json(folder / "attribution.json", content, indent=None)
        save(parts_figure(parts), folder / "parts.png", dpi=150)
        save(attribution_figure(found), folder / "tokens.png", dpi=150)
        if len(found.grids):
            for number, picture in enumerate(pictures(model, args.image)):
                name = f"image{number + 1}.png"
                save(attribution_on_image(picture, found, number), folder / name, dpi=150)
    layer, head = np.unravel_index(np.abs(parts.heads).argmax(), parts.heads.shape)
    best = int(np.abs(found.scores).argmax())
    lines = [
        f"answer {found.answer!r}: log-probability {found.value:.3f}, logit of its first token "
        f"{parts.logit:.3f}" + (f", both minus those of {args.against!r}" if args.against else ""),
        f"most by a head: layer {layer} head {head}, {parts.heads[layer, head]:.3f}",
        f"most by a token: {found.tokens[best]!r} ({best}), {found.scores[best]:.3f}",
        f"figures: {args.out}",
    ]
    show(args, content, "\n".join(lines))
