"""`moresjax analyze states`: hidden states of a model's answers, in a folder."""

import argparse

from moresjax.cli.options import (
    Commands,
    add_command,
    add_loading,
    add_questions,
    add_sample,
    add_select,
    load_tuned_model,
    show,
)


def register(kinds: Commands) -> None:
    """Adds the command to the kinds of analysis."""
    help = "keep hidden states of a model's answers, for concepts, shifts and steering"
    states = add_command(kinds, "states", run, help, compiles=True)
    states.add_argument("--model", required=True, metavar="DIR", help="the model")
    states.add_argument(
        "--tasks",
        required=True,
        metavar="A,B",
        help="benchmarks, presets, questions of yours (FILE.jsonl or FILE.json), or code that "
        "makes them (FILE.py:NAME)",
    )
    add_questions(states)
    states.add_argument("--limit", type=int, metavar="N", help="the first N questions of a task")
    add_sample(states)
    add_select(states)
    states.add_argument(
        "--class",
        dest="words",
        metavar="LIST",
        help="a list of words (colors, places, sentiments, positive, negative, or a file): ask "
        "only questions whose answer holds one; --take token takes these words",
    )
    states.add_argument(
        "--site",
        default="llm.block.out",
        metavar="A,B",
        help="where states are read (default: %(default)s)",
    )
    states.add_argument(
        "--layers", metavar="CHOICE", help="such as 31, 0-3, 4;5 or deep (default: all)"
    )
    states.add_argument(
        "--take",
        default="prompt",
        metavar="WHAT",
        help="the state of the first new token (prompt), the mean over the answer (answer), that "
        'of a word ("token(yes;no)", token with --class) or of each token (default: %(default)s)',
    )
    states.add_argument(
        "--match",
        default="word",
        metavar="HOW",
        help="a word is there as a whole word, or as a token that it may begin with: word or "
        "first-token (default: %(default)s)",
    )
    states.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the most tokens of an answer (default: 16; 1 for --take prompt)",
    )
    states.add_argument(
        "--store-dtype",
        default="float32",
        metavar="TYPE",
        help="number format of the states in the folder: float16, bfloat16 or float32 (default: "
        "%(default)s)",
    )
    add_loading(states)
    states.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the states; a killed run goes on"
    )


def run(args: argparse.Namespace) -> None:
    """Reads the states and says how many there are."""
    from moresjax.evaluation.states import task_states

    states = task_states(
        load_tuned_model(args),
        args.tasks.split(","),
        data_root=args.data_root,
        image_root=args.image_root,
        limit=args.limit,
        sample=args.sample,
        seed=args.seed,
        split=args.split,
        select=args.select,
        words=args.words,
        site=args.site.split(","),
        layers=args.layers,
        take=args.take,
        match=args.match,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        dtype=args.store_dtype,
        out=args.out,
    )
    found = int(states.found.sum())
    facts = {"states": len(states), "found": found, "sites": states.sites, "layers": states.layers}
    where = ", ".join(f"{site} {states.meta['layers'][site]}" for site in states.sites)
    show(args, facts, f"{len(states)} states, {found} found, of {where}\nstates: {args.out}")
