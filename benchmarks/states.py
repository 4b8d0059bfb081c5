"""What reading hidden states adds to decoding, and states per second beside hooks in torch.

    python benchmarks/states.py [--rounds 7] [--questions 32] [--new-tokens 16] [--cpu] [--decode]

First the decoder of `decode.py` with random weights, 8 rows: prefill and decode steps without
probes, the same once more (what noise alone does), with the states of one layer and with those of
all layers (mean over the answer). A ratio is the median over rounds with its 95% interval; with
`--cpu` of seconds of CPU, which other processes disturb less. `--decode` ends here. Then a
LLaVA of 30 million parameters: the states of every new token at one layer, one question at a time
with a forward hook on the module in `transformers`, and all questions in one batch here; the states
must be equal.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import torch
from decode import imported, make_oracle, ours
from rounds import Run, measure, median_interval, ratios
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moresjax.analysis.capture import StateProbe
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.hardware.host import use_huge_pages
from moresjax.models.mllm import MLLM
from moresjax.weights.hf import build_mllm, config_from_hf, import_params

IMAGE_ID, VOCAB, TOLERANCE = 8_000, 8_192, 1e-4
ROWS, TEXT = 8, 24  # rows of the first table; tokens of a question


def program_cost(model: MLLM, ids: np.ndarray, new: int, probes: tuple) -> tuple[float, float]:
    """Operations and bytes of a compiled decode step, by XLA's count."""
    engine = Engine(model, eos_ids=(-1,), probes=probes)
    batch = hf_batch(np.repeat(ids, ROWS, axis=0))
    cost = engine.lower_decode(batch, new).compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def decode_cost(rounds: int, prompt: int, new: int, small: bool, cpu: bool) -> None:
    oracle = make_oracle(small)
    model = imported(oracle)
    last = model.config.llm.num_layers - 1
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, prompt))
    probes = {
        "no states": (),
        "no states, again": (),
        "one layer": (StateProbe(layers=(last,), take="answer"),),
        "all layers": (StateProbe(take="answer"),),
    }
    runs = {name: ours(model, ids, ROWS, new, own) for name, own in probes.items()}
    seconds = measure(runs, rounds, clock=time.process_time if cpu else time.perf_counter)
    costs = {name: program_cost(model, ids, new, own) for name, own in probes.items()}
    print("| states of | prefill, ms | ms a step | prefill | decode | operations | bytes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in probes:
        pair = {n: seconds[n] for n in dict.fromkeys(("no states", name))}
        cells = [""] * 4
        if name != "no states":
            for place, phase in enumerate(("prefill", "decode")):
                own = ratios(pair, name, phase)
                low, high = median_interval(own)
                cells[place] = f"{statistics.median(own):.3f} [{low:.3f}, {high:.3f}]"
            pairs = zip(costs[name], costs["no states"], strict=True)
            cells[2:] = [f"{x / y:.4f}" for x, y in pairs]
        first, step = (statistics.median(seconds[name][phase]) for phase in ("prefill", "decode"))
        cells = [f"{1e3 * first:.1f}", f"{1e3 * step / (new - 1):.1f}", *cells]
        print(f"| {name} | {' | '.join(cells)} |")


def make_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=96,
        patch_size=16,
    )
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=IMAGE_ID)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def our_llava(oracle: LlavaForConditionalGeneration) -> MLLM:
    hf = oracle.config.to_dict()
    config = config_from_hf(hf)
    tensors = {name: x.detach().numpy() for name, x in oracle.state_dict().items()}
    return build_mllm(config, import_params(config, hf, tensors))


def hooked(oracle, ids, pixels, layer: int, new: int, found: dict) -> Run:
    """One question at a time, with a forward hook on a block."""
    kept: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden[:, -1].clone())

    block = oracle.model.language_model.layers[layer]

    def run():
        states = []
        with torch.inference_mode():
            for row, image in zip(ids, pixels, strict=True):
                kept.clear()
                handle = block.register_forward_hook(keep)
                oracle.generate(
                    input_ids=torch.tensor(row[None]),
                    attention_mask=torch.ones(1, len(row), dtype=int),
                    pixel_values=torch.tensor(image[None]),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
                handle.remove()
                states.append(torch.cat(kept).numpy())
        found["torch"] = np.stack(states)
        yield "states"

    return run


def captured(model: MLLM, ids, pixels, layer: int, new: int, found: dict) -> Run:
    """All questions in one batch."""
    probe = StateProbe(layers=(layer,), take="each")
    engine = Engine(model, eos_ids=(-1,), probes=(probe,))
    mask = np.ones_like(ids)
    batch = hf_batch(ids, mask, pixels, IMAGE_ID, model.config.visual_tokens)

    def run():
        stats = jax.block_until_ready(engine.generate(batch, new)).stats
        found["moresjax"] = np.asarray(stats[probe.name]["state"])[0]
        yield "states"

    return run


def side_by_side(rounds: int, questions: int, new: int) -> None:
    oracle = make_llava()
    model, rng = our_llava(oracle), np.random.default_rng(1)
    visual = model.config.visual_tokens
    words = rng.integers(1, IMAGE_ID, (questions, TEXT))
    images = np.full((questions, visual), IMAGE_ID)
    ids = np.concatenate([words[:, :4], images, words[:, 4:]], axis=1)
    pixels = rng.standard_normal((questions, 3, 96, 96)).astype(np.float32)
    found: dict[str, np.ndarray] = {}
    layer = model.config.llm.num_layers - 1
    runs = {
        "torch, hooks, one by one": hooked(oracle, ids, pixels, layer, new, found),
        "moresjax": captured(model, ids, pixels, layer, new, found),
    }
    seconds = measure(runs, rounds, warm=1)
    difference = np.abs(found["torch"] - found["moresjax"]).max()
    if difference > TOLERANCE:
        raise SystemExit(f"the states differ by {difference}")
    count, (slow, _) = questions * new, runs
    print("\n| variant | s | states/s | ratio |")
    print("|---|---:|---:|---:|")
    for name in runs:
        took = statistics.median(seconds[name]["states"])
        ratio = statistics.median(
            a / b for a, b in zip(seconds[slow]["states"], seconds[name]["states"], strict=True)
        )
        print(f"| {name} | {took:.2f} | {count / took:.0f} | {ratio:.2f} |")
    print(f"\nThe states differ by at most {difference:.1e}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the first table")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="few layers: does it run?")
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU, not of the clock")
    parser.add_argument("--decode", action="store_true", help="only the first table")
    args = parser.parse_args()
    use_huge_pages()
    decode_cost(args.rounds, args.prompt, args.new_tokens, args.small, args.cpu)
    if args.decode:
        return
    side_by_side(args.rounds, args.questions, args.new_tokens)


if __name__ == "__main__":
    main()
