"""Share of useful tokens when the LLaVA-1.5 mix is padded, grouped by length, or packed.

    python benchmarks/packing.py [--samples 50000] [--length 4096] [--visual 576]

The numbers of conversations per source are those of LLaVA-1.5 (arXiv 2310.03744, appendix, mixture
of 665k). The texts are not at hand here: their mean lengths and spreads (log-normal, in tokens, all
rounds and the system prompt together) are assumptions from the kind of the source. Conversations
are cut at 2048 tokens (or at the row), as LLaVA does.
"""

import argparse
import time

import numpy as np

from moresjax.core.row import Row
from moresjax.data.buckets import bucket_lengths, plan_batches
from moresjax.data.packing import PackWindow, first_fit
from moresjax.data.pipeline import PACK_WINDOW, SORTED_BATCHES
from moresjax.data.processor import Processor
from moresjax.data.rows import PADDING_SAMPLE, Collate, RowReader
from moresjax.data.skipping import SkipPolicy

# Source: thousands of conversations, assumed mean and relative spread of text tokens, images.
MIX = {
    "LLaVA-Instruct": (158, 260, 0.5, 1),
    "ShareGPT": (40, 1500, 0.7, 0),
    "VQAv2": (83, 150, 0.4, 1),
    "GQA": (72, 280, 0.6, 1),
    "OKVQA": (9, 80, 0.2, 1),
    "OCR-VQA": (80, 190, 0.3, 1),
    "A-OKVQA": (66, 110, 0.2, 1),
    "TextCaps": (22, 110, 0.2, 1),
    "RefCOCO": (48, 420, 0.7, 1),
    "Visual Genome": (86, 380, 0.6, 1),
}
BATCH = 128


def sample_mix(count: int, visual: int, longest: int, seed: int = 0):
    """Tokens (images included) and images of random conversations of the mix, `[n]` each."""
    rng = np.random.default_rng(seed)
    thousands, means, spreads, pictures = (np.asarray(x) for x in zip(*MIX.values(), strict=True))
    source = rng.choice(len(MIX), count, p=thousands / thousands.sum())
    sigma = np.sqrt(np.log1p(spreads**2))[source]
    text = rng.lognormal(np.log(means[source]) - sigma**2 / 2, sigma).round().astype(int)
    images = pictures[source]
    return np.minimum(text.clip(45) + visual * images, longest), images


class NoTokenizer:
    """Rows come ready: nothing is tokenised here."""

    is_fast = True


def packed_rows(tokens, images, length, capacity, window):
    """Members of every packed row."""
    rows = []
    for start in range(0, len(tokens), window):
        part = slice(start, start + window)
        packed = first_fit(tokens[part].tolist(), images[part].tolist(), length, capacity)
        rows += [[start + member for member in row] for row in packed]
    return rows


def rows_per_second(tokens, length, window) -> float:
    """Packed rows that one thread plans, joins and pads, without images."""
    rows = [Row.text(np.zeros(n, np.int32)) for n in tokens[:window]]
    processor = Processor(NoTokenizer(), None)
    pack = PackWindow(processor.count_images, length, 0)
    collate = Collate(
        RowReader((), processor, length, 0, SkipPolicy("raise", 0)), (length,), slice(None)
    )
    start, made = time.perf_counter(), 0
    while time.perf_counter() - start < 2:
        made += len(collate(pack.flat_map([[(0, row)] for row in rows]))["tokens"])
    return made / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--visual", type=int, default=576, help="visual tokens per image")
    args = parser.parse_args()
    tokens, images = sample_mix(args.samples, args.visual, min(args.length, 2048))
    print(f"{args.samples} samples, {tokens.mean():.0f} tokens on average, rows of {args.length}\n")
    print("| batching | useful tokens | padding | image slots used |")
    print("|---|---|---|---|")

    def show(name, used, slots):
        print(f"| {name} | {used:.1%} | {1 - used:.1%} | {images.sum() / slots:.1%} |")

    show("pad", tokens.sum() / (args.samples * args.length), args.samples)
    for buckets in ((), tuple(range(256, args.length, 256))):
        lengths = np.asarray(bucket_lengths(args.length, buckets))
        # Words stand for tokens here; in a run, batches are sorted by words as well.
        sizes = np.stack([tokens, images], 1)
        plan = plan_batches(sizes, BATCH, SORTED_BATCHES * BATCH, np.random.default_rng(0))
        longest = np.where(plan == PADDING_SAMPLE, 0, tokens[plan]).max(1)
        capacity = lengths[np.searchsorted(lengths, longest)].sum() * BATCH
        slots = (images[plan[:, 0]] > 0).sum() * BATCH
        show(f"bucket, {len(lengths)} lengths", tokens.sum() / capacity, slots)
    for window in (64, PACK_WINDOW, 1024):
        for capacity in range(args.length // 850, args.length // (args.visual + 60) + 1):
            rows = packed_rows(tokens, images, args.length, capacity, window)
            name = f"pack, window {window}, {capacity} images per row"
            show(name, tokens.sum() / (len(rows) * args.length), len(rows) * capacity)
    speed = rows_per_second(tokens, args.length, PACK_WINDOW)
    print(f"\n{speed:.0f} packed rows/s per thread (without reading images)")


if __name__ == "__main__":
    main()
