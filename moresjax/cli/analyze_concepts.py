"""`moresjax analyze concepts`: a dictionary of the concepts in states, with words and samples."""

import argparse
from typing import TYPE_CHECKING

from moresjax.cli.options import (
    Commands,
    add_command,
    add_loading,
    load_tuned_model,
    show,
)

if TYPE_CHECKING:
    from moresjax.analysis.grounding import WordFilter
    from moresjax.inference.model import Model


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "learn concepts from states; name them by words and samples"
    concepts = add_command(kinds, "concepts", run, help, compiles=True)
    concepts.add_argument(
        "--states", required=True, metavar="DIR", help="folder of `analyze states`"
    )
    add_dictionary(concepts)
    concepts.add_argument("--concepts", type=int, default=20, metavar="K", help="default: 20")
    concepts.add_argument(
        "--layer", type=int, metavar="L", help="the layer, where there are several"
    )
    concepts.add_argument(
        "--active", type=int, default=4, metavar="N", help="concepts per state of sae (default: 4)"
    )
    concepts.add_argument(
        "--epochs", type=int, default=50, metavar="N", help="reads of a state of sae (default: 50)"
    )
    concepts.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="compare dictionaries of N seeds"
    )
    concepts.add_argument(
        "--samples", type=int, default=5, metavar="N", help="most activating samples (default: 5)"
    )
    add_words(concepts, words=10, candidates=50)
    concepts.add_argument("--out", required=True, metavar="DIR", help="a new folder")


def add_dictionary(command: argparse.ArgumentParser) -> None:
    """Adds which method learns concepts, and from which states."""
    command.add_argument(
        "--method",
        default="kmeans",
        metavar="NAME",
        help="kmeans, pca, snmf, simple or sae (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    command.add_argument("--site", metavar="SITE", help="the site, where there are several")


def add_words(command: argparse.ArgumentParser, words: int, candidates: int) -> None:
    """Adds which words name concepts, and the model whose head reads them."""
    command.add_argument(
        "--model", metavar="DIR", help="the model whose head reads words; default: no words"
    )
    add_loading(command)
    command.add_argument(
        "--words",
        type=int,
        default=words,
        metavar="N",
        help="words per concept (default: %(default)s)",
    )
    command.add_argument(
        "--candidates",
        type=int,
        default=candidates,
        metavar="N",
        help="tokens that they are sought among (default: %(default)s)",
    )
    command.add_argument(
        "--norm",
        default="auto",
        metavar="HOW",
        help="final norm before the head: auto (not for llm.norm.out), raw or final "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--dictionary", metavar="FILE", help="words that count; default: whole alphabetic tokens"
    )
    command.add_argument(
        "--stop-words", metavar="FILE", help="words that do not; default: scikit-learn's"
    )
    command.add_argument(
        "--image-root", default="", metavar="DIR", help="folder that image paths start from"
    )


def reading_model(args: argparse.Namespace) -> "Model | None":
    """The model of `--model`; None without the option."""
    return load_tuned_model(args) if args.model else None


def word_filter(args: argparse.Namespace) -> "WordFilter":
    """Which tokens are words."""
    from moresjax.analysis.grounding import WordFilter

    return WordFilter(args.dictionary, args.stop_words)


def run(args: argparse.Namespace) -> None:
    """Learns the concepts and prints their words."""
    from moresjax.analysis.sparse_autoencoder import SAEOptions
    from moresjax.analysis.states import States
    from moresjax.reports.concept_figures import file_pictures
    from moresjax.reports.concepts import concept_lines, concepts_report

    facts = concepts_report(
        States(args.states),
        args.out,
        method=args.method,
        concepts=args.concepts,
        seed=args.seed,
        site=args.site,
        layer=args.layer,
        sae=SAEOptions(active=args.active, epochs=args.epochs),
        model=reading_model(args),
        words=args.words,
        candidates=args.candidates,
        norm=args.norm,
        word_filter=word_filter(args),
        samples=args.samples,
        seeds=range(args.seed, args.seed + args.seeds),
        pictures=file_pictures(args.image_root),
    )
    show(args, facts, "\n".join([*concept_lines(facts), f"concepts: {args.out}"]))
