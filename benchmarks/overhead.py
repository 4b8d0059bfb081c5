"""What tuning methods and attention statistics cost, as ratios measured side by side.

    python benchmarks/overhead.py [--rounds 15]

The model is the demo's, larger: 6 layers, 256 features, batches of 32 rows.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from rounds import Run, measure, median_ratio

from moresjax.analysis.attention import AttentionProbe
from moresjax.configs import digits as recipe
from moresjax.core.layout import Batch
from moresjax.data.pipeline import to_device_batch
from moresjax.generation.engine import Engine
from moresjax.hardware.host import use_huge_pages
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.runs.architecture import model_config
from moresjax.runs.data import build_iterator
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import RunConfig, resolve
from moresjax.runs.state import TrainState
from moresjax.training.objectives import next_token
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import make_train_step, split_model

METHODS = (
    "none",
    "mores:rank=1",
    "mores:rank=1,positions=image",
    "mores:rank=8",
    "ia3",
    "lora:rank=8",
    "lora:rank=128",
    "full",
)


def setting() -> tuple[RunConfig, Batch]:
    """Configuration and one batch on the device."""
    config = recipe.get_config("stage=finetune")
    llm = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 6, "num_heads": 8}
    config.update({"model": {"llm": llm}})
    config = resolve(config)
    processor = build_processor(config)
    rows = next(build_iterator(config, processor))
    rows.pop("id")
    batch = to_device_batch(rows, processor)
    assert isinstance(batch, Batch)
    return config, batch


def train_steps(
    config: RunConfig, batch: Batch, methods: Sequence[str] = METHODS, **llm: bool
) -> dict[str, Run]:
    """One train step of every spec, to be measured."""
    steps = {}
    for spec in methods:
        fields = config.model.llm
        assert not isinstance(fields, str)
        parts = dataclasses.replace(config.model, llm={**fields, **llm})
        config = dataclasses.replace(config, model=parts)
        model = initialize(MLLM(model_config(config), spec))
        graphdef, trainable, frozen = split_model(model, config.also_train)
        optimizer, schedule = make_optimizer(config.optimizer, 100, trainable)
        state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
        step = jax.jit(make_train_step(graphdef, next_token, optimizer, schedule), donate_argnums=0)
        box = [state]

        def run(
            step: Callable = step, box: list = box, frozen: nnx.State = frozen
        ) -> Iterator[str]:
            box[0], metrics = step(box[0], frozen, batch)
            jax.block_until_ready(metrics)
            yield "run"

        steps[spec] = run
    return steps


def forwards(config: RunConfig, batch: Batch) -> dict[str, Run]:
    """Generation of 32 tokens, with and without steering and statistics."""
    runs = {}
    for name, spec, probes in (
        ("base", "none", ()),
        ("mores:rank=1", "mores:rank=1", ()),
        ("lora:rank=8, not merged", "lora:rank=8", ()),
        ("base + attention statistics", "none", (AttentionProbe(),)),
    ):
        model = initialize(MLLM(model_config(config), spec))
        engine = Engine(model, eos_ids=(-1,), probes=probes)

        def run(engine: Engine = engine) -> Iterator[str]:
            jax.block_until_ready(engine.generate(batch, 32).tokens)
            yield "run"

        runs[name] = run
    return runs


def compare(title: str, runs: dict, rounds: int) -> None:
    """Prints milliseconds and ratios to the first variant as a table."""
    seconds = measure(runs, rounds)
    print(f"\n| {title} | ms | ratio |\n|---|---:|---:|")
    for name, phases in seconds.items():
        ms = 1e3 * statistics.median(phases["run"])
        print(f"| `{name}` | {ms:.0f} | {median_ratio(seconds, name, 'run'):.2f} |", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    use_huge_pages()
    config, batch = setting()
    compare("train step", train_steps(config, batch), rounds)
    compare("generation, 32 tokens", forwards(config, batch), rounds)
    layers = {
        "unrolled": {"unroll": True, "remat": False},
        "scanned": {"unroll": False, "remat": False},
        "scanned, remat": {"unroll": False, "remat": True},
    }
    spec = "mores:rank=1"
    runs = {name: train_steps(config, batch, (spec,), **c)[spec] for name, c in layers.items()}
    compare("layers, train step with MoReS", runs, rounds)


if __name__ == "__main__":
    main()
