"""The `moresjax` command. Subcommands are thin: they parse, call, and print."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moresjax._version import __version__
from moresjax.core.errors import UserError
from moresjax.hardware.host import use_huge_pages

# Commands whose programs are kept for the next process.
COMPILING = ("demo", "train", "evaluate", "generate", "analyze")
EARLY = {"false": False, "true": True, "never": "never"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moresjax",
        description="Train, evaluate and explain multimodal LLMs by editing representations.",
    )
    parser.add_argument("--version", action="version", version=f"moresjax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        return command

    def over_devices(command: argparse.ArgumentParser) -> None:
        names = "replicated, fsdp or fsdp+tensor"
        command.add_argument("--mesh", metavar="PRESET", help=f"use all devices: {names}")

    def as_asked(command: argparse.ArgumentParser) -> None:
        command.add_argument("--template", metavar="NAME", help="how conversations are written")
        kinds = "square or pad (LLaVA-1.5); default: as the folder says"
        command.add_argument("--image-aspect", metavar="KIND", help=kinds)

    demo = add("demo", _demo, "the paper's three stages on built-in real data, with a report")
    demo.add_argument("--out", default="runs/demo", help="directory of the report (%(default)s)")
    demo.add_argument("--seeds", type=int, default=1, help="repetitions of stage 2")
    demo.add_argument("--fast", action="store_true", help="a few steps of everything, for tests")

    train = add("train", _train, "train what a config file describes")
    train.add_argument("--config", required=True, metavar="FILE[:args]")
    train.add_argument("--workdir", required=True)
    train.add_argument("--resume", choices=("auto", "never"), default="auto")
    train.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="HOST:PORT,PROCESSES,NUMBER",
        help="this is one of several processes; on TPU pods and Slurm nothing more is needed",
    )

    evaluate = add("evaluate", _evaluate, "score a model on benchmarks")
    evaluate.add_argument("--model", metavar="DIR")
    evaluate.add_argument("--predictions", metavar="FILE", help="score these again; no model")
    evaluate.add_argument(
        "--tasks", required=True, metavar="A,B", help="benchmarks, presets, tasks of lm_eval"
    )
    evaluate.add_argument("--data-root", metavar="DIR")
    evaluate.add_argument("--limit", type=int, help="items per task")
    evaluate.add_argument(
        "--split", metavar="SPLIT | TASK=SPLIT,..", help="default: each benchmark's own"
    )
    evaluate.add_argument("--num-fewshot", type=int, metavar="N", help="of lm_eval's tasks")
    evaluate.add_argument("--batch-size", type=int, default=64)
    over_devices(evaluate)
    as_asked(evaluate)
    evaluate.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint ..")
    evaluate.add_argument(
        "--judge-model",
        metavar="NAME",
        help=".. and the model there that judges; without a URL, the folder of one",
    )
    evaluate.add_argument("--out", required=True, metavar="DIR")

    generate = add("generate", _generate, "answer a prompt about images")
    generate.add_argument("--model", required=True, metavar="DIR")
    generate.add_argument("--image", action="append", default=[], metavar="PATH")
    generate.add_argument("--prompt", help="without it: a chat, or the prompts of --prompts")
    generate.add_argument("--prompts", metavar="JSONL", help="id, prompt and images per line")
    generate.add_argument("--out", metavar="JSONL", help="where the answers to --prompts go")
    generate.add_argument("--image-root", metavar="DIR", help="of --prompts; default: its folder")
    generate.add_argument("--batch-size", type=int, default=16)
    over_devices(generate)
    as_asked(generate)
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--repetition-penalty", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--num-beams", type=int, default=1, help="beam search for one --prompt")
    generate.add_argument("--length-penalty", type=float, default=1.0, help="of the beam search")
    generate.add_argument("--early-stopping", choices=EARLY, default="false")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT")
    generate.add_argument("--adapter", metavar="DIR", help="an adapter folder, ours or peft's")

    analyze = commands.add_parser("analyze", help="look inside a model")
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND")
    attention = kinds.add_parser("attention", help="share of attention on the image, and LMAR")
    attention.set_defaults(run=_analyze_attention)
    attention.add_argument("--json", action="store_true", help="print one JSON object")
    attention.add_argument("--model", action="append", required=True, metavar="[NAME=]DIR")
    attention.add_argument("--tasks", default="digits", metavar="A,B")
    attention.add_argument("--data-root", metavar="DIR")
    attention.add_argument("--limit", type=int, default=100, help="items per task (%(default)s)")
    attention.add_argument("--split", help="default: each benchmark's own")
    attention.add_argument("--batch-size", type=int, default=64)
    over_devices(attention)
    attention.add_argument("--out", required=True, metavar="DIR")

    imports = add("import", _import, "turn a Hugging Face folder into a run's directory")
    imports.add_argument("source", metavar="SRC", help="a LLaVA, or an LLM")
    imports.add_argument("out", metavar="OUT")
    imports.add_argument("--vision", default="", metavar="DIR[;DIR]", help="encoder for an LLM")
    imports.add_argument("--fusion", default="interleave", help="of two encoders")
    imports.add_argument("--connector", default="mlp2x_gelu", metavar="NAME")
    imports.add_argument("--image-processor", metavar="DIR")
    imports.add_argument("--template", default="vicuna_v1", metavar="NAME")
    imports.add_argument("--quantize", default="", metavar="int8")
    imports.add_argument("--allow-pickle", action="store_true", help="read *.bin files too")

    export = add("export", _export, "write a model in another tool's format")
    export.add_argument("model", metavar="MODEL")
    export.add_argument("out", metavar="OUT")
    export.add_argument("--format", required=True, metavar="hf|merged|adapter|peft|pyreft")
    export.add_argument("--adapter", metavar="DIR", help="attach this adapter folder first")

    plan = add("plan", _plan, "compile a run for a TPU slice, without one: does it fit, how fast")
    plan.add_argument("--config", required=True, metavar="FILE[:args]")
    plan.add_argument("--topology", required=True, metavar="v5e:4x4", help="or v5e-16")
    plan.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="rows per step, several with --search; default: the configuration's",
    )
    plan.add_argument("--search", action="store_true", help="try batches, meshes and remat")
    plan.add_argument(
        "--generate",
        type=int,
        metavar="NEW",
        help="not a train step: prefill and decode of NEW tokens for each of --batch prompts",
    )
    plan.add_argument(
        "--prompt", type=int, metavar="TOKENS", help="of --generate; default: length - NEW"
    )
    plan.add_argument(
        "--quick",
        action="store_true",
        help="compile with the least effort: several times as fast, memory a little off",
    )

    data = commands.add_parser("data", help="check, convert and build datasets")
    jobs = data.add_subparsers(dest="job", required=True, metavar="JOB")
    check = jobs.add_parser("check", help="tokenise everything that a config would train on")
    check.set_defaults(run=_data_check)
    check.add_argument("--config", required=True, metavar="FILE[:args]")
    check.add_argument("--workers", type=int, default=0, help="processes; default: one per core")
    convert = jobs.add_parser("convert", help="LLaVA JSON and images to sharded ArrayRecord")
    convert.set_defaults(run=_data_convert)
    convert.add_argument("--files", required=True, metavar="A;B")
    convert.add_argument("--image-root", default=".", metavar="DIR")
    convert.add_argument("--out", required=True, metavar="DIR")
    convert.add_argument("--shards", type=int, default=16)
    build = jobs.add_parser("build", help="a task file from a benchmark's official download")
    build.set_defaults(run=_data_build)
    build.add_argument("--task", required=True, metavar="NAME")
    build.add_argument("--root", required=True, metavar="DIR", help="the download")
    build.add_argument("--out", required=True, metavar="FILE")
    build.add_argument("--split", default="train")
    build.add_argument("--size", default="", help="samples to draw, such as 1K; default: all")
    for job in (check, convert, build):
        job.add_argument("--json", action="store_true", help="print one JSON object")

    add("zoo", _zoo, "named sizes of LLMs, vision encoders and whole models")

    params = add("params", _params, "exact parameter counts of a model with a tuning method")
    params.add_argument("--model", metavar="DIR", help="a workdir or a Hugging Face folder")
    params.add_argument("--llm", metavar="NAME")
    params.add_argument("--vision", metavar="NAME")
    params.add_argument("--connector", default="mlp2x_gelu", metavar="NAME")
    params.add_argument("--tuning", default=None, metavar="SPEC")
    params.add_argument("--also-train", default="connector", metavar="PATH,...")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 2 for a user's mistake."""
    if arguments is None:
        use_huge_pages()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        args = _parse(arguments)
        if args.command in COMPILING:
            from moresjax.sharding.processes import use_compile_cache

            use_compile_cache()
        args.run(args)
    except UserError as error:
        print(f"moresjax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moresjax: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    args, rest = _parser().parse_known_args(arguments)
    prefix = "--config."
    args.overrides = [item.removeprefix(prefix) for item in rest if item.startswith(prefix)]
    unknown = [item for item in rest if not item.startswith(prefix)]
    takes_overrides = args.command in ("train", "plan") or getattr(args, "job", "") == "check"
    if unknown or (args.overrides and not takes_overrides):
        raise UserError(f"unknown argument {(unknown or rest)[0]!r}")
    return args


def _print(args, data: dict, text: str) -> None:
    print(json.dumps(data) if args.json else text)


def _demo(args) -> None:
    from moresjax.studies.demo import run_demo

    results = run_demo(args.out, seeds=args.seeds, fast=args.fast)
    _print(args, results, f"report: {Path(args.out) / 'report.html'}")


def _train(args) -> None:
    from moresjax.runs.config import load_config
    from moresjax.sharding.processes import join_processes
    from moresjax.training.loop import train

    config = load_config(args.config, args.overrides)
    if args.distributed:
        join_processes(args.distributed)
    result = train(config, args.workdir, resume=args.resume)
    numbers = " ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    data = {"workdir": args.workdir, "step": result.step, **result.metrics}
    _print(args, data, f"{args.workdir}: step {result.step} {numbers}")


def _evaluate(args) -> None:
    from moresjax.evaluation.presets import table
    from moresjax.evaluation.run import evaluate, rescore, write_results

    tasks = args.tasks.split(",")
    options = {
        "data_root": args.data_root,
        "limit": args.limit,
        "split": args.split,
        "judge": _judge(args),
    }
    if args.predictions:
        if len(tasks) != 1 or args.model:
            raise UserError("--predictions scores one task of --tasks, without --model")
        result = rescore(tasks[0], args.predictions, out=args.out, **options)
    elif not args.model:
        raise UserError("evaluate needs --model DIR, or --predictions FILE to score again")
    else:
        options |= {"batch_size": args.batch_size, "out": args.out, "shots": args.num_fewshot}
        result = evaluate(_load(args), tasks, **options)
    path = write_results(result, args.out, model=args.model, split=args.split)
    _print(args, json.loads(path.read_text()), f"{table(result.scores, tasks)}\nresults: {path}")


def _judge(args):
    """The judge behind an endpoint or in a folder, if one was asked for."""
    from moresjax.evaluation.judges import EndpointJudge, ModelJudge
    from moresjax.inference.load import load

    if args.judge_url and not args.judge_model:
        raise UserError("--judge-url needs --judge-model, the model's name there")
    if args.judge_url:
        return EndpointJudge(args.judge_url, args.judge_model)
    folder = args.judge_model
    return ModelJudge(load(folder, mesh=_mesh(args)), Path(folder).name) if folder else None


def _generate(args) -> None:
    from moresjax.generation.sampling import Sampling
    from moresjax.inference.files import generate_file

    names = "temperature", "top_k", "top_p", "repetition_penalty", "seed"
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling, "stop": args.stop}
    if bool(args.prompts) != bool(args.out) or (args.prompts and args.prompt):
        raise UserError("a file of prompts needs --prompts and --out, and no --prompt")
    if args.num_beams != 1 and args.prompt is None:
        raise UserError("--num-beams goes with a single --prompt")
    model = _load(args)
    if args.adapter:
        model.load_adapter(args.adapter)
    if args.prompts:
        options |= {"image_root": args.image_root, "batch_size": args.batch_size}
        counts = generate_file(model, args.prompts, args.out, **options)
        text = f"{args.out}: {counts['records']} prompts, {counts['errors']} errors"
        _print(args, counts, text)
        return
    if args.prompt is None:
        _chat(model, args.image, options)
        return
    options |= {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
    options["early_stopping"] = EARLY[args.early_stopping]
    text = model.generate(args.prompt, args.image, **options)
    _print(args, {"prompt": args.prompt, "images": args.image, "text": text}, text)


def _load(args):
    """The model of `--model`, asked as the options say."""
    from moresjax.inference.load import load

    options = {"template": args.template, "image_aspect": args.image_aspect}
    return load(args.model, mesh=_mesh(args), **options)


def _mesh(args):
    """The mesh of `--mesh` over all devices, if it was asked for."""
    if args.mesh is None:
        return None
    import jax

    from moresjax.sharding.mesh import make_mesh, mesh_preset

    return make_mesh(**mesh_preset(args.mesh, jax.device_count()))


def _chat(model, images: Sequence[str], options: dict) -> None:
    """Questions from the terminal until an empty one; the first is about the images."""
    from moresjax.inference.chat import Chat

    chat = Chat(model, **options)
    while question := _ask():
        try:
            for piece in chat.ask(question, images):
                print(piece, end="", flush=True)
            images = ()
        except UserError as error:  # the conversation stays as it was
            print(error, end="")
        print()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _analyze_attention(args) -> None:
    from moresjax.reports.attention import attention_report

    summaries = attention_report(
        [tuple(m.split("=", 1)) if "=" in m else (Path(m).name, m) for m in args.model],
        args.tasks.split(","),
        args.out,
        data_root=args.data_root,
        limit=args.limit,
        split=args.split,
        batch_size=args.batch_size,
        mesh=_mesh(args),
    )
    lines = [
        f"{name:20s} average visual attention {s['average_visual_share']:.3f}  LMAR "
        + " ".join(f"{x:.2f}" for x in s["lmar_of_means"]["text"])
        for name, s in summaries.items()
    ]
    _print(args, summaries, "\n".join([*lines, f"plots: {args.out}"]))


def _import(args) -> None:
    from moresjax.inference.convert import import_model
    from moresjax.models.count import count_parameters

    options = {
        key: getattr(args, key)
        for key in ("vision", "fusion", "connector", "template", "quantize", "allow_pickle")
    }
    model = import_model(args.source, args.out, image_processor=args.image_processor, **options)
    total = count_parameters(model.config, also_train=()).total
    data = {"out": args.out, "parameters": total, "model": model.config.to_dict()}
    _print(args, data, f"{args.out}: {total:,d} parameters")


def _export(args) -> None:
    from moresjax.inference.convert import export_model

    out = export_model(args.model, args.out, args.format, adapter=args.adapter)
    files = sorted(path.name for path in out.iterdir())
    _print(args, {"out": args.out, "files": files}, f"{args.out}: {', '.join(files)}")


def _plan(args) -> None:
    from moresjax.plans.generation_plan import plan_generation
    from moresjax.plans.program import describe
    from moresjax.plans.train_plan import plan, search
    from moresjax.runs.config import load_config

    config = load_config(args.config, args.overrides)
    batches = args.batch or [config.batch_size]
    if args.search and args.generate is not None:
        raise UserError("--search is for train steps, not for --generate")
    if args.prompt is not None and args.generate is None:
        raise UserError("--prompt goes with --generate")
    if args.search:
        plans = search(config, args.topology, batches=batches, quick=args.quick)
    elif len(batches) == 1:
        config.batch_size = batches[0]
        if args.generate is None:
            plans = [plan(config, args.topology, args.quick)]
        else:
            sizes = args.generate, args.prompt
            plans = plan_generation(config, args.topology, *sizes, args.quick)
    else:
        raise UserError("several --batch go with --search")
    data = {"plans": [each.to_dict() for each in plans]}
    _print(args, data, "\n\n".join(map(describe, plans)))


def _data_check(args) -> None:
    import functools

    from moresjax.data.check import check_data
    from moresjax.data.sources import make_source
    from moresjax.runs.build import build_processor
    from moresjax.runs.config import load_config

    config = load_config(args.config, args.overrides)
    report = check_data(
        make_source(**config.data),
        functools.partial(build_processor, config),
        length=config.length,
        images=config.images,
        workers=args.workers,
    )
    lines = [
        f"{report.samples:,d} samples, {report.text_only:,d} of them text only; "
        f"{report.images:,d} images; {report.tokens:,d} tokens, {report.answer_tokens:,d} trained",
        *(f"  {first:6d}+ tokens  {count:10,d}" for first, count in report.histogram),
        *(f"useful tokens with {name}: {share:.1%}" for name, share in report.useful.items()),
        f"too long: {len(report.too_long)}; bad: {len(report.bad)}",
        *report.too_long.values(),
        *report.bad.values(),
    ]
    _print(args, dataclasses.asdict(report), "\n".join(lines))


def _data_convert(args) -> None:
    from moresjax.data.arrayrecord import convert_llava
    from moresjax.data.llava import LlavaSource

    source = LlavaSource(args.files, args.image_root)
    index = convert_llava(source, args.out, shards=args.shards)
    _print(args, index, f"{args.out}: {len(source):,d} samples in {args.shards} files")


def _data_build(args) -> None:
    from moresjax.data.generators import build_task

    counts = build_task(args.task, args.root, args.out, split=args.split, size=args.size)
    text = f"{args.out}: {counts['written']:,d} of {counts['available']:,d} samples"
    _print(args, counts, text)


def _zoo(args) -> None:
    from moresjax.models.cards import zoo_cards

    cards = zoo_cards()
    lines = [f"{c.kind:7s} {c.name:28s} {c.parameters:>16,d}  {c.text}" for c in cards]
    _print(args, {card.name: dataclasses.asdict(card) for card in cards}, "\n".join(lines))


def _params(args) -> None:
    from moresjax.models.count import count_parameters

    tuning, also = args.tuning, tuple(filter(None, args.also_train.split(",")))
    if bool(args.model) == bool(args.llm):
        raise UserError("params needs either --model DIR or --llm NAME")
    if args.model:
        from moresjax.runs.build import saved_config

        config, saved_tuning = saved_config(args.model)
        tuning = tuning or saved_tuning
    else:
        from moresjax.models.zoo import mllm_config

        config = mllm_config(args.llm, args.vision, args.connector)
    tuning = tuning or "none"
    also = also if config.vision else tuple(p for p in also if p != "connector")
    report = count_parameters(config, tuning, also)
    rows = [(part, count.total, count.trainable) for part, count in report.components.items()]
    rows.append(("all", report.total, report.trainable))
    lines = [f"{'component':10s} {'parameters':>16s} {'trainable':>14s}"]
    lines += [f"{part:10s} {total:16,d} {trainable:14,d}" for part, total, trainable in rows]
    lines.append(f"trainable in the LLM (TP): {report.trainable_in_llm:,d}")
    lines.append(f"trainable share: {report.trainable / report.total:.4%}")
    lines.append(f"checkpoint of what trains: {report.checkpoint_bytes / 2**20:.1f} MiB")
    _print(args, {"tuning": tuning, **report.to_dict()}, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
