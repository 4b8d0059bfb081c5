"""What many steering vectors cost on many questions, beside asking them one vector after another.

    python benchmarks/steering.py [--rounds 5] [--questions 16] [--vectors 8] [--new-tokens 25]

A LLaVA with random weights answers questions, each about an image of its own, or about none. V
vectors act at the last layer on the last prompt token and on all new ones. The goal: V vectors on
Q questions cost at most the prefill of Q questions and 1.1 V times their decoding; decoding is what
Q answers by one vector take beyond answers of one token. Seconds are those that the process had of
all cores, which other processes hardly change.
"""

import argparse
import statistics
import time

import numpy as np
from rounds import Run, measure
from states import make_llava, our_llava

from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.hardware.host import use_huge_pages
from moresjax.inference.model import Model

SPEC = "steer:positions=last_prompt|generated"
GOAL = 1.1
WORDS = ("how many", "is there a two", "what is the largest", "what is at top-left")


def make_model(vectors: int) -> Model:
    """The LLaVA of `states.py` with its vectors."""
    mllm = our_llava(make_llava())
    visual = mllm.config.visual_tokens
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(96), visual)
    model = Model(mllm, processor)
    layers, size = mllm.config.llm.num_layers, mllm.config.llm.hidden_size
    rows = np.zeros((vectors, layers, size), np.float32)
    rows[:, -1] = np.random.default_rng(2).standard_normal((vectors, size))
    model.load_vectors({f"{n}": own for n, own in enumerate(rows)}, SPEC)
    return model


def asking(model: Model, rows: list, names: list, new: int, batch_size: int) -> Run:
    """Every question with every vector."""
    pairs = [(row, name) for row in rows for name in names]

    def run():
        adapters = [name for _, name in pairs]
        options = {"batch_size": batch_size, "adapters": adapters}
        model.service.generate_many([row for row, _ in pairs], new, **options)
        yield "answers"

    return run


def in_turn(model: Model, rows: list, names: list, new: int, batch_size: int) -> Run:
    """One vector after the other."""
    each = [asking(model, rows, [name], new, batch_size) for name in names]

    def run():
        for one in each:
            list(one())
        yield "answers"

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=25)
    args = parser.parse_args()
    use_huge_pages()
    model, rng = make_model(args.vectors), np.random.default_rng(1)
    names = [f"{n}" for n in range(args.vectors)]
    images = rng.integers(0, 255, (args.questions, 96, 96, 3)).astype(np.uint8)
    texts = [f"{WORDS[n % len(WORDS)]} ? " * 6 for n in range(args.questions)]
    print(
        "| questions | prefill, s | decode, s | V vectors, s | goal, s | of the goal | decodings |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    beside = []
    for kind, own in {
        "about images": [[image] for image in images],
        "text": [[]] * len(texts),
    }.items():
        rows = [model.prompts.row(*pair) for pair in zip(texts, own, strict=True)]
        [row.num_images and np.asarray(row.pixels) for row in rows]  # opened once
        size = args.questions
        runs = {
            "prefill": asking(model, rows, names[:1], 1, size),
            "one": asking(model, rows, names[:1], args.new_tokens, size),
            "all": asking(model, rows, names, args.new_tokens, size),
            "in turn": in_turn(model, rows, names, args.new_tokens, size),
        }
        measured = measure(runs, args.rounds, warm=1, clock=time.process_time)
        seconds = {n: x["answers"] for n, x in measured.items()}
        rounds = list(zip(*seconds.values(), strict=True))
        goals = [p + GOAL * args.vectors * (one - p) for p, one, _, _ in rounds]
        ratios = [x[2] / goal for x, goal in zip(rounds, goals, strict=True)]
        decodings = [(x - p) / (one - p) / args.vectors for p, one, x, _ in rounds]
        prefill, one, every, _ = (statistics.median(seconds[name]) for name in runs)
        cells = [prefill, one - prefill, every, *map(statistics.median, (goals, ratios, decodings))]
        print(f"| {kind} | {' | '.join(f'{x:.2f}' for x in cells)} |")
        beside.append((kind, statistics.median(turn / x for _, _, x, turn in rounds)))
    print()
    for kind, ratio in beside:
        print(f"Questions {kind}, vector after vector: {ratio:.2f} times as long.")


if __name__ == "__main__":
    main()
