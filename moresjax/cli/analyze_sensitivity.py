"""`moresjax analyze sensitivity`: how an answer depends on concepts (TCAV)."""

import argparse
import dataclasses
from pathlib import Path

from moresjax.cli.options import (
    TASKS_HELP,
    Commands,
    add_command,
    add_loading,
    add_questions,
    add_sample,
    add_select,
    load_tuned_model,
    show,
)
from moresjax.core.errors import UserError


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "how much an answer depends on concepts, tested against random ones (TCAV)"
    command = add_command(kinds, "sensitivity", run_sensitivity, help, compiles=True)
    command.add_argument("--model", required=True, metavar="DIR", help="the model")
    command.add_argument("--states", required=True, metavar="DIR", help="a store of its states")
    command.add_argument(
        "--by",
        required=True,
        metavar="FIELD",
        help="the concept of a state: a field of its row in the index (prediction) or of its "
        "metadata (answer_type)",
    )
    command.add_argument("--concepts", metavar="A,B", help="concepts to test; default: all")
    command.add_argument("--answer", metavar="TEXT", help="default: what the model would say")
    command.add_argument("--against", metavar="TEXT", help="an answer whose logit is subtracted")
    command.add_argument("--tasks", required=True, metavar="A,B", help=TASKS_HELP)
    add_questions(command)
    command.set_defaults(batch_size=8)  # the pass backwards keeps all activations
    command.add_argument("--limit", type=int, metavar="N", help="first N questions of a task")
    add_select(command)
    command.add_argument(
        "--runs", type=int, default=20, metavar="R", help="draws of other states (default: 20)"
    )
    add_sample(command, ", for the draws of states too")
    add_loading(command)
    command.add_argument("--out", required=True, metavar="DIR", help="a new directory")


def run_sensitivity(args: argparse.Namespace) -> None:
    """Derives the answer, scores the concepts, writes `sensitivity.json` and draws it."""
    from moresjax._version import __version__
    from moresjax.analysis.sensitivity import concept_sensitivity
    from moresjax.analysis.separability import labelled
    from moresjax.analysis.states import States
    from moresjax.analysis.vectors import PROVENANCE, data_hash
    from moresjax.core.folders import check_new, new_folder
    from moresjax.core.json_files import write_json
    from moresjax.evaluation.states import Selection
    from moresjax.evaluation.steering.build import check_model
    from moresjax.evaluation.tasks import draw_examples, load_tasks, questions_hash
    from moresjax.inference.sensitivity import answer_gradients
    from moresjax.reports.plots import save
    from moresjax.reports.sensitivity import sensitivity_figure

    check_new(Path(args.out), "analysis")
    states, labels = labelled(States(args.states), args.by)
    chosen = [Selection.parse(text) for text in args.select]
    tasks = load_tasks(
        args.tasks.split(","), args.data_root, args.limit, args.split, args.image_root
    )
    tasks = draw_examples(tasks, args.sample, args.seed, args.limit)
    tasks = [
        dataclasses.replace(
            task, examples=[e for e in task.examples if all(own(e) for own in chosen)]
        )
        for task in tasks
    ]
    examples = [example for task in tasks for example in task.examples]
    if not examples:
        raise UserError("no question is selected")
    model = load_tuned_model(args)
    facts = {name: states.meta[name] for name in PROVENANCE if states.meta.get(name) is not None}
    note = check_model({"of a concept": facts}, model)
    asked = [e.prompt for e in examples], [e.images for e in examples]
    answers = {"answer": args.answer, "against": args.against}
    gradients = {}
    for site in states.sites:
        found = answer_gradients(model, *asked, site, **answers, batch_size=args.batch_size)
        gradients |= {key: found[key[1]] for key in states.keys if key[0] == site}
    wanted = [name.strip().lower() for name in (args.concepts or "").split(",") if name.strip()]
    options = {"concepts": wanted, "runs": args.runs, "seed": args.seed}
    rows = concept_sensitivity(states, labels, gradients, **options)
    content = {
        **model.provenance,
        **({"note": note} if note else {}),
        **answers,
        "by": args.by,
        "tasks": [task.name for task in tasks],
        "n": len(examples),
        "data": questions_hash(tasks),
        "states_data": data_hash(states),
        "runs": args.runs,
        "seed": args.seed,
        "tests": len(rows),
        "version": __version__,
        "concepts": [row.to_dict() for row in rows],
    }
    with new_folder(args.out, "analysis") as folder:
        write_json(folder / "sensitivity.json", content, indent=None)
        save(sensitivity_figure(rows), folder / "sensitivity.png", dpi=150)
    lines = [
        f"{row.concept} {row.site} {row.layer}: score {row.score:.3f} (random {row.random:.3f}, "
        f"p {row.p:.2g}{', significant' if row.significant else ''}; classifiers right on "
        f"{row.accuracy:.2f} of held-out states)"
        for row in rows
    ]
    lines += [note] if note else []
    show(args, content, "\n".join([*lines, f"figure: {args.out}"]))
