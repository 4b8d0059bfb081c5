"""Decoding speed, its share of what the memory allows, and what attention statistics add to it.

    python benchmarks/decode.py [--rounds 9] [--prompt 128] [--new-tokens 32]

A LLaMA-type decoder of 110 million parameters (12 layers of 768) with random weights, fp32. A step
has to read the weights of all layers, the head and the whole cache once; the bound is that number
of bytes at the best bandwidth that a copy or a matrix-vector product reaches on this machine in the
same run. `transformers` generates for one row, its prefill (measured by itself) subtracted.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from generating import generating
from rounds import Run, Seconds, measure, median_ratio
from transformers import LlamaConfig, LlamaForCausalLM

from moresjax.analysis.attention import AttentionProbe
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.hardware.host import use_huge_pages
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.weights.families.base import decoder_config
from moresjax.weights.hf import build_mllm, import_params

ROWS = (1, 8)
STATISTICS = "with attention statistics"


def make_oracle(small: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    config = LlamaConfig(vocab_size=16_384, num_hidden_layers=2 if small else 12, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def imported(oracle: LlamaForCausalLM) -> MLLM:
    hf = oracle.config.to_dict()
    tensors = {name: x.detach().numpy() for name, x in oracle.state_dict().items()}
    config = MLLMConfig(llm=decoder_config(hf))
    return build_mllm(config, import_params(config, hf, tensors))


def bytes_per_step(model: MLLM, rows: int, length: int) -> int:
    """Weights of the layers, the norms and the head, and keys and values of `length` places."""
    llm, config = model.llm, model.config.llm
    weights = sum(x.nbytes for x in jax.tree.leaves((nnx.state(llm.blocks), nnx.state(llm.head))))
    places = rows * length * config.num_layers
    return weights + 2 * 4 * places * config.num_kv_heads * config.head_dim


def bandwidth(megabytes: int = 512, tries: int = 5) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and of matrix-vector products (read)."""
    side = int((megabytes * 2**20 / 4) ** 0.5)
    matrix = np.random.default_rng(0).standard_normal((side, side), np.float32)
    target, tensor, array = np.empty_like(matrix), torch.from_numpy(matrix), jnp.asarray(matrix)
    vector = torch.ones(side)
    product = jax.jit(lambda a: jnp.ones((1, side)) @ a)
    works = {
        "copy": (lambda: np.copyto(target, matrix), 2),
        "product in torch": (lambda: torch.mv(tensor, vector), 1),
        "product in JAX": (lambda: jax.block_until_ready(product(array)), 1),
    }
    best = {}
    for name, (work, passes) in works.items():
        seconds = []
        for _ in range(tries + 1):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        best[name] = passes * matrix.nbytes / min(seconds[1:])
    return best


def ours(model: MLLM, ids: np.ndarray, rows: int, new: int, probes=()) -> Run:
    engine = Engine(model, eos_ids=(-1,), probes=probes)
    return generating(engine, hf_batch(np.repeat(ids, rows, axis=0)), new)


def theirs(oracle: LlamaForCausalLM, ids: np.ndarray, new: int) -> Run:
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=int)}

    def generate(count):
        with torch.inference_mode():
            return oracle.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)

    def run():
        generate(1)
        yield "prefill"
        generate(new)
        yield "decode"  # and the prefill once more

    return run


def check_equal(model: MLLM, oracle: LlamaForCausalLM, ids: np.ndarray, new: int) -> None:
    found = Engine(model, eos_ids=(-1,)).generate(hf_batch(ids), new).tokens
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    expected = oracle.generate(torch.tensor(ids), **options)[:, ids.shape[1] :].numpy()
    if not np.array_equal(found, expected):
        raise SystemExit(f"the tokens differ: {found.tolist()} is not {expected.tolist()}")


def print_table(model: MLLM, seconds: Seconds, best: float, length: int, new: int) -> None:
    print("| rows | ms a step | tokens/s | ms at full bandwidth | share | statistics |")
    print("|---|---:|---:|---:|---:|---:|")
    for rows in ROWS:
        pair = {name: seconds[name] for name in (f"{rows}", f"{rows} {STATISTICS}")}
        step = statistics.median(seconds[f"{rows}"]["decode"]) / (new - 1)
        bound = bytes_per_step(model, rows, length) / best
        added = median_ratio(pair, f"{rows} {STATISTICS}", "decode") - 1
        cells = f"{1e3 * step:.1f} | {rows / step:.0f} | {1e3 * bound:.1f} | {bound / step:.0%}"
        print(f"| {rows} | {cells} | {added:+.1%} |")
    phases = seconds["transformers"]
    whole = [b - a for a, b in zip(phases["prefill"], phases["decode"], strict=True)]
    step = statistics.median(whole) / (new - 1)
    print(f"| 1, `transformers` | {1e3 * step:.1f} | {1 / step:.0f} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="few layers: does it run?")
    args = parser.parse_args()
    use_huge_pages()
    oracle = make_oracle(args.small)
    model = imported(oracle)
    ids = np.random.default_rng(0).integers(0, 16_384, (1, args.prompt))
    check_equal(model, oracle, ids, args.new_tokens)
    runs = {}
    for rows in ROWS:
        runs[f"{rows}"] = ours(model, ids, rows, args.new_tokens)
        probes = (AttentionProbe(),)
        runs[f"{rows} {STATISTICS}"] = ours(model, ids, rows, args.new_tokens, probes)
    runs["transformers"] = theirs(oracle, ids, args.new_tokens)
    before = bandwidth()
    seconds = measure(runs, args.rounds)
    after = bandwidth()
    fastest = {name: max(before[name], after[name]) for name in before}
    print(", ".join(f"{name} {x / 1e9:.1f} GB/s" for name, x in fastest.items()) + "\n")
    length = args.prompt + args.new_tokens
    print_table(model, seconds, max(fastest.values()), length, args.new_tokens)


if __name__ == "__main__":
    main()
