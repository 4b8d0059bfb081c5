"""`moresjax evaluate`: scores a model on benchmarks."""

import argparse
import dataclasses
import json
import os
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
from moresjax.core.folders import named_folder

if TYPE_CHECKING:
    from moresjax.evaluation.judges import EndpointJudge, ModelJudge
    from moresjax.evaluation.results import EvaluationResult
    from moresjax.inference.model import Model


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    evaluate = add_command(commands, "evaluate", run, "score a model on benchmarks", compiles=True)
    evaluate.add_argument(
        "--model",
        action="extend",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="a workdir or a Hugging Face folder; several, such as runs/lr/*, are asked in turn, "
        "each into a folder below --out; those of one shape share compiled programs",
    )
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


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A model that is asked, and where what it says goes.

    Attributes:
      name: What it is called in output.
      folder: Its folder.
      out: The directory of its results.
    """

    name: str
    folder: str
    out: str


@dataclasses.dataclass(frozen=True)
class _Found:
    """What an evaluation found.

    Attributes:
      data: What `results.json` says.
      text: The same for people.
      not_run: Why tasks were not run, and where the others are.
    """

    data: dict[str, Any]
    text: str
    not_run: str = ""


def run(args: argparse.Namespace) -> None:
    """Evaluates models, or scores saved predictions again."""
    from moresjax.core.locks import locked

    found: dict[str, _Found] = {}
    if args.predictions:
        found[""] = _rescored(args)
    else:
        models, questions = _models(args), _questions(args)
        for asked in models:
            with locked(asked.out):  # before a model is loaded, which takes long
                found[asked.name] = _evaluated(args, asked, questions)
    if len(found) == 1:
        (one,) = found.values()
        show(args, one.data, one.text)
    else:
        data = {"models": {name: one.data for name, one in found.items()}}
        show(args, data, "\n\n".join(f"{name}\n{one.text}" for name, one in found.items()))
    for one in found.values():
        if one.not_run:
            raise UserError(one.not_run)


def _models(args: argparse.Namespace) -> list[_Asked]:
    """The models of `--model`, of which several have folders of their own below `--out`.

    A model is called by its folder, from where the folders of all part.

    Raises:
      UserError: There is none, one of several does not exist or is named twice, or an option takes
        one model alone.
    """
    adapter, pairs = only_adapter(args), [named_folder(value) for value in args.model]
    if not pairs:
        raise UserError("evaluate needs --model DIR, or --predictions FILE to score again")
    if len(pairs) == 1:
        ((name, folder),) = pairs
        return [_Asked(name or Path(adapter or folder).resolve().name, folder, args.out)]
    if args.forgetting:
        raise UserError("--forgetting compares one --model with the model before its tuning")
    places = [Path(folder).resolve() for _, folder in pairs]
    for place, (_, folder) in zip(places, pairs, strict=True):
        if not place.is_dir():
            raise UserError(f"{folder} does not exist")
    root = os.path.commonpath([place.parent for place in places])
    names = [
        name or place.relative_to(root).as_posix()
        for place, (name, _) in zip(places, pairs, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--model {name} is given twice; NAME=DIR gives it a name of its own")
    named = zip(names, (folder for _, folder in pairs), strict=True)
    return [_Asked(name, folder, str(Path(args.out) / name)) for name, folder in named]


def _questions(args: argparse.Namespace) -> dict[str, Any]:
    """What evaluations and scores of saved answers are told."""
    names = ("data_root", "limit", "sample", "seed", "split", "image_root")
    return {name: getattr(args, name) for name in names} | {"judge": _judge(args)}


def _rescored(args: argparse.Namespace) -> _Found:
    """Scores saved predictions again."""
    from moresjax.evaluation.rescore import rescore

    asked = args.model or args.adapter or args.tuning or args.attention or args.forgetting
    if len(args.tasks.split(",")) != 1 or asked:
        raise UserError(
            "--predictions scores one task of --tasks, without a model or its attention"
        )
    if args.temperature:
        raise UserError("--predictions scores answers that are there; it draws none")
    if args.max_new_tokens:
        raise UserError("--predictions scores answers that are there, however long they are")
    result = rescore(args.tasks, args.predictions, out=args.out, **_questions(args))
    return _written(args, _Asked("", "", args.out), result)


def _evaluated(args: argparse.Namespace, asked: _Asked, questions: dict[str, Any]) -> _Found:
    """Asks a model."""
    from moresjax.evaluation.run import evaluate
    from moresjax.generation.sampling import Sampling

    tasks = args.tasks.split(",")
    names = ("batch_size", "num_fewshot", "download", "include_path", "attention", "max_new_tokens")
    options = questions | {name: getattr(args, name) for name in names}
    options |= {"out": asked.out, "title": asked.name}
    options["sampling"] = Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    model = load_model(args, asked.folder, adapter=only_adapter(args))
    base = _base(args, model)
    result = evaluate(model, tasks, **options)
    found = _written(args, asked, result)
    if base is None:
        return found
    more, text = _forgetting(args, (model, base), tasks, options, result)
    data = found.data | {"forgetting": more}
    scores, line, path = found.text.rpartition("\nresults: ")
    return dataclasses.replace(found, data=data, text=f"{scores}\n\n{text}{line}{path}")


def _written(args: argparse.Namespace, asked: _Asked, result: "EvaluationResult") -> _Found:
    """Writes the results of a model and says them."""
    from moresjax.evaluation.attention_log import attention_line
    from moresjax.evaluation.presets import table
    from moresjax.evaluation.results import sample_facts, write_results

    facts = {"model": asked.folder or None, "adapter": only_adapter(args), "tuning": args.tuning}
    facts |= {"split": args.split, **sample_facts(args.sample, args.seed)}
    path = write_results(result, asked.out, name=asked.name, **facts)
    text = table(result.scores, args.tasks.split(","), result.not_run)
    if result.attention is not None:
        text += f"\n{attention_line(asked.name, result.attention.to_dict())}"
    not_run = ""
    if result.not_run:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in result.not_run.items())
        not_run = f"not run were {reasons}; the results of the others are in {path}"
    return _Found(json.loads(path.read_text()), f"{text}\nresults: {path}", not_run)


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
    from moresjax.core.json_files import write_json
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
    write_json(Path(args.out) / "forgetting.json", facts)
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
