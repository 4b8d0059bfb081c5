"""`moresjax evaluate`: scores a model on benchmarks."""

import argparse
import json
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
    load_model,
    mesh_of,
    only_adapter,
    show,
)
from moresjax.core.errors import UserError

if TYPE_CHECKING:
    from moresjax.evaluation.judges import EndpointJudge, ModelJudge
    from moresjax.evaluation.results import EvaluationResult
    from moresjax.inference.model import Model


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    evaluate = add_command(commands, "evaluate", run, "score a model on benchmarks", compiles=True)
    evaluate.add_argument("--model", metavar="DIR", help="a workdir or a Hugging Face folder")
    evaluate.add_argument(
        "--predictions", metavar="FILE", help="score these saved answers again, without a model"
    )
    evaluate.add_argument("--tasks", required=True, metavar="A,B", help=TASKS_HELP)
    add_questions(evaluate)
    evaluate.add_argument("--limit", type=int, metavar="N", help="first N questions of a task")
    add_sample(evaluate, " and --temperature")
    add_length_limit(evaluate)
    evaluate.add_argument(
        "--temperature", type=float, default=0.0, help="0 chooses the likeliest token (default)"
    )
    evaluate.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the likeliest with this probability"
    )
    evaluate.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples before each lm_eval question"
    )
    evaluate.add_argument(
        "--include-path", metavar="DIR", help="folder with tasks of yours in lm_eval's format"
    )
    evaluate.add_argument(
        "--download",
        action="store_true",
        help="fetch data of lm_eval tasks that are not at hand; otherwise nothing is",
    )
    evaluate.add_argument(
        "--attention",
        action="store_true",
        help="read in the same pass how much attention answers pay to the image, and LMAR",
    )
    evaluate.add_argument(
        "--forgetting",
        metavar="BASE",
        help="folder of the model before tuning: asks it the same, and prints both side by side",
    )
    add_loading(evaluate)
    evaluate.add_argument(
        "--judge-url", metavar="URL", help="OpenAI-compatible endpoint for benchmarks with a judge"
    )
    evaluate.add_argument(
        "--judge-model",
        metavar="NAME",
        help="name of the judging model at --judge-url, or a local folder",
    )
    evaluate.add_argument("--out", required=True, metavar="DIR", help="directory for the results")


def run(args: argparse.Namespace) -> None:
    """Evaluates a model, or scores saved predictions again."""
    from moresjax.evaluation.attention_log import attention_line
    from moresjax.evaluation.presets import table
    from moresjax.evaluation.rescore import rescore
    from moresjax.evaluation.results import sample_facts, write_results
    from moresjax.evaluation.run import evaluate
    from moresjax.generation.sampling import Sampling

    tasks, adapter = args.tasks.split(","), only_adapter(args)
    model = base = None
    name = Path(adapter or args.model or "").resolve().name
    options = {
        "data_root": args.data_root,
        "limit": args.limit,
        "sample": args.sample,
        "seed": args.seed,
        "split": args.split,
        "image_root": args.image_root,
        "judge": _judge(args),
    }
    if args.predictions:
        asked = args.model or args.adapter or args.tuning or args.attention or args.forgetting
        if len(tasks) != 1 or asked:
            raise UserError(
                "--predictions scores one task of --tasks, without a model or its attention"
            )
        if args.temperature:
            raise UserError("--predictions scores answers that are there; it draws none")
        if args.max_new_tokens:
            raise UserError("--predictions scores answers that are there, however long they are")
        result = rescore(tasks[0], args.predictions, out=args.out, **options)
    elif not args.model:
        raise UserError("evaluate needs --model DIR, or --predictions FILE to score again")
    else:
        options |= {"batch_size": args.batch_size, "out": args.out, "num_fewshot": args.num_fewshot}
        options["sampling"] = Sampling(
            temperature=args.temperature, top_p=args.top_p, seed=args.seed
        )
        options |= {"download": args.download, "include_path": args.include_path}
        options |= {"attention": args.attention, "title": name}
        options["max_new_tokens"] = args.max_new_tokens
        model = load_model(args, adapter=adapter)
        base = _base(args, model)
        result = evaluate(model, tasks, **options)
    facts = {"model": args.model, "adapter": adapter, "tuning": args.tuning, "split": args.split}
    facts |= sample_facts(args.sample, args.seed)
    path = write_results(result, args.out, name=name, **facts)
    text = table(result.scores, tasks, result.not_run)
    if result.attention is not None:
        text += f"\n{attention_line(name, result.attention.to_dict())}"
    data = json.loads(path.read_text())
    if model is not None and base is not None:
        data["forgetting"], more = _forgetting(args, (model, base), tasks, options, result)
        text += f"\n\n{more}"
    show(args, data, f"{text}\nresults: {path}")
    if result.not_run:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in result.not_run.items())
        raise UserError(f"not run were {reasons}; the results of the others are in {path}")


def _base(args: argparse.Namespace, model: "Model") -> "Model | None":
    """The model of `--forgetting`, asked as the tuned one is."""
    from moresjax.data.templates import OWN, template_name
    from moresjax.inference.load import load

    if not args.forgetting:
        return None
    own = template_name(model.prompts.processor.template).split("/")[0]
    template = args.template or (None if own == OWN else own)
    return load(args.forgetting, template=template, mesh=mesh_of(args), dtype=args.dtype)


def _forgetting(
    args: argparse.Namespace,
    models: "tuple[Model, Model]",
    tasks: list[str],
    options: dict[str, Any],
    result: "EvaluationResult",
) -> tuple[dict[str, Any], str]:
    """Asks the model before tuning the same; what changed, and the same as text."""
    from moresjax.core.folders import replace_file
    from moresjax.evaluation import forgetting
    from moresjax.evaluation.results import write_results
    from moresjax.evaluation.run import evaluate

    folder = Path(args.out) / forgetting.BEFORE
    options |= {"out": folder, "attention": False, "title": Path(args.forgetting).resolve().name}
    before = evaluate(models[1], tasks, **options)
    write_results(before, folder, model=args.forgetting, split=args.split)
    prompts = [row["prompt"] for row in result.predictions if not row.get("images")]
    same = forgetting.same_logits(*models, prompts) if prompts else None
    rows = forgetting.forgetting(before, result, args.out)
    facts = forgetting.forgetting_facts(rows, same)
    replace_file(Path(args.out) / "forgetting.json", json.dumps(facts, indent=2) + "\n")
    return facts, forgetting.forgetting_table(facts)


def _judge(args: argparse.Namespace) -> "EndpointJudge | ModelJudge | None":
    """The judge behind an endpoint or in a folder, if one was asked for."""
    from moresjax.evaluation.judges import EndpointJudge, ModelJudge
    from moresjax.inference.load import load

    if args.judge_url and not args.judge_model:
        raise UserError("--judge-url needs --judge-model, the model's name there")
    if args.judge_url:
        return EndpointJudge(args.judge_url, args.judge_model)
    folder = args.judge_model
    if not folder:
        return None
    return ModelJudge(load(folder, mesh=mesh_of(args), dtype=args.dtype), Path(folder).name)
