"""Effects of removing visual tokens, beside a loop with hooks in transformers.

    python benchmarks/causes.py [--rounds 5]

A LLaVA of `transformers` (64 visual tokens, 4 layers) and the same weights here: the effect on an
answer of replacing keys and values of each visual token by zero in each layer, and by those of
another image in each of the ten ranges of layers. The loop makes one intervention at a time, each a
run of its own: the image and what stands before it, then question and answer on a cache of which
one token is replaced. A quicker loop reads the image once as well and copies its cache. All take
turns in each round, on one core, as more of them make models of this size slower in either library;
seconds are those of the process.
"""

import argparse
import copy
import functools
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from rounds import Run, measure, median_interval, median_ratio, ratios
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.hardware.host import use_huge_pages
from moresjax.inference.causes import causes
from moresjax.inference.model import Model
from moresjax.testing.hf_llavas import IMAGE_ID, TEXT, TOWER
from moresjax.weights.hf import build_mllm, config_from_hf, import_params

SIDE = 32
PROMPT, ANSWER, GOAL = "is there a two ?", "yes three", 50


def make_llava() -> LlavaForConditionalGeneration:
    """A tiny LLaVA with random weights."""
    config = LlavaConfig(
        text_config=LlamaConfig(**(TEXT | {"num_hidden_layers": 4})),
        vision_config=CLIPVisionConfig(**(TOWER | {"image_size": SIDE})),
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            parameter.normal_(float(norm), 0.3 if parameter.ndim == 1 else 0.25)
    return model


def ours(oracle: LlavaForConditionalGeneration) -> Model:
    """The same weights here."""
    hf = oracle.config.to_dict()
    config = config_from_hf(hf)
    tensors = {name: x.detach().numpy() for name, x in oracle.state_dict().items()}
    mllm = build_mllm(config, import_params(config, hf, tensors))
    visual = mllm.config.visual_tokens
    return Model(
        mllm, Processor(build_tokenizer(), get_template("bare"), ImageProcessor(SIDE), visual)
    )


class Loop:
    """One intervention at a time in `transformers`."""

    def __init__(self, oracle: LlavaForConditionalGeneration, model: Model, images: np.ndarray):
        self.oracle = oracle
        rows = [model.prompts.row(PROMPT, [image]) for image in images]
        _, self.answer = model.prompts.with_answer(rows[0], PROMPT, [images[0]], ANSWER)
        self.image = np.flatnonzero(rows[0].image >= 0)
        self.first, self.prompt = int(self.image[-1]) + 1, len(rows[0])
        ids = np.where(rows[0].image >= 0, IMAGE_ID, rows[0].tokens)
        self.ids = torch.tensor(np.concatenate([ids, self.answer[:-1]])[None])
        self.pixels = [
            torch.tensor(np.moveaxis(np.asarray(row.pixels, np.float32), -1, 1)) for row in rows
        ]

    def read(self, number: int):
        """The cache of what stands up to the last visual token."""
        with torch.no_grad():
            return self.oracle(
                input_ids=self.ids[:, : self.first],
                pixel_values=self.pixels[number],
                use_cache=True,
            ).past_key_values

    def score(self, cache) -> float:
        """The answer's log-probability behind a cache, which is used up."""
        with torch.no_grad():
            out = self.oracle(input_ids=self.ids[:, self.first :], past_key_values=cache)
        logs = out.logits[0, self.prompt - 1 - self.first :].log_softmax(-1)
        return float(logs[np.arange(len(self.answer)), self.answer].sum())

    def effects(self, removal: str, ranges: list, read_once: bool) -> np.ndarray:
        """The effect of every range of layers and visual token."""
        own = self.read(0)
        other = self.read(1) if removal == "swap" else None
        value = self.score(copy.deepcopy(own))
        found = np.zeros((len(ranges), len(self.image)))
        for row, (first, end) in enumerate(ranges):
            for column, place in enumerate(self.image):
                cache = copy.deepcopy(own) if read_once else self.read(0)
                for layer in range(first, end):
                    for name in ("keys", "values"):
                        new = getattr(other.layers[layer], name)[:, :, place] if other else 0
                        getattr(cache.layers[layer], name)[:, :, place] = new
                found[row, column] = value - self.score(cache)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    use_huge_pages()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    oracle = make_llava()
    model = ours(oracle)
    images = np.random.default_rng(0).integers(0, 255, (2, SIDE, SIDE, 3)).astype(np.uint8)
    loop = Loop(oracle, model, images)
    print("| effects | loop | loop, image read once | here | times | once |")
    print("|---|---:|---:|---:|---:|---:|")
    layers = range(TEXT["num_hidden_layers"])
    each = [(layer, layer + 1) for layer in layers]
    every = [(first, last + 1) for first in layers for last in layers[first:]]
    for removal, ranges in (("zero", each), ("swap", every)):
        other: dict[str, Any] = {"other": images[1]} if removal == "swap" else {}

        options = {"answer": ANSWER, "removal": removal, "layers": ranges, "batch_size": 129}

        def effects(options: dict[str, Any] = options | other) -> np.ndarray:
            return causes(model, PROMPT, images[0], **options).effects

        wanted = loop.effects(removal, ranges, True)
        error = np.abs(effects() - wanted).max()
        assert error < 1e-4, error
        assert np.abs(loop.effects(removal, ranges, False) - wanted).max() < 1e-5

        def run_of(function) -> Run:
            def run():
                function()
                yield "effects"

            return run

        runs = {
            "here": run_of(effects),
            "loop": run_of(functools.partial(loop.effects, removal, ranges, False)),
            "once": run_of(functools.partial(loop.effects, removal, ranges, True)),
        }
        times = measure(runs, args.rounds, warm=1, clock=time.process_time)
        here, whole, once = (
            1e3 * statistics.median(times[name]["effects"]) for name in ("here", "loop", "once")
        )
        ratio, quick = (median_ratio(times, name, "effects") for name in ("loop", "once"))
        low, high = median_interval(ratios(times, "loop", "effects"))
        print(
            f"| {wanted.size}, {removal} | {whole:.0f} | {once:.0f} | {here:.1f} | "
            f"{ratio:.0f} [{low:.0f}, {high:.0f}] | {quick:.0f} |"
        )
        print(f"largest difference of an effect: {error:.1e}; goal: {GOAL} times")


if __name__ == "__main__":
    main()
