"""Random models, adapters and prompts against `transformers` and `peft`: no silent difference.

    python benchmarks/same_as_references.py --cases 10000 --seed 0

Every case is a tiny random model of a family that is read here (an LLM, or a LLaVA), maybe with a
random adapter of `peft`, and a padded prompt. Both sides read the same folders; their logits must
be equal, or the folder must be refused in one sentence. `--model N` repeats one model's cases.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter, defaultdict

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


def main() -> int:
    """Runs the cases and prints what became of them; 1 when a case differs or crashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first model")
    parser.add_argument("--model", type=int, metavar="N", help="the cases of this model only")
    parser.add_argument("--few-sizes", action="store_true", help="all models of the same sizes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    first, cases = (args.first, args.cases) if args.model is None else (args.model, 10**9)
    checked = check_cases(cases, args.seed, first, few_sizes=args.few_sizes)
    start, counts, refused, bad = time.time(), Counter(), Counter(), defaultdict(list)
    for done, outcome in enumerate(checked, start=1):
        if args.model is not None and outcome.number != args.model:
            break
        counts[outcome.kind] += 1
        if args.model is not None:
            print(outcome)
        elif outcome.kind in BAD:
            bad[outcome.kind].append(outcome)
            print(f"{outcome.kind} --model {outcome.number}: {outcome.what}: {outcome.detail}")
        elif outcome.kind == "refused":
            refused[reason(outcome)] += 1
        if done % 500 == 0:
            print(f"{done} cases, {done / (time.time() - start):.1f} a second: {dict(counts)}")
        sys.stdout.flush()
    for sentence, count in refused.most_common():
        print(f"{count:6d} refused: {sentence}")
    print(f"{sum(counts.values())} cases with seed {args.seed}: {dict(counts)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
