"""Random models, adapters and prompts against `transformers` and `peft`: no silent difference.

    python benchmarks/same_as_references.py --cases 10000 --seed 0 --log cases.jsonl

Every case is a padded prompt for a tiny random model of a family that is read here (an LLM, or a
LLaVA), maybe with a random adapter of `peft`. Both sides read the same folders; their logits and
greedy tokens must be equal, or the folder must be refused in one sentence. `--model N` repeats one
model's cases. With `--log` a command that was stopped goes on where it was.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from moresjax.testing.references import Outcome, check_cases

BAD = ("DIFFERENT", "crash")


def reason(outcome: Outcome) -> str:
    """A refusal without what differs from case to case."""
    sentence = re.sub(r"(?:[\w-]+\.)+[\w-]+|\d+|adapter \d+", "..", outcome.detail)
    return sentence[:110]


def read_log(file: Path | None) -> list[Outcome]:
    """The outcomes of the models that an earlier command has finished."""
    if file is None or not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    done = [Outcome(**line) for line in lines]
    # The last model may be unfinished.
    return [outcome for outcome in done if outcome.number < done[-1].number]


def main() -> int:
    """Runs the cases and prints what became of them; 1 when a case differs or crashes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=int, metavar="N", help="the cases of this model only")
    parser.add_argument("--few-sizes", action="store_true", help="all models of the same sizes")
    parser.add_argument("--log", type=Path, metavar="FILE", help="outcomes, one on a line")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found = read_log(args.log) if args.model is None else []
    log = None
    if args.log is not None:
        log = args.log.open("w")
        log.writelines(json.dumps(dataclasses.asdict(outcome)) + "\n" for outcome in found)
    first, cases = found[-1].number + 1 if found else 0, args.cases - len(found)
    if args.model is not None:
        first, cases = args.model, 10**9
    checked = check_cases(cases, args.seed, first, few_sizes=args.few_sizes)
    if args.model is not None:
        checked = itertools.takewhile(lambda outcome: outcome.number == args.model, checked)
    start, before = time.time(), len(found)
    for outcome in checked:
        found.append(outcome)
        if log is not None:
            log.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            log.flush()
        if args.model is not None or outcome.kind in BAD:
            print(f"{outcome.kind} --model {outcome.number}: {outcome.what}: {outcome.detail}")
        if len(found) % 500 == 0:
            speed = (len(found) - before) / (time.time() - start)
            kinds = dict(Counter(outcome.kind for outcome in found))
            print(f"{len(found)} cases, {speed:.1f} a second: {kinds}")
        sys.stdout.flush()
    refused = Counter(reason(outcome) for outcome in found if outcome.kind == "refused")
    for sentence, count in refused.most_common():
        print(f"{count:6d} refused: {sentence}")
    kinds = Counter(outcome.kind for outcome in found)
    print(f"{len(found)} cases with seed {args.seed}: {dict(kinds)}")
    return int(any(kinds[kind] for kind in BAD))


if __name__ == "__main__":
    sys.exit(main())
