"""`moresjax data`: checks, shows, converts and builds data sets, trains tokenizers."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from moresjax.cli.options import Commands, add_command, add_config, add_planned_workdir, show

if TYPE_CHECKING:
    from moresjax.data.check import DataReport
    from moresjax.data.processor import Processor


RESHAPED = (
    "images are far from square: they are squeezed or cropped to one; image_aspect=pad keeps all "
    "of them"
)


def add_parser(commands: Commands) -> None:
    """Adds the subcommand with its jobs."""
    data = commands.add_parser(
        "data", help="check, show, convert and build data sets, train a tokenizer"
    )
    jobs = data.add_subparsers(dest="job", required=True, metavar="JOB")

    help = "read everything that a configuration would train on, or files of your own"
    check = add_command(jobs, "check", run_check, help)
    add_config(check, required=False)
    add_planned_workdir(check)
    check.add_argument(
        "--files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="check these instead: conversations, questions or labels in JSON",
    )
    check.add_argument(
        "--image-root", metavar="DIR", help="folder of the images of --files; default: their own"
    )
    check.add_argument(
        "--tokenizer", metavar="DIR", help="count the tokens of the texts of --files with it"
    )
    check.add_argument(
        "--template",
        default="vicuna_v1",
        metavar="NAME",
        help="conversation template of --tokenizer (default: %(default)s)",
    )
    check.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes; default: one per core at most",
    )

    help = "show samples as the model is given them: tokens, labels, edits, images"
    show_job = add_command(jobs, "show", run_show, help)
    add_config(show_job)
    add_planned_workdir(show_job)
    show_job.add_argument(
        "--samples", type=int, default=3, metavar="N", help="how many (default: %(default)s)"
    )
    show_job.add_argument(
        "--first", type=int, default=0, metavar="I", help="the first one's number (default: 0)"
    )
    show_job.add_argument("--out", metavar="FILE", help="write an HTML page, too")

    help = "write LLaVA JSON and its images as sharded ArrayRecord"
    convert = add_command(jobs, "convert", run_convert, help)
    convert.add_argument("--files", required=True, metavar="A;B", help="LLaVA's JSON files")
    convert.add_argument(
        "--image-root", default=".", metavar="DIR", help="folder of the images (default: here)"
    )
    convert.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    convert.add_argument(
        "--shards", type=int, default=16, metavar="N", help="files (default: %(default)s)"
    )
    convert.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open every image (default), which takes most of the time, or only copy it",
    )
    convert.add_argument(
        "--on-bad-sample",
        default="skip",
        metavar="KIND",
        help="skip: leave it out, count and list it (default); raise: end with its error",
    )
    convert.add_argument(
        "--workers", type=int, default=0, metavar="N", help="threads; default: one per core"
    )

    help = "write a task file from a benchmark's official download"
    build = add_command(jobs, "build", run_build, help)
    build.add_argument("--task", required=True, metavar="NAME", help="which task file")
    build.add_argument("--root", required=True, metavar="DIR", help="folder of the download")
    build.add_argument("--out", required=True, metavar="FILE", help="the new JSON file")
    build.add_argument(
        "--image-root",
        default="",
        metavar="DIR",
        help="folder that image paths start from, above --root (default: the folder of --out)",
    )
    build.add_argument("--split", default="train", help="default: %(default)s")
    build.add_argument(
        "--size", default="", metavar="N", help="samples to draw, such as 1K; default: all"
    )

    help = "train a tokenizer on texts of your own"
    tokenizer = add_command(jobs, "tokenizer", run_tokenizer, help)
    tokenizer.add_argument(
        "--files", required=True, metavar="A;B", help="LLaVA's JSON files, or .txt files"
    )
    tokenizer.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    tokenizer.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="tokens (default: %(default)s)"
    )
    tokenizer.add_argument(
        "--algorithm", default="bpe", metavar="NAME", help="bpe or unigram (default: %(default)s)"
    )
    tokenizer.add_argument(
        "--add-tokens", default="", metavar="A;B", help="control tokens of a chat template"
    )


def run_check(args: argparse.Namespace) -> None:
    """Reads training data, or files, and reports what would not train."""
    from moresjax.core.errors import UserError
    from moresjax.data.check import check_data
    from moresjax.data.sources import make_source
    from moresjax.runs.config import load_config
    from moresjax.runs.processor import build_processor
    from moresjax.runs.sources import with_sources

    if bool(args.files) == bool(args.config):
        raise UserError("data check needs either --config FILE or --files FILE ...")
    if args.files:
        _check_files(args)
        return
    if args.image_root or args.tokenizer:
        raise UserError("--image-root and --tokenizer go with --files; a --config has its own")
    config = with_sources(load_config(args.config, args.overrides), args.workdir)
    report = check_data(
        make_source(**config.data),
        functools.partial(build_processor, config, root=args.workdir),
        max_seq_len=config.max_seq_len,
        images_per_row=config.images_per_row,
        num_workers=args.workers,
    )
    show(args, dataclasses.asdict(report), "\n".join(_report_lines(report)))


def _check_files(args: argparse.Namespace) -> None:
    """Checks files one after the other; images have no tokens, since no model says how many."""
    from moresjax.data.check import check_data
    from moresjax.evaluation.data_files import open_file

    make = functools.partial(_text_processor, args.tokenizer, args.template)
    found, lines = {}, []
    for path in (part for given in args.files for part in given.split(";")):
        kind, source = open_file(path, args.image_root)
        report = check_data(source, make if args.tokenizer else None, num_workers=args.workers)
        found[path] = {"kind": kind} | dataclasses.asdict(report)
        lines += [f"{path}: {kind}", *_report_lines(report, tokens=bool(args.tokenizer))]
    show(args, {"files": found}, "\n".join(lines))


def _text_processor(tokenizer: str, template: str) -> "Processor":
    """What turns samples into tokens where no model says how many an image has."""
    from moresjax.data.images import ImageProcessor
    from moresjax.data.processor import Processor
    from moresjax.data.templates import get_template
    from moresjax.runs.processor import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return Processor(loaded, get_template(template, loaded), image=ImageProcessor(1, aspect="pad"))


def _report_lines(report: "DataReport", tokens: bool = True) -> list[str]:
    """A report in lines, with or without what tokens tell."""
    counts = f"{report.samples:,d} samples, {report.text_only:,d} of them text only; "
    counts += f"{report.images:,d} images"
    labels = ", ".join(f"{name} {count:,d}" for name, count in report.labels.items())
    tokens = tokens and not report.labels
    if tokens:
        counts += f"; {report.tokens:,d} tokens, {report.answer_tokens:,d} trained"
    bins, useful = (report.histogram, report.useful) if tokens else ((), {})
    return [
        counts,
        *([f"labels: {labels}"] if labels else []),
        *(f"  {first:6d}+ tokens  {count:10,d}" for first, count in bins if count),
        *(f"useful tokens with {name}: {share:.1%}" for name, share in useful.items()),
        f"too long: {len(report.too_long)}; bad: {len(report.bad)}; cut: {len(report.cut)}",
        *(f"  without {kind}: {count}" for kind, count in report.cut_kinds.items()),
        *([f"{report.reshaped:,d} {RESHAPED}"] if report.reshaped else []),
        *report.too_long.values(),
        *report.bad.values(),
        *report.cut.values(),
    ]


def run_show(args: argparse.Namespace) -> None:
    """Shows samples of a configuration's training data."""
    from moresjax.core.errors import UserError
    from moresjax.data.samples import Sample
    from moresjax.data.sources import make_source
    from moresjax.reports.samples import sample_text, show_sample, write_samples_page
    from moresjax.runs.architecture import model_config
    from moresjax.runs.config import load_config
    from moresjax.runs.processor import build_processor, name_words
    from moresjax.runs.sources import with_sources
    from moresjax.tuning.attach import Tuning

    config = with_sources(load_config(args.config, args.overrides), args.workdir)
    source, processor = make_source(**config.data), build_processor(config, root=args.workdir)
    if not 0 <= args.first < args.first + args.samples <= len(source):
        raise UserError(
            f"--first {args.first} and --samples {args.samples} do not name samples of a data set "
            f"of {len(source)}"
        )
    tuning = Tuning(config.tuning, model_config(config))
    name_words(tuning, processor.tokenizer)
    words = dict(tuning.words)
    shown = []
    for number in range(args.first, args.first + args.samples):
        sample = source[number]
        if not isinstance(sample, Sample):
            raise UserError(f"sample {number} of this source is no conversation")
        shown.append(show_sample(sample, processor, tuning.selectors, words))
    text = "\n\n".join(sample_text(sample, processor) for sample in shown)
    if args.out:
        text += f"\n\npage: {write_samples_page(shown, args.out)}"
    show(args, {"samples": [sample.to_dict() for sample in shown]}, text)


def run_convert(args: argparse.Namespace) -> None:
    """Converts LLaVA JSON to ArrayRecord."""
    from moresjax.core.folders import check_new
    from moresjax.data.arrayrecord import SKIPPED, convert_llava
    from moresjax.data.llava import LlavaSource

    check_new(Path(args.out), "conversion")  # before files are indexed, which takes a while
    index = convert_llava(
        LlavaSource(args.files, args.image_root),
        args.out,
        shards=args.shards,
        decode=args.decode,
        on_bad_sample=args.on_bad_sample,
        num_workers=args.workers,
    )
    text = f"{args.out}: {index['records']:,d} samples in {len(index['shards'])} files"
    if index["skipped"]:
        text += f"; {index['skipped']:,d} bad ones are left out, {SKIPPED} there lists them"
    show(args, index, text)


def run_build(args: argparse.Namespace) -> None:
    """Builds a task file."""
    from moresjax.evaluation.training_files import build_training_file

    options = {"split": args.split, "size": args.size, "image_root": args.image_root}
    counts = build_training_file(args.task, args.root, args.out, **options)
    text = f"{args.out}: {counts['written']:,d} of {counts['available']:,d} samples"
    show(args, counts, text)


def run_tokenizer(args: argparse.Namespace) -> None:
    """Trains a tokenizer."""
    from moresjax.data.tokenizer import read_texts, train_tokenizer

    tokenizer = train_tokenizer(
        read_texts(args.files),
        args.vocab_size,
        algorithm=args.algorithm,
        add_tokens=tuple(filter(None, args.add_tokens.split(";"))),
    )
    tokenizer.save_pretrained(args.out)
    counts = {"out": args.out, "tokens": len(tokenizer)}
    show(args, counts, f"{args.out}: a tokenizer of {len(tokenizer):,d} tokens")
