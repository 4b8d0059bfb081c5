"""The runs of LLaVA Steering: MoReS and its baselines on Phi-2 and Vicuna.

    config=llava_steering
    moresjax train --config $config:size=3b,stage=pretrain --workdir runs/pretrain-3b
    moresjax train --config $config:size=3b,tuning=mores-base --workdir runs/mores-3b
    moresjax train --config $config:stage=task,task=vizwiz,samples=5000 --workdir runs/vizwiz

Stages: `pretrain` (the connector on 558k captions), `finetune` (the 665k mix), `task` (ten epochs
of one task file). Sizes: `3b` (Phi-2 + SigLIP), `7b` and `13b` (Vicuna + CLIP). Folders of the LLM
and of the encoder are `init.llm` and `init.vision`, data is `data.files` and `data.image_root`;
`configs/README.md` lists every run.
"""

import dataclasses

from ml_collections import ConfigDict

from moresjax.core.errors import choice_error
from moresjax.models.zoo import ENCODERS, MODELS
from moresjax.runs.config import base_config, parse_arg

# The encoder's folder on the hub, and the LLM's.
FOLDERS = {
    "3b": ("siglip-so400m-patch14-384", "phi-2"),
    "7b": ("clip-vit-large-patch14-336", "vicuna-7b-v1.5"),
    "13b": ("clip-vit-large-patch14-336", "vicuna-13b-v1.5"),
}
TEMPLATES = {"3b": "phi", "7b": "vicuna_v1", "13b": "vicuna_v1"}
# Samples, rows per step and passes of each stage; a task's samples are an argument.
PRETRAIN, MIX, TASK = (558_128, 256, 1), (665_298, 128, 1), (0, 128, 10)
# Table 1's rows. Learning rates: connector pretraining, full fine-tuning, everything else.
METHODS = {
    "full": "full",
    "lora": "lora:rank=128,alpha=256,dropout=0.05",
    "adapter": "adapter:bottleneck=256",
    "oft": "oft-legacy:blocks=16",
    "ia3": "ia3",
    "mores-base": "mores-base:dropout=0.05",
    "mores-large": "mores-large:dropout=0.05",
    "mores-huge": "mores-huge:dropout=0.05",
}
LEARNING_RATES = {"pretrain": 1e-3, "full": 2e-5, "peft": 2e-4}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of one stage of a size."""
    args = parse_arg(
        arg,
        size="3b",
        stage="finetune",
        tuning="mores-base",
        task="scienceqa",
        samples=10_000,
        seed=42,
    )
    stages = {"pretrain": _pretrain, "finetune": _finetune, "task": _task}
    if args.stage not in stages:
        raise choice_error("stage", args.stage, stages)
    if args.size not in FOLDERS:
        raise choice_error("size", args.size, FOLDERS)
    llm, vision = MODELS[f"llava-steering-{args.size}"]
    vision_folder, llm_folder = FOLDERS[args.size]
    config = base_config()
    config.name = f"{args.size}-{args.stage}"
    config.seed = args.seed
    config.model.llm = llm
    config.dtype, config.remat = "bfloat16", True
    config.init.llm = f"checkpoints/{llm_folder}"
    config.init.vision = f"checkpoints/{vision_folder}"
    config.tokenizer = config.init.llm
    config.image_processor = config.init.vision
    config.template = TEMPLATES[args.size]
    config.mesh.data, config.mesh.fsdp = 1, -1
    # The authors drop the first token of SigLIP, which has no class token: 728 remain.
    encoder = ENCODERS[vision]
    fields = dataclasses.asdict(encoder) | {"drop_first_token": not encoder.class_token}
    config.model.vision = fields
    stages[args.stage](config, args)
    return config


def _steps(config: ConfigDict, samples: int, rows: int, passes: int) -> None:
    config.batch_size = rows
    config.steps = -(-samples * passes // rows)


def _pretrain(config: ConfigDict, args: ConfigDict) -> None:
    config.tuning = "none"
    config.template = "plain"
    config.max_seq_len = 1024
    config.data = {
        "name": "llava",
        "files": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_root": "data/LLaVA-Pretrain",
    }
    config.optimizer.lr = LEARNING_RATES["pretrain"]
    _steps(config, *PRETRAIN)


def _finetune(config: ConfigDict, args: ConfigDict) -> None:
    config.init.connector = f"../pretrain-{args.size}"
    _tune(config, args)
    config.data = {
        "name": "llava",
        "files": "data/LLaVA-Tuning/llava_v1_5_mix665k.json",
        "image_root": "data/LLaVA-Tuning",
    }
    _steps(config, *MIX)


def _task(config: ConfigDict, args: ConfigDict) -> None:
    """Starts from a model that is tuned on the mix already, as the authors do."""
    start = f"checkpoints/llava-steering-{args.size}"
    config.init.update({"llm": start, "vision": start, "connector": start})
    _tune(config, args)
    config.data = {
        "name": "llava",
        "files": f"data/tasks/{args.task}_{args.samples}.json",
        "image_root": "data/tasks",
    }
    _, rows, passes = TASK
    _steps(config, args.samples, rows, passes)


def _tune(config: ConfigDict, args: ConfigDict) -> None:
    config.tuning = METHODS.get(args.tuning, args.tuning)
    config.max_seq_len, config.images_per_row = 4096, 5
    config.batching, config.num_workers = "pack", 16
    config.optimizer.lr = LEARNING_RATES["full" if args.tuning == "full" else "peft"]
