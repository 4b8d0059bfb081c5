"""Records what must not change when code only moves, and compares two recordings.

    python benchmarks/same_bits.py record DIR [SECTION ...]   # of the code that Python imports
    python benchmarks/same_bits.py compare OLD NEW            # every difference; exit code 1

Sections: `demo` (the results of `moresjax demo --fast`), `methods` (losses and gradient norms of 60
steps of stage 2 with every method), `llava` (logits and greedy tokens of tiny LLaVAs), `counts`
(parameters of named models under every method) and `plan` (a train step compiled for a TPU slice).
Everything goes through the command line or `moresjax.load`, so that the same script runs with the
code before and after. Record both on one machine: XLA's code depends on the processor.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np

METHODS = """
none full partial ln mores:rank=1 mores:rank=4,init=identity mores2:rank=2 loreft:rank=2
noreft:rank=2 direft:rank=2 nodireft:rank=2 consreft:rank=2 lobireft:rank=2 mrt:rank=2 red
houlsby:bottleneck=4 adapter:bottleneck=4 steer lora:rank=4 dora:rank=4 ia3 oft:block_size=4
oft-legacy boft vera:rank=4 mixlora prompt:length=4 prefix:length=4 ptum vpt m2pt aprompt
mores:rank=1/lora:rank=2
"""
MODELS = [
    ("vicuna-7b", "clip-l-14-336"),
    ("vicuna-13b", "clip-l-14-336"),
    ("phi-2", "siglip-so400m-14-384"),
    ("tinyllama-1.1b", "clip-l-14-336"),
]
COUNTED = [
    "none",
    "full",
    "mores:rank=1",
    "mores-large",
    "lora:rank=128",
    "dora:rank=8",
    "ia3",
    "vera:rank=4",
    "ln",
]
# Settings of a plan by the names that version 0.1 gave them.
SETTINGS = {"max_seq_len": "length", "images_per_row": "images"}
SECONDS = ("stages", "seconds", "second", "memory", "per_s", "rate", "elapsed", "time")


def run(*arguments: str) -> dict:
    """What a command prints with `--json`; a refusal is a result too."""
    from moresjax.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments), "--json"])
    if code:
        return {"exit": code, "error": err.getvalue().strip()}
    return json.loads(out.getvalue().splitlines()[-1])


def config_file() -> Path:
    import moresjax

    return Path(moresjax.__file__).parents[1] / "configs" / "digits.py"


def without_times(value: object) -> object:
    """The same tree without measurements of time and memory."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(s in k for s in SECONDS)}
        return {k: without_times(v) for k, v in kept.items()}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def demo(out: Path) -> dict:
    return without_times(run("demo", "--fast", "--out", out / "demo"))


def methods(out: Path) -> dict:
    """Loss and gradient norm of every step."""
    if not (out / "demo" / "seed0" / "pretrain").is_dir():
        demo(out)
    found = {}
    for spec in METHODS.split():
        workdir = out / "methods" / "".join(c if c.isalnum() else "-" for c in spec)
        sources = {"llm": "llm", "vision": "vit", "connector": "pretrain"}
        init = [
            f"--config.init.{p}={(out / 'demo' / 'seed0' / s).resolve()}"
            for p, s in sources.items()
        ]
        short = [f"--config.{k}" for k in ("steps=60", "log_every=1", "tensorboard=False")]
        config = f"{config_file()}:stage=finetune,tuning={spec}"
        result = run("train", "--config", config, "--workdir", workdir, *init, *short)
        if "error" in result:
            found[spec] = result["error"].replace(str(out), "")
            continue
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        names = ("loss", "grad_norm")
        found[spec] = [[line[n] for n in names] for line in lines if all(n in line for n in names)]
    return found


def llava(out: Path) -> dict:
    """SHA-256 of logits, greedy tokens and log-probabilities."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PhiConfig,
    )

    import moresjax

    text = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    found = {}
    for name, llm in (("llama", LlamaConfig(**text)), ("phi", PhiConfig(**text, pad_token_id=5))):
        folder = out / "llava" / name
        if not folder.is_dir():
            torch.manual_seed(0)
            config = LlavaConfig(
                text_config=llm, vision_config=CLIPVisionConfig(**tower), image_token_index=60
            )
            LlavaForConditionalGeneration(config).save_pretrained(folder)
        rng = np.random.default_rng(0)
        ids = rng.integers(1, 60, (3, 12))
        ids[:2, 3:7] = 60
        pixels = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
        inputs = {"input_ids": ids, "pixel_values": pixels, "image_token_id": 60}
        for tuning in ("none", "mores:rank=2,positions=image", "lora:rank=2"):
            model = moresjax.load(folder, tuning=tuning)
            logits = np.asarray(model.logits(**inputs))
            digest = hashlib.sha256(logits.tobytes()).hexdigest()
            found[f"{name} {tuning}"] = [digest, logits.argmax(-1).tolist()]
    if not (out / "demo" / "seed0" / "pretrain").is_dir():
        demo(out)
    model = moresjax.load(out / "demo" / "seed0" / "pretrain", template="bare")
    prompts = ["what is at top-left ?", "how many digits ?", "what is the sum ?"]
    image = (np.arange(32 * 32 * 3).reshape(32, 32, 3) % 251).astype(np.uint8)
    images = [[image], [image], [image]]
    found["greedy"] = model.generate(prompts, images, max_new_tokens=8)
    found["beams"] = model.generate(prompts, images, max_new_tokens=8, num_beams=3)
    scores = model.score(prompts, [["1", "2"]] * 3, images)
    found["scores"] = [[float(s.logprob) for s in own] for own in scores]
    return found


def counts(out: Path) -> dict:
    found = {"zoo": run("zoo")}
    for llm, vision in MODELS:
        for tuning in COUNTED:
            arguments = ("--llm", llm, "--vision", vision, "--tuning", tuning)
            found[f"{llm} {vision} {tuning}"] = run("params", *arguments)
    return found


def plan(out: Path) -> dict:
    config = f"{config_file()}:stage=finetune,tuning=mores:rank=1"
    init = [f"--config.init.{part}=random" for part in ("llm", "vision", "connector")]
    found = run("plan", "--config", config, "--topology", "v5e:2x2", "--quick", *init)
    for each in found["plans"]:
        each["setting"] = {SETTINGS.get(k, k): v for k, v in each["setting"].items()}
    return found


SECTIONS = {f.__name__: f for f in (demo, methods, llava, counts, plan)}


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Every leaf that is not the same, as `path: old != new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}/{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}/{i}")]
    same = old == new or (old != old and new != new)  # NaN
    return [] if same else [f"{path}: {old!r:.120} != {new!r:.120}"]


def leaves(value: object) -> int:
    if isinstance(value, dict | list):
        return sum(map(leaves, value.values() if isinstance(value, dict) else value))
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("arguments", nargs="+")
    args = parser.parse_args()
    if args.action == "record":
        out, *names = args.arguments
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        for name in names or SECTIONS:
            (out / f"{name}.json").write_text(json.dumps(SECTIONS[name](out), indent=1) + "\n")
            print(f"recorded {name}")
        return 0
    old, new = map(Path, args.arguments)
    bad = 0
    for name in SECTIONS:
        pair = [json.loads((folder / f"{name}.json").read_text()) for folder in (old, new)]
        found = differences(*pair)
        bad += len(found)
        print(f"{name}: {leaves(pair[0])} values, {len(found)} differ", *found[:20], sep="\n  ")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
