"""`moresjax analyze patch`: which states carry the difference between two prompts or images."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moresjax.cli.options import (
    Commands,
    add_marks,
    add_question_analysis,
    load_tuned_model,
    marks_of,
    show,
)
from moresjax.core.errors import UserError

if TYPE_CHECKING:
    from moresjax.inference.arguments import PromptOptions
    from moresjax.inference.model import Model

    Asked = tuple[str, list[str], PromptOptions]


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "which states carry the difference between two prompts or images (patching)"
    command = add_question_analysis(kinds, "patch", run_patch, help)
    command.add_argument(
        "--other-prompt",
        metavar="TEXT",
        help="what states of the first question are put into; default: the same prompt",
    )
    command.add_argument(
        "--other-image",
        action="append",
        default=[],
        metavar="PATH",
        help="its image; may be repeated; default: the same images",
    )
    add_marks(command, "the other prompt (default: those of --mark)", "--other-mark")
    command.add_argument(
        "--answers",
        metavar="A,B",
        help="the answers whose first tokens are compared; default: what the model answers to "
        "both questions",
    )
    command.add_argument("--site", default="llm.block.out", help="default: %(default)s")
    command.add_argument(
        "--each-visual-token",
        action="store_true",
        help="visual tokens one by one; default: all of an image at a time",
    )
    command.add_argument(
        "--batch-size", type=int, default=16, metavar="ROWS", help="passes at a time (default: 16)"
    )


def run_patch(args: argparse.Namespace) -> None:
    """Patches states, writes `patching.json` and draws the effects."""
    from moresjax.core.folders import check_new, new_folder
    from moresjax.core.json_files import write_json
    from moresjax.inference.patching import patching
    from moresjax.reports.plots import save
    from moresjax.reports.prompt_figures import patching_figure

    check_new(Path(args.out), "analysis")
    if args.other_prompt is None and not args.other_image:
        raise UserError("patching compares two questions; give --other-prompt or --other-image")
    model = load_tuned_model(args)
    marks = marks_of(args.mark)
    clean: Asked = args.prompt, args.image, {"marks": marks}
    corrupt: Asked = (
        args.prompt if args.other_prompt is None else args.other_prompt,
        args.other_image or args.image,
        {"marks": marks_of(args.other_mark, "--other-mark") or marks},
    )
    answers = _answers(args, model, clean, corrupt)
    found = patching(
        model,
        clean,
        corrupt,
        answers,
        site=args.site,
        each_visual_token=args.each_visual_token,
        batch_size=args.batch_size,
    )
    questions = {"clean": clean, "corrupt": corrupt}
    content = {
        **model.provenance,
        **{name: {"prompt": q[0], "images": q[1]} for name, q in questions.items()},
        "answers": [*answers],
        "site": args.site,
        "columns": found.columns,
        "clean_score": found.clean,
        "corrupt_score": found.corrupt,
        "scores": found.scores.tolist(),
        "effect": found.effect.tolist(),
    }
    with new_folder(args.out, "analysis") as folder:
        write_json(folder / "patching.json", content, indent=None)
        save(patching_figure(found), folder / "patching.png", dpi=150)
    lines = [f"{answers[0]!r} minus {answers[1]!r}: {found.clean:.3f} and {found.corrupt:.3f}"]
    for layer, row in enumerate(found.effect):
        best = int(abs(row).argmax())
        lines.append(f"layer {layer}: most by {found.columns[best]!r}, effect {row[best]:.3f}")
    show(args, content, "\n".join([*lines, f"figure: {args.out}"]))


def _answers(
    args: argparse.Namespace, model: "Model", clean: "Asked", corrupt: "Asked"
) -> tuple[str, str]:
    """The two answers that are compared."""
    if args.answers is not None:
        given = [answer.strip() for answer in args.answers.split(",")]
        if len(given) != 2:
            raise UserError(f"--answers takes two answers, A,B, got {args.answers!r}")
        return given[0], given[1]
    first, second = (
        model.generate(text, images, max_new_tokens=8, **pointing)
        for text, images, pointing in (clean, corrupt)
    )
    if first == second:
        raise UserError(f"the model answers {first!r} to both questions; give --answers A,B")
    return first, second
