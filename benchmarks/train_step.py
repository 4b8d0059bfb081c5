"""A train step beside `transformers`, with `peft`'s LoRA and with MoReS as forward hooks in torch.

    python benchmarks/train_step.py [--rounds 5] [--samples 16] [--methods lora mores] [--huge]

A random LLaVA of 120 million parameters (encoder of 6 layers of 384 features, decoder of 12 layers
of 768), the same weights and the same samples for everyone, fp32, AdamW. Lengths are those of
`packing.py`, halved; 16 samples are what LLaVA-1.5 gives one of its 8 GPUs. `transformers` gets the
samples as its users do: a batch padded to the longest one; ours are packed. What counts are useful
tokens per second, those that are not padding. The connector trains everywhere. Losses of the first
step must agree. Every variant has a process of its own, ours with the huge pages that the
`moresjax` command asks for; peak memory is that of its process. With `--huge`, torch is run with
them as well.
"""

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from packing import NoTokenizer, sample_mix
from peft import LoraConfig, get_peft_model
from rounds import Run, Worker, measure, median_ratio
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moresjax.core.layout import TokenKind
from moresjax.core.row import Row
from moresjax.data.packing import first_fit
from moresjax.data.processor import Processor
from moresjax.runs.run_config import OptimizerConfig
from moresjax.runs.state import TrainState
from moresjax.training.objectives import next_token
from moresjax.training.optimizer import make_optimizer
from moresjax.training.step import make_train_step, split_model
from moresjax.weights.hf import HFFolder, build_mllm

RANK = {"lora": 8, "mores": 1}
SPECS = {"lora": "lora:rank=8,alpha=16", "mores": "mores:rank=1,init=identity"}
IMAGE_ID, LR, LENGTH, CAPACITY = 16_000, 1e-3, 384, 2
PATCHES, SIZE = 64, 112


def llava() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=16_384,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)


def samples(count: int) -> list[Row]:
    """Ready rows: some text, the image, a question, and an answer that is a third of the text."""
    lengths, images = sample_mix(count, 0, 640)
    rng = np.random.default_rng(0)
    rows = []
    for length, pictures in zip((lengths // 2).tolist(), images.tolist(), strict=True):
        answer = length // 3
        runs = [(TokenKind.SYSTEM, 8), (TokenKind.IMAGE, PATCHES * pictures)]
        runs += [(TokenKind.QUESTION, length - 8 - answer), (TokenKind.ANSWER, answer)]
        kind = np.concatenate([np.full(n, s, np.int32) for s, n in runs])
        visual = kind == TokenKind.IMAGE
        row = Row.text(rng.integers(3, IMAGE_ID, kind.size).astype(np.int32))
        image = np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)
        row = row.replace(kind=kind, image=image)
        if pictures:
            pixels = rng.standard_normal((pictures, SIZE, SIZE, 3))
            row = row.replace(pixels=pixels.astype(np.float32))
        rows.append(row)
    return rows


# ---- moresjax


@dataclasses.dataclass(frozen=True)
class Square:
    size: int = SIZE


def ours(folder: str, rows: Sequence[Row], method: str) -> Run:
    source = HFFolder(folder)
    config, parameters = source.config, source.parameters()
    parts = {part: getattr(config, part) for part in ("llm", "vision")}
    unrolled = {part: dataclasses.replace(x, unroll=True) for part, x in parts.items()}
    model = build_mllm(dataclasses.replace(config, **unrolled), parameters, SPECS[method])
    processor = Processor(NoTokenizer(), None, Square(), PATCHES)
    sizes = [len(row) for row in rows], [processor.count_images(row) for row in rows]
    packed = [[rows[i] for i in members] for members in first_fit(*sizes, LENGTH, CAPACITY)]
    joined = [processor.pad(processor.join(members), LENGTH, CAPACITY) for members in packed]
    batch = processor.batch(joined)
    graphdef, trainable, frozen = split_model(model, ("connector",))
    settings = OptimizerConfig(lr=LR, schedule="constant", warmup=0.0)
    optimizer, schedule = make_optimizer(settings, 100, trainable)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    step = jax.jit(make_train_step(graphdef, next_token, optimizer, schedule), donate_argnums=0)
    batch = jax.tree.map(jnp.asarray, batch)
    box = [state]

    def run():
        box[0], metrics = step(box[0], frozen, batch)
        loss = float(metrics["loss"])
        yield "train"
        return loss

    return run


# ---- torch


class Steering(torch.nn.Module):
    """MoReS of rank r on chosen tokens of one layer's output; starts as the identity."""

    def __init__(self, dim: int, rank: int):
        super().__init__()
        rotate = torch.nn.Linear(rank, dim, bias=False)
        self.rotate = torch.nn.utils.parametrizations.orthogonal(rotate)
        self.learned = torch.nn.Linear(dim, rank)
        with torch.no_grad():
            self.learned.weight.copy_(self.rotate.weight.T)
            self.learned.bias.zero_()

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        basis = self.rotate.weight
        return h + (self.learned(h) - h @ basis) @ basis.T


def theirs(folder: str, rows: Sequence[Row], method: str) -> Run:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method == "lora":
        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        config = LoraConfig(r=RANK["lora"], lora_alpha=16, target_modules=targets)
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    inputs, places = collated(rows)
    if method == "mores":
        layers = model.model.language_model.layers
        steering = torch.nn.ModuleList(Steering(768, RANK["mores"]) for _ in layers)
        model.steering = steering
        for layer, own in zip(layers, steering, strict=True):
            layer.register_forward_hook(hook(own, places))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    model.train()

    def run():
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        yield "train"
        return loss

    return run


def hook(steering: Steering, places: tuple[torch.Tensor, torch.Tensor]):
    """The first four and last five visual tokens of every row, as MoReS's default has it."""

    def edit(module, arguments, output):
        h = output[0] if isinstance(output, tuple) else output
        changed = h.index_put(places, steering(h[places]))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return edit


def collated(rows: Sequence[Row]):
    """A batch padded to its longest sample, and where MoReS edits."""
    shape = len(rows), max(len(row) for row in rows)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    mask, places = torch.zeros(shape, dtype=torch.long), []
    for number, row in enumerate(rows):
        tokens, visual = torch.tensor(row.tokens).long(), row.kind == TokenKind.IMAGE
        tokens[torch.tensor(visual)] = IMAGE_ID
        ids[number, : len(tokens)], mask[number, : len(tokens)] = tokens, 1
        answer = torch.tensor(row.kind == TokenKind.ANSWER)
        labels[number, : len(tokens)][answer] = tokens[answer]
        at = np.flatnonzero(visual)
        places += [(number, int(place)) for place in (*at[:4], *at[-5:])]
    images = np.concatenate([row.pixels for row in rows if row.pixels is not None])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    inputs["pixel_values"] = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    rows_at, columns = torch.tensor(places).T
    return inputs, (rows_at, columns)


# ---- Both


def variant(name: str, folder: str, count: int) -> Run:
    library, method, *_ = name.split()
    return (ours if library == "moresjax" else theirs)(folder, samples(count), method)


def compare(method: str, folder: str, args: argparse.Namespace) -> None:
    """Prints a row of the table for every library with this method."""
    names = [f"torch {method}", f"moresjax {method}"]
    names += [f"torch {method} huge"] if args.huge else []
    runs = {
        name: Worker(variant, name, folder, args.samples, huge_pages=name != names[0])
        for name in names
    }
    losses = {}
    for name, run in runs.items():
        list(run())
        losses[name] = run.value
    np.testing.assert_allclose(list(losses.values()), losses[names[0]], rtol=1e-4)
    seconds = measure(runs, args.rounds, warm=1)
    for run in runs.values():
        run.stop()
    useful = sum(len(row) for row in samples(args.samples))
    for name, phases in seconds.items():
        step, ratio = statistics.median(phases["train"]), median_ratio(seconds, name, "train")
        cells = [f"{step:.2f}", f"{useful / step:.0f}", f"{1 / ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {runs[name].peak:.2f} | {losses[name]:.5f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=list(SPECS), choices=SPECS)
    parser.add_argument("--huge", action="store_true", help="torch with huge pages as well")
    args = parser.parse_args()
    sizes = [len(row) for row in samples(args.samples)]
    print(f"{len(sizes)} samples, {sum(sizes)} tokens; padded {len(sizes) * max(sizes)}\n")
    print("| variant | s per step | useful tokens/s | ratio | peak, GiB | first loss |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlavaForConditionalGeneration(llava()).save_pretrained(folder)
        for method in args.methods:
            compare(method, folder, args)


if __name__ == "__main__":
    main()
