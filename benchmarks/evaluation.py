"""Evaluating visual questions: our path beside that of `transformers`, same weights and answers.

    python benchmarks/evaluation.py [--rounds 3] [--batch-sizes 16 32 64] [--per-image 1 4]

A LLaVA of 40 million parameters with random weights (CLIP, 6 layers of 384, 112 pixels: 64 visual
tokens; LLaMA, 8 layers of 512) answers 64 questions of different lengths about photos on disk, one
or several about each (VQAv2 asks 5, GQA 31, POPE 6, MME 2). Timed is everything from files and
questions to texts. `one by one` is the loop of the original: processor and `generate` for one
question at a time; `batched` pads on the left. Random weights do not end an answer, so all have the
same number of tokens: refilling a batch, which is ours alone, wins nothing. The answers must be
equal. Every variant has a process of its own, ours with the huge pages that the `moresjax` command
asks for.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rounds import Run, Seconds, Worker, measure, median_ratio
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import moresjax as mj
from moresjax.data.samples import Sample, Turn
from moresjax.data.templates import get_template
from moresjax.evaluation.examples import Example
from moresjax.evaluation.files import llava_prompt
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import BenchmarkTask, benchmark

VOCAB, SIDE, PATCH, TEMPLATE = 4096, 112, 14, "vicuna_v1"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
VISION = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
TEXT = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
ALONE = "transformers, one by one"
QUESTIONS = (
    "Is the sky blue?",
    "What colour is the largest thing in the picture?",
    "How many people are there in front of the building on the left side of the street?",
    "What is the man next to the red car holding in his hand while he looks at the camera?",
)


def make_examples(folder: Path, count: int, per_image: int) -> list[Example]:
    """Questions about photos of noise, of different lengths and sizes."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        path = folder / f"{number // per_image}.jpg"
        if number % per_image == 0:
            coarse = rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)
            size = (320, 240) if number // per_image % 2 else (240, 280)
            Image.fromarray(coarse).resize(size).save(path)
        question = llava_prompt(QUESTIONS[number % len(QUESTIONS)])
        examples.append(Example(str(number), question, "", (path,)))
    return examples


def prompt_of(example: Example) -> str:
    """The text that the template makes of a question."""
    sample = Sample(example.id, (Turn(example.prompt),), example.images)
    return "".join(piece.text for piece in get_template(TEMPLATE).render(sample, ""))


def make_tokenizer(examples: list[Example]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, those of the prompts and others."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = dict.fromkeys(word for example in examples for word in prompt_of(example).split())
    others = (f"word{i}" for i in range(VOCAB))
    vocabulary = list(dict.fromkeys((*SPECIAL, *words, *others)))[:VOCAB]
    vocab = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def make_folder(folder: Path, examples: list[Example], small: bool) -> None:
    """A LLaVA with its processor, as `transformers` saves it."""
    tokenizer = make_tokenizer(examples)
    depth = 2 if small else 1
    llm = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=8 // depth**2, pad_token_id=0, **TEXT)
    tower = CLIPVisionConfig(
        num_hidden_layers=6 // depth, image_size=SIDE, patch_size=PATCH, **VISION
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=llm,
            vision_config=tower,
            image_token_index=SPECIAL.index("<image>"),
            vision_feature_select_strategy="default",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough for answers that differ
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def theirs(folder: str, examples: list[Example], new: int, batch_size: int) -> Run:
    """`transformers`, from files to texts."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)

    def run():
        answers = []
        for start in range(0, len(examples), batch_size):
            chosen = examples[start : start + batch_size]
            images = [Image.open(example.images[0]).convert("RGB") for example in chosen]
            texts = [prompt_of(example) for example in chosen]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
            ids = ids[:, inputs["input_ids"].shape[1] :]
            answers += processor.batch_decode(ids, skip_special_tokens=True)
        yield "run"
        return dict(zip((example.id for example in examples), answers, strict=True))

    return run


def ours(folder: str, examples: list[Example], new: int, batch_size: int) -> Run:
    """A benchmark like those of `moresjax evaluate`."""
    model = mj.load(folder, template=TEMPLATE)

    @benchmark("questions")
    def load(data_root=None, limit=None) -> list[BenchmarkTask]:
        return [BenchmarkTask("questions", examples, max_new_tokens=new)]

    def run():
        result = evaluate(model, ["questions"], batch_size=batch_size)
        yield "run"
        return {entry["id"]: entry["prediction"] for entry in result.predictions}

    return run


def print_table(seconds: Seconds, first: dict[str, float], sizes: list[int]) -> None:
    def median(name: str) -> str:
        return f"{statistics.median(seconds[name]['run']):.2f}"

    def ratio(name: str, ours: str) -> str:
        pair = {ours: seconds[ours], name: seconds[name]}
        return f"{median_ratio(pair, name, 'run'):.2f}"

    print(
        "| batch size | moresjax, s | transformers, s | ratio | one by one, s | ratio | first ",
        end="",
    )
    print("time, start and compilation too: moresjax, s | transformers, s |")
    print("|---:" * 8 + "|")
    for size in sizes:
        ours, theirs = f"moresjax {size}", f"transformers {size}"
        cells = [median(ours), median(theirs), ratio(theirs, ours), median(ALONE)]
        cells += [ratio(ALONE, ours), f"{first[ours]:.2f}", f"{first[theirs]:.2f}"]
        print(f"| {size} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--per-image", type=int, nargs="+", default=[1, 4], help="questions")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="few layers: does it run?")
    args = parser.parse_args()
    for per_image in args.per_image:
        compare(args, per_image)


def compare(args, per_image: int) -> None:
    """One table: as many questions about each image."""
    with tempfile.TemporaryDirectory() as path:
        examples = make_examples(Path(path), args.examples, per_image)
        make_folder(Path(path), examples, args.small)
        data = path, examples, args.new_tokens
        runs = {ALONE: Worker(theirs, *data, 1, huge_pages=False)}
        for size in args.batch_sizes:
            runs[f"moresjax {size}"] = Worker(ours, *data, size, huge_pages=True)
            runs[f"transformers {size}"] = Worker(theirs, *data, size, huge_pages=False)
        first, answers = {}, []
        for name, run in runs.items():
            start = time.perf_counter()
            list(run())
            first[name] = time.perf_counter() - start
            answers.append(run.value)
        if any(each != answers[0] for each in answers):
            raise SystemExit("the answers differ")
        seconds = measure(runs, args.rounds, warm=1)
        for run in runs.values():
            run.stop()
    about = f"{args.examples} questions, {per_image} about each image"
    print(f"{about}, {args.new_tokens} new tokens each, answers equal\n")
    print_table(seconds, first, args.batch_sizes)
    print()


if __name__ == "__main__":
    main()
