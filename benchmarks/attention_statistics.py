"""What attention statistics add: memory on TPUs by libtpu's compiler, and time on this CPU.

    export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
    python benchmarks/attention_statistics.py memory [--length 8192] [--topology v5e-16]
    python benchmarks/attention_statistics.py time [--lengths 600 2048]

`memory` compiles a prefill and the gradients of a train step of LLaVA-1.5 7B with MoReS, one row
per chip, on a slice that need not be there: without statistics, with those of all queries on the
kernel, and with them over a dense mask, which is how they were read before. `time` measures a
prefill of a small decoder in one process, variants in turn, by the time of the CPU.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from moresjax.analysis.attention import AttentionProbe
from moresjax.core.layout import Batch, RowStructure, TokenKind, TokenLayout, loss_mask
from moresjax.hardware.chips import GIB
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.plans.program import Program
from moresjax.plans.train_plan import abstract_batch, abstract_model, find_mesh
from moresjax.runs.config import load_config
from moresjax.runs.run_config import resolve
from moresjax.sharding.mesh import mesh_preset, use_mesh
from moresjax.training.objectives import next_token

PROBES = (AttentionProbe(),)
# Name, attention, probes.
VARIANTS = (
    ("without statistics", "splash", ()),
    ("with statistics", "splash", PROBES),
    ("with statistics, dense mask", "xla", PROBES),
)


class Probed:
    """A model whose passes read statistics, which are kept."""

    def __init__(self, model: Any, probes: Sequence) -> None:
        self.llm, self.stats, self._model, self._probes = model.llm, {}, model, probes

    def __call__(self, batch: Batch, **options: Any) -> Any:
        out = self._model(batch, probes=self._probes, **options)
        self.stats = out.stats
        return out


def memory(kind: str, attention: str, probes: Sequence, args: argparse.Namespace) -> float:
    """Peak per chip in GiB."""
    chips = int(args.topology.rpartition("-")[2])
    settings = {"max_seq_len": args.length, "images_per_row": 1, "remat": True}
    settings |= {"batch_size": chips, "attention": attention}
    settings |= {"model.llm.num_layers": args.layers, "model.llm.max_positions": args.length}
    settings |= {f"mesh.{k}": n for k, n in mesh_preset("fsdp", chips).items()}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = resolve(load_config("llava_steering:size=7b,tuning=mores-base", overrides))
    _, mesh = find_mesh(config, args.topology)
    graphdef, trainable, frozen = abstract_model(config, mesh)
    batch = abstract_batch(config, mesh, args.length, RowStructure.SINGLE)

    def prefill(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> tuple:
        model = nnx.merge(graphdef, trainable, frozen)
        out = model(batch, probes=probes, keep_cache=True)
        return model.llm.logits(out.hidden[:, -1:]), out.cache, out.stats

    @functools.partial(jax.grad, has_aux=True)
    def train(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> tuple:
        model = Probed(nnx.merge(graphdef, trainable, frozen), probes)
        return next_token(model, batch).total, model.stats

    function = {"prefill": prefill, "train": train}[kind]
    with use_mesh(mesh):
        lowered = jax.jit(function).lower(trainable, frozen, batch)
        return Program(lowered, (trainable, frozen, batch), args.quick).needed_bytes / GIB


def print_memory(args: argparse.Namespace) -> None:
    """A row for each program."""
    print(f"| program | {' | '.join(name for name, *_ in VARIANTS)} | ratio | ratio before |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind in args.programs:
        base, new, old = (memory(kind, kernel, probes, args) for _, kernel, probes in VARIANTS)
        cells = [f"{x:.2f}" for x in (base, new, old)] + [f"{x / base:.3f}" for x in (new, old)]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def layout_of(length: int) -> TokenLayout:
    """One row: a system prompt, an image, a question and an answer."""
    kind = np.full((1, length), int(TokenKind.QUESTION), np.int32)
    kind[:, :8], kind[:, 8 : length // 2] = int(TokenKind.SYSTEM), int(TokenKind.IMAGE)
    kind[:, -64:] = int(TokenKind.ANSWER)
    zeros = np.zeros_like(kind)
    position = np.arange(length, dtype=np.int32)[None]
    return TokenLayout(kind, zeros - 1, position, zeros, zeros)


def print_time(args: argparse.Namespace) -> None:
    """A row for each length and each choice of queries."""
    print(
        "| tokens | attention | queries | CPU time (least) | operations |\n|---:|---|---|---:|---:|"
    )
    for length in args.lengths:
        llm = DecoderConfig(
            vocab_size=512,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_layers=args.layers,
            num_heads=args.hidden // 64,
            max_positions=length,
        )
        layout = layout_of(length)
        batch = Batch(np.zeros((1, length), np.int32), layout, structure=RowStructure.SINGLE)
        answer = np.flatnonzero(np.asarray(loss_mask(layout))[0])[None]
        for attention in ("xla", "chunked"):
            for name, queries in (("last", answer[:, -1:]), ("answer", answer), ("all", None)):
                added = measure(llm, attention, batch, queries, args.rounds)
                print(f"| {length} | {attention} | {name} | {added} |", flush=True)


def measure(llm: DecoderConfig, attention: str, batch: Batch, queries: Any, rounds: int) -> str:
    """What statistics add to a pass.

    Median over rounds of the CPU time with them over that without, in brackets the ratio of the
    least times, and the operations that XLA counts.
    """
    model = MLLM(MLLMConfig(llm=dataclasses.replace(llm, attention=attention)))
    initialize(model, 0)
    graphdef, state = nnx.split(model)

    def program(probes: Sequence) -> Any:
        @jax.jit
        def run(state: nnx.State, batch: Batch) -> tuple:
            out = nnx.merge(graphdef, state)(batch, probes=probes, queries=queries)
            return out.hidden, out.stats

        return run

    runs = [program(probes).lower(state, batch).compile() for probes in ((), PROBES)]
    flops = [(run.cost_analysis() or {})["flops"] for run in runs]
    seconds = np.zeros((rounds, len(runs)))
    for number in range(-1, rounds):
        for place, run in enumerate(runs):
            start = time.process_time()
            jax.block_until_ready(run(state, batch))
            if number >= 0:
                seconds[number, place] = time.process_time() - start
    middle = np.median(seconds[:, 1] / seconds[:, 0])
    least = np.divide(*seconds.min(axis=0)[::-1])
    added = (100 * (x - 1) for x in (middle, least, flops[1] / flops[0]))
    return "{:+.1f}% ({:+.1f}%) | {:+.1f}%".format(*added)


def main() -> None:
    """Prints the table that was asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--programs", nargs="+", default=("prefill", "train"))
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--lengths", nargs="+", type=int, default=(600, 2048))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--topology", default="v5e-16")
    parser.add_argument("--quick", action="store_true", help="the compiler's least effort")
    args = parser.parse_args()
    print_memory(args) if args.what == "memory" else print_time(args)


if __name__ == "__main__":
    main()
