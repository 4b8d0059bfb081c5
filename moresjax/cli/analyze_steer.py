"""`moresjax analyze steer`: vectors from states, and what they do to a model's answers."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moresjax.cli.options import (
    TASKS_HELP,
    Commands,
    add_command,
    add_length_limit,
    add_loading,
    add_questions,
    add_sample,
    load_tuned_model,
    numbers,
    show,
)
from moresjax.core.errors import UserError

if TYPE_CHECKING:
    from moresjax.evaluation.steering.build import Plan
    from moresjax.evaluation.steering.tasks import SteeringTask
    from moresjax.evaluation.tasks import BenchmarkTask
    from moresjax.inference.model import Model

POSITIONS = "last_prompt|generated"


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "steering vectors from states, and what they do to answers"
    command = add_command(kinds, "steer", run_steer, help, compiles=True)
    command.add_argument("--model", required=True, metavar="DIR", help="the model to steer")
    _add_vectors(command)
    command.add_argument("--tasks", required=True, metavar="A,B", help=TASKS_HELP)
    add_questions(command)
    command.add_argument("--limit", type=int, metavar="N", help="first N questions of a task")
    add_sample(command, ", for the controls and for --sizes")
    add_length_limit(command)
    command.add_argument(
        "--types",
        metavar="TASK=SPLIT",
        help="questions whose true answers tell the types of answers, such as vqav2=train; "
        "default: those behind the states and those of --tasks",
    )
    add_loading(command)
    command.add_argument(
        "--gguf", action="store_true", help="also write control vectors for llama.cpp"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="directory for the results")


def _add_vectors(command: argparse.ArgumentParser) -> None:
    """Adds what vectors are made of and how they steer."""
    command.add_argument("--source", metavar="DIR", help="states to steer away from")
    command.add_argument("--target", metavar="DIR", help="states to steer to")
    command.add_argument(
        "--states",
        metavar="DIR",
        help="a store that --steer chooses both sides from; with --fine, states of take=prompt, "
        "which tell first answers without asking again",
    )
    command.add_argument(
        "--steer",
        metavar="TASK",
        help="answers:yes>no, answer_type:number, style:colors, gender, refusal, or a plug-in's; "
        "default: from the answers behind --source to those behind --target",
    )
    command.add_argument(
        "--fine", metavar="DIR", help="concepts of source states: all vectors between two of them"
    )
    command.add_argument("--site", default="llm.block.out", help="default: %(default)s")
    command.add_argument(
        "--layers", metavar="L,L", help="layers of the vectors; default: all of the states"
    )
    command.add_argument(
        "--alpha", default="1", metavar="A,A", help="strengths (default: %(default)s)"
    )
    command.add_argument(
        "--positions",
        action="append",
        metavar="TOKENS",
        help=f"selector of the steered tokens (default: {POSITIONS}; the paper's: all); may be "
        "repeated",
    )
    command.add_argument(
        "--sizes", default="", metavar="N,N", help="also vectors of N states a side, 5 draws each"
    )
    command.add_argument(
        "--targets",
        type=int,
        default=1,
        metavar="T",
        help="most main answers of a kept fine vector (default: %(default)s)",
    )
    command.add_argument(
        "--keep", type=int, default=5, help="fine vectors to keep (default: %(default)s)"
    )
    command.add_argument(
        "--unique", action="store_true", help="keep one fine vector for each main answer"
    )
    command.add_argument(
        "--other-model", action="store_true", help="steer a model that the states are not of"
    )


def run_steer(args: argparse.Namespace) -> None:
    """Makes vectors, asks the questions under each, writes numbers, figures and a page."""
    from moresjax.analysis.vectors import save_vectors
    from moresjax.evaluation.steering.build import check_model, with_controls
    from moresjax.evaluation.steering.run import BASELINE, steer
    from moresjax.evaluation.tasks import draw_examples, limit_answers, load_tasks
    from moresjax.reports.steering import steering_report

    plan, steering = _plan(args)
    tasks = load_tasks(
        args.tasks.split(","), args.data_root, args.limit, args.split, args.image_root
    )
    tasks = draw_examples(tasks, args.sample, args.seed, args.limit)
    tasks = limit_answers(tasks, args.max_new_tokens)
    if args.types:
        name, _, split = args.types.partition("=")
        typed = load_tasks([name], args.data_root, None, split or None, args.image_root)
        steering.learn_types([example for task in typed for example in task.examples])
    model = load_tuned_model(args)
    note = "" if args.other_model else check_model(plan.facts, model)
    facts: dict[str, Any] = {"note": note} if note else {}
    kept = [*plan.vectors]
    if args.fine:
        kept = _chosen(args, model, plan, tasks, steering)
        facts["chosen"] = kept
        plan = with_controls(plan, kept, args.seed)
    if args.gguf:
        _check_gguf(plan)
    save_vectors(args.out, plan.vectors, plan.facts)
    if args.gguf:
        _write_gguf(args.out, plan)
    options = {"batch_size": args.batch_size, "out": args.out}
    facts |= {"cosines": plan.cosines, "sample": args.sample, "seed": args.seed}
    facts["max_new_tokens"] = args.max_new_tokens
    result = steer(model, tasks, plan.trials, steering, facts=facts, **options)
    steering_report(model, tasks, plan.trials, result, args.out, plan.cosines)
    lines = [_line(row) for row in result.overall if row["vector"] != BASELINE]
    lines += [note] if note else []
    show(args, result.facts | {"rows": result.rows}, "\n".join([*lines, f"results: {args.out}"]))


def _plan(args: argparse.Namespace) -> "tuple[Plan, SteeringTask]":
    """The vectors and trials that the options ask for, and what they are steered from and to."""
    from moresjax.analysis.concepts import Concepts
    from moresjax.analysis.states import States
    from moresjax.evaluation.steering.answers import AnyTask
    from moresjax.evaluation.steering.build import coarse_plan, fine_plan, task_of_states
    from moresjax.evaluation.steering.tasks import parse_steering_task, split_states

    alphas = numbers("--alpha", args.alpha)
    positions = args.positions or [POSITIONS]
    if args.fine:
        if args.source or args.target or args.steer or args.layers or args.sizes:
            raise UserError(
                "--fine makes vectors of concepts; --source, --target, --steer, --layers and "
                "--sizes are for coarse ones"
            )
        plan = fine_plan(Concepts.load(args.fine), alphas=alphas, positions=positions)
        return plan, AnyTask()
    if (args.states is None) == (args.source is None) or (args.source is None) != (
        args.target is None
    ):
        raise UserError(
            "vectors are made of --source and --target states, of --states that --steer chooses "
            "from, or of the concepts of --fine"
        )
    if args.states:
        if not args.steer:
            raise UserError("--states needs --steer TASK, which chooses the states of both sides")
        steering = parse_steering_task(args.steer)
        source, target = split_states(States(args.states), steering)
    else:
        source, target = States(args.source), States(args.target)
        named = parse_steering_task(args.steer) if args.steer else None
        steering = named or task_of_states(source, target)
        steering.learn([*source.index, *target.index])
    plan = coarse_plan(
        source,
        target,
        steering.name,
        site=args.site,
        layers=numbers("--layers", args.layers or "", int),
        alphas=alphas,
        positions=positions,
        sizes=numbers("--sizes", args.sizes, int),
        seed=args.seed,
    )
    return plan, steering


def _chosen(
    args: argparse.Namespace,
    model: "Model",
    plan: "Plan",
    tasks: "Sequence[BenchmarkTask]",
    steering: "SteeringTask",
) -> list[str]:
    """The names of the fine vectors to keep, by their selection scores."""
    from moresjax.analysis.states import States
    from moresjax.analysis.steering import Selection, choose
    from moresjax.evaluation.steering.build import first_token_selections
    from moresjax.evaluation.steering.run import BASELINE, steer

    alpha = plan.trials[0].alpha
    if args.states:
        found = first_token_selections(
            model, States(args.states), plan, steering.normalize, alpha=alpha
        )
    else:
        trials = [trial for trial in plan.trials if trial.alpha == alpha]
        first = {trial.name: trial for trial in reversed(trials)}
        result = steer(model, tasks, [*first.values()], steering, batch_size=args.batch_size)
        found = {
            row["vector"]: Selection(**row["selection"])
            for row in result.overall
            if row["vector"] != BASELINE
        }
    options = {"targets": args.targets, "keep": args.keep, "unique": args.unique}
    kept = choose(found, **options)
    if not kept:
        raise UserError(
            f"none of the {len(found)} vectors leads to at most {args.targets} answers; try a "
            "larger --alpha or --targets"
        )
    return kept


def _check_gguf(plan: "Plan") -> None:
    """Refuses vectors that llama.cpp has no place for, before anything is asked."""
    for name, facts in plan.facts.items():
        if facts["site"] != "llm.block.out" or facts["layer"] < 1:
            raise UserError(
                f"llama.cpp steers the outputs of blocks from 1 on, and vector {name} is of "
                f"{facts['site']} {facts['layer']}"
            )


def _write_gguf(out: str, plan: "Plan") -> None:
    """Control vectors for llama.cpp beside `vectors.npz`; none of controls and draws."""
    from moresjax.weights.control_vector import save_control_vector

    for name, vector in plan.vectors.items():
        facts = plan.facts[name]
        if not facts.keys() & {"control", "draw"}:
            file = name.replace(">", "-to-").replace("/", "-").replace(":", "-")
            save_control_vector(Path(out) / f"{file}.gguf", {facts["layer"]: vector})


def _line(row: dict[str, Any]) -> str:
    """A trial in one line."""

    def share(name: str) -> str:
        return "none" if row[name] is None else f"{row[name]:.3f}"

    text = f"{row['task']} {row['vector']} layer {row['layer']} alpha {row['alpha']:g}"
    text += f" {row['positions']}: success {share('success')} of {row['source']}"
    text += f", others kept {share('kept')}, changed {row['changed']:.3f}"
    main = ", ".join(row["selection"]["targets"]) or "none"
    text += f", main answers {main} (score {row['selection']['score']:g})"
    return text if row["score"] is None else f"{text}, {row['metric']} {row['score']:.3f}"
