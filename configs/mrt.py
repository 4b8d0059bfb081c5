"""MRT on LLaVA v1 (Vicuna-7B v1.3, CLIP-L/14-224, linear connector), trained on Vision-Flan.

    moresjax train --config mrt:tuning=mrt-paper --workdir runs/mrt
    moresjax train --config mrt:base=minigpt-v2 --workdir runs/mrt-minigpt

Everything is frozen but the editors; the connector trains with the baselines, as the paper says of
them. `moresjax recipes mrt` lists the rows of the paper's tables.
"""

from ml_collections import ConfigDict

from moresjax.core.errors import choice_error
from moresjax.models.zoo import MODELS
from moresjax.runs.config import base_config, parse_arg
from moresjax.runs.run_config import DEFAULT_TEMPLATE
from moresjax.tuning.base import Edit, VirtualTokens
from moresjax.tuning.spec import parse_spec, with_defaults

# Samples per step, and passes over the 191,105 samples.
ROWS, PASSES = 128, 3
# LLM, encoder, connector and template of what the tables tune, which is imported to `checkpoints`.
BASES = {
    "llava-v1-7b": ("vicuna-7b", "clip-l-14-224", "linear", DEFAULT_TEMPLATE),
    "minigpt-v2": (*MODELS["minigpt-v2"], "minigpt_v2"),
}
# What the tables' methods have where a spec does not say otherwise.
METHODS = {"lora": {"rank": 16}, "reft": {"region": "question"}}
# Learning rate, schedule and what trains beside the tuning, by the kind of method: full tuning,
# prompts (M2PT's), weight deltas (the LoRA of MixLoRA's authors), and editors, which train alone.
FULL = 2e-5, "cosine", ("connector", "vision")
PROMPTS = 7e-4, "cosine", ("connector",)
WEIGHTS = 4e-5, "cosine", ("connector",)
EDITORS = 6e-4, "linear", ()


def kind_of(tuning: str) -> tuple[float, str, tuple[str, ...]]:
    """The settings of a spec's kind of method."""
    methods = parse_spec(tuning)
    if any("llm" in method.trains for method in methods):
        return FULL
    if any(isinstance(method, VirtualTokens) for method in methods):
        return PROMPTS
    return EDITORS if all(isinstance(method, Edit) for method in methods) else WEIGHTS


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of MRT or of a baseline."""
    args = parse_arg(arg, tuning="mrt-paper", base="llava-v1-7b", seed=42)
    if args.base not in BASES:
        raise choice_error("base", args.base, BASES)
    config = base_config()
    config.name = f"mrt-{args.tuning.partition(':')[0]}"
    config.seed = args.seed
    llm, vision, config.model.connector, config.template = BASES[args.base]
    config.model.llm = llm
    config.dtype, config.remat = "bfloat16", True
    config.tuning = with_defaults(args.tuning, METHODS)
    lr, config.optimizer.schedule, config.also_train = kind_of(config.tuning)
    config.optimizer.lr = lr
    config.max_seq_len = 1024
    config.batch_size, config.epochs = ROWS, PASSES
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.model.vision = vision
    start = f"checkpoints/{args.base}"
    config.init.update({"llm": start, "vision": start, "connector": start})
    config.tokenizer = start + "/processor"
    if args.base == "llava-v1-7b":  # MiniGPT-v2's squares are made without a saved processor
        config.image_processor = config.tokenizer
    config.data = {
        "name": "llava",
        "files": "data/vision-flan/annotation_191-task_1k.json",
        "image_root": "data/vision-flan/images_191task_1k",
    }
    return config
