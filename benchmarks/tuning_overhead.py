"""What every tuning method costs beside no tuning: train step, its memory, prefill, decoding.

    python benchmarks/tuning_overhead.py [--rounds 9] [--rows 2] [--methods none mores ...]

A LLaMA-type decoder of 110 million parameters (12 layers of 768) with random weights reads one
image of 100 tokens and some text per row; the connector trains with every method. Nothing is merged
into the weights. `added` is what LLaVA Steering reports in its appendix A.7: seconds per sample of
generation, more than without tuning (there, on its hardware: MoReS 0.08, Adapter 0.3, OFT 2.8).
`MiB` is what a train step takes at most besides the frozen weights, as the compiler has it, and
`generated` the time beside no tuning's: what MRT reports in its Tables S8 and S7 (`--methods none
full vpt:length=10 lora:rank=16 m2pt mixlora:factors=16 mrt-paper prompt:length=10`; there 39, 12,
19, 17, 23 and 16 GB, and 2.13, 1.13, 5.50, 2.63 and 1.50 times the base model's inference).
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from generating import generating
from rounds import Run, Seconds, measure, median_ratio

from moresjax.core.layout import Batch, TokenKind
from moresjax.generation.engine import Engine
from moresjax.hardware.host import use_huge_pages
from moresjax.models.count import count_parameters
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.runs.run_config import OptimizerConfig
from moresjax.runs.state import TrainState
from moresjax.testing.batches import random_batch, row_layout, stack_layout
from moresjax.training.objectives import next_token
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import make_train_step, split_model

METHODS = (
    "none",
    "mores:rank=1,positions=image:1%",
    "mores:rank=1,positions=image:1%,layers=every:4",
    "mores:rank=1",
    "mores:rank=4,positions=image",
    "reft:rank=4",
    "red",
    "ia3",
    "lora:rank=8",
    "lora:rank=128",
    "adapter:bottleneck=256",
    "oft:block_size=32",
    "oft-legacy:blocks=16",
    "full",
    "vpt:length=10",
    "lora:rank=16",
    "m2pt",
    "mixlora:factors=16",
    "mrt-paper",
    "prompt:length=10",
)
ANSWER = 8  # tokens that training predicts


def architecture() -> MLLMConfig:
    """The model that is measured."""
    return MLLMConfig(
        llm=DecoderConfig(
            vocab_size=16_384,
            hidden_size=768,
            intermediate_size=2048,
            num_layers=12,
            num_heads=12,
            unroll=True,
        ),
        vision=VisionConfig(
            image_size=80,
            patch_size=8,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=2,
        ),
    )


def make_batch(config: MLLMConfig, rows: int, text: int, answer: int) -> Batch:
    """An image and `text` tokens per row, the last `answer` of them the answer."""
    assert config.vision is not None
    visual = config.visual_tokens
    pieces = [(TokenKind.IMAGE, visual), (TokenKind.QUESTION, text - answer)]
    layout = stack_layout([row_layout(*pieces, (TokenKind.ANSWER, answer))] * rows, visual)
    batch = random_batch(layout, config.llm.vocab_size, 1, config.vision.image_size)
    return jax.tree.map(jnp.asarray, batch)


def training(
    base: MLLM, batch: Batch, methods: Sequence[str]
) -> tuple[dict[str, Run], dict[str, float]]:
    """Spec -> one train step, and the MiB that it takes besides the frozen weights.

    The frozen weights are the same arrays for all of them.
    """
    runs, memory = {}, {}
    for spec in methods:
        model = nnx.clone(base)
        model.attach(spec)
        graphdef, trainable, frozen = split_model(model, ("connector",))
        trainable = jax.tree.map(jnp.copy, trainable)  # a step consumes what it trains
        optimizer, schedule = make_optimizer(OptimizerConfig(), 100, trainable)
        state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
        step = jax.jit(make_train_step(graphdef, next_token, optimizer, schedule), donate_argnums=0)
        step = step.lower(state, frozen, batch).compile()
        memory[spec] = step_memory(step, frozen) / 2**20

        box = [state]

        def run(
            step: Callable = step, box: list = box, frozen: nnx.State = frozen
        ) -> Iterator[str]:
            box[0], metrics = step(box[0], frozen, batch)
            jax.block_until_ready(metrics)
            yield "train"

        runs[spec] = run
    return runs, memory


def step_memory(step: Any, frozen: nnx.State) -> int:
    """Bytes that a compiled step holds at most, without the frozen weights."""
    found = step.memory_analysis()
    arguments = found.argument_size_in_bytes + found.output_size_in_bytes
    whole = arguments - found.alias_size_in_bytes + found.temp_size_in_bytes
    return whole - sum(x.nbytes for x in jax.tree.leaves(frozen))


def generation(base: MLLM, batch: Batch, methods: Sequence[str], new_tokens: int) -> dict[str, Run]:
    """Spec -> a prefill and the decoding of all but the first new token."""
    base = nnx.clone(base)
    base.llm.unstack()  # once: the engines then share the layers
    runs = {}
    for spec in methods:
        model = nnx.clone(base)
        model.attach(spec)
        runs[spec] = generating(Engine(model, eos_ids=(-1,)), batch, new_tokens)
    return runs


def print_table(
    config: MLLMConfig,
    seconds: Seconds,
    memory: Mapping[str, float],
    rows: int,
    new_tokens: int,
) -> None:
    """Prints a row per method."""

    def per_sample(spec: str, *phases: str) -> float:
        return sum(statistics.median(seconds[spec][phase]) for phase in phases) / rows

    first = next(iter(seconds))
    base = per_sample(first, "prefill", "decode")
    print(
        "| method | trainable | train | MiB | prefill | decode | generated | s per sample | added |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for spec in seconds:
        count = count_parameters(config, spec, ()).trainable
        train, *ratios = (
            f"{median_ratio(seconds, spec, p):.3f}" for p in ("train", "prefill", "decode")
        )
        whole = per_sample(spec, "prefill", "decode")
        cells = [f"`{spec}`", f"{count:,d}", train, f"{memory[spec]:.0f}", *ratios]
        cells += [f"{whole / base:.3f}", f"{whole:.3f}", f"{whole - base:+.3f}"]
        print(f"| {' | '.join(cells)} |")
    step, prefill = (1e3 * per_sample(first, phase) for phase in ("train", "prefill"))
    token = 1e3 * per_sample(first, "decode") / (new_tokens - 1)
    print(
        f"\nWithout tuning, per sample: {step:.0f} ms a train step, {prefill:.0f} ms prefill, "
        f"{token:.1f} ms a decoded token."
    )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--text", type=int, default=64, help="text tokens per row")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first is the baseline")
    args = parser.parse_args()
    use_huge_pages()
    config = architecture()
    base = initialize(MLLM(config))
    seconds: Seconds = {spec: {} for spec in args.methods}
    steps, memory = training(base, make_batch(config, args.rows, args.text, ANSWER), args.methods)
    asked = make_batch(config, args.rows, args.text, 0)
    for runs in (steps, generation(base, asked, args.methods, args.new_tokens)):
        for spec, phases in measure(runs, args.rounds).items():
            seconds[spec] |= phases
    print_table(config, seconds, memory, args.rows, args.new_tokens)


if __name__ == "__main__":
    main()
