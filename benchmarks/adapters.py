"""What adapters of several kinds in one batch cost, beside one adapter for all rows.

    python benchmarks/adapters.py [--rounds 9] [--rows 64] [--new-tokens 16]

A LLaVA with random weights (4 layers of 256) reads one image and a question in every row. As many
adapters as rows, of three kinds in turn, answer in one batch; one adapter is attached alone for
all rows. Seconds are those that the process had of all cores, which other processes hardly change.
The goals: 1.10 of the prefill of one adapter of the dearest kind, and 1.05 of its decoding.
"""

import argparse
import dataclasses
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from generating import generating
from rounds import Run, measure

from moresjax.core.layout import Batch, TokenKind, TokenLayout
from moresjax.generation.engine import Engine
from moresjax.hardware.host import use_huge_pages
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import stack_adapters

KINDS = ("mores:rank=1,positions=image", "lora:rank=8,targets=q;v", "ia3")
TEXT = 48


def make_config(small: bool) -> MLLMConfig:
    """The LLaVA of the table, or one for a test."""
    size = 64 if small else 256
    llm = DecoderConfig(
        vocab_size=4096,
        hidden_size=size,
        intermediate_size=3 * size,
        num_layers=2 if small else 4,
        num_heads=8,
    )
    vision = VisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=size // 2,
        intermediate_size=size,
        num_layers=2,
        num_heads=4,
    )
    return MLLMConfig(llm=llm, vision=vision, connector="mlp2x_gelu")


def random_tuning(spec: str, config: MLLMConfig, seed: int) -> Tuning:
    tuning, rng = Tuning(spec, config), np.random.default_rng(seed)
    tuning.initialize()
    for variable in jax.tree.leaves(tuning.params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        noise = 0.02 * rng.standard_normal(variable.shape, np.float32)
        variable.set_value(variable.get_value() + jnp.asarray(noise))
    return tuning


def make_batch(config: MLLMConfig, rows: int) -> Batch:
    rng, visual = np.random.default_rng(0), config.visual_tokens
    shape = (rows, visual + TEXT)
    image = np.broadcast_to(np.arange(shape[1]), shape)
    image = np.where(image < visual, image, -1)
    kind = np.where(image >= 0, int(TokenKind.IMAGE), int(TokenKind.QUESTION))
    zeros = np.zeros(shape, np.int32)
    position = np.broadcast_to(np.arange(shape[1]), shape)
    layout = TokenLayout(kind, image, position, zeros, zeros, visual)
    pixels = rng.standard_normal((rows, 1, 64, 64, 3), np.float32)
    return Batch(rng.integers(3, config.llm.vocab_size, shape), layout, pixels)


def timed(model: MLLM, tuning: Tuning | None, batch: Batch, new: int) -> Run:
    model.tuning = tuning or Tuning("none", model.config)
    return generating(Engine(model, eos_ids=(-1,)), batch, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="a model of a few thousand parameters")
    args = parser.parse_args()
    use_huge_pages()
    config, new = make_config(args.small), args.new_tokens
    model, batch = initialize(MLLM(config)), make_batch(make_config(args.small), args.rows)
    connector = nnx.to_flat_state(nnx.state(model.connector, nnx.Param))
    base = {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in connector}
    tunings = {f"{n}": random_tuning(KINDS[n % len(KINDS)], config, n) for n in range(args.rows)}
    own = {name: {n: x * 1.01 for n, x in base.items()} for name in tunings}
    mixed = dataclasses.replace(batch, adapter=np.arange(args.rows, dtype=np.int32))
    runs = {"none": timed(model, None, batch, new)}
    runs |= {
        f"`{spec}`, alone": timed(model, tunings[f"{n}"], batch, new)
        for n, spec in enumerate(KINDS)
    }
    many = f"{args.rows} adapters of {len(KINDS)} kinds"
    runs[many] = timed(model, stack_adapters(tunings), mixed, new)
    connected = stack_adapters(tunings, own, base_connector=base)
    runs[f"{many}, own connectors"] = timed(model, connected, mixed, new)
    seconds = measure(runs, args.rounds, clock=time.process_time)
    alone = [name for name in runs if name.endswith("alone")]
    medians = {
        name: {phase: statistics.median(x) for phase, x in own.items()}
        for name, own in seconds.items()
    }
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| adapters | prefill, s | decode, s | prefill | decode |")
    print("|---|---:|---:|---:|---:|")
    for name, each in medians.items():
        ratios = []
        for phase in ("prefill", "decode"):
            dearest = max(alone, key=lambda other, phase=phase: medians[other][phase])
            pairs = zip(seconds[name][phase], seconds[dearest][phase], strict=True)
            ratios.append(statistics.median(x / y for x, y in pairs))
        cells = [f"{x:.3f}" for x in (*each.values(), *ratios)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
