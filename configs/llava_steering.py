"""The runs of LLaVA Steering: MoReS and its baselines on Phi-2 and Vicuna.

    config=llava_steering
    moresjax train --config $config:size=3b,stage=pretrain --workdir runs/pretrain-3b
    moresjax train --config $config:size=3b,tuning=mores-base --workdir runs/mores-3b
    moresjax train --config $config:stage=task,task=vizwiz,samples=5000 --workdir runs/vizwiz

Stages: `pretrain` (the connector on 558k captions), `finetune` (the 665k mix), `task` (ten epochs
of one task file, from the run or folder `start`). Sizes: `3b` (Phi-2 + SigLIP), `7b` and `13b`
(Vicuna + CLIP). Folders of the LLM and of the encoder are `init.llm` and `init.vision`, data is
`data.files` and `data.image_root`; `configs/README.md` lists every run.
"""

from ml_collections import ConfigDict

from moresjax.core.errors import choice_error
from moresjax.data.task_names import check_task
from moresjax.models.zoo import MODELS
from moresjax.runs.config import base_config, parse_arg
from moresjax.tuning.spec import parse_spec, with_defaults

# The encoder's folder on the hub, and the LLM's.
FOLDERS = {
    "3b": ("siglip-so400m-patch14-384", "phi-2"),
    "7b": ("clip-vit-large-patch14-336", "vicuna-7b-v1.5"),
    "13b": ("clip-vit-large-patch14-336", "vicuna-13b-v1.5"),
}
TEMPLATES = {"3b": "phi", "7b": "vicuna_v1", "13b": "vicuna_v1"}
# Samples per step and passes over the file of each stage; a row has one sample.
PRETRAIN, MIX, TASK = (256, 1), (128, 1), (128, 10)
# Lengths of rows; the mix has about 900 tokens per sample with an image.
BUCKETS = (512, 768, 1024, 1280, 1536, 2048, 4096)
# What the authors give these methods where a spec does not say otherwise; their OFT is the first.
METHODS = {"mores": {"dropout": 0.05}, "mores2": {"dropout": 0.05}}
METHODS |= {"lora": {"rank": 128, "dropout": 0.05}}
ALIASES = {"oft": "oft-legacy"}
# Connector pretraining, full fine-tuning, everything else.
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
        start="",
        seed=42,
    )
    stages = {"pretrain": _pretrain, "finetune": _finetune, "task": _task}
    if args.stage not in stages:
        raise choice_error("stage", args.stage, stages)
    if args.size not in FOLDERS:
        raise choice_error("size", args.size, FOLDERS)
    llm, vision, _ = MODELS[f"llava-steering-{args.size}"]
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
    config.model.vision = vision
    stages[args.stage](config, args)
    return config


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
    config.batch_size, config.epochs = PRETRAIN


def _finetune(config: ConfigDict, args: ConfigDict) -> None:
    config.init.connector = f"../pretrain-{args.size}"
    _tune(config, args)
    config.data = {
        "name": "llava",
        "files": "data/LLaVA-Tuning/llava_v1_5_mix665k.json",
        "image_root": "data/LLaVA-Tuning",
    }
    config.batch_size, config.epochs = MIX


def _task(config: ConfigDict, args: ConfigDict) -> None:
    """Starts from a model that is tuned on the mix already, as the authors do."""
    start = args.start or f"checkpoints/llava-steering-{args.size}"
    config.init.update({"llm": start, "vision": start, "connector": start})
    _tune(config, args)
    config.data = {
        "name": "llava",
        "files": f"data/tasks/{check_task(args.task)}_{args.samples}.json",
        "image_root": "data/tasks",
    }
    config.batch_size, config.epochs = TASK


def _tune(config: ConfigDict, args: ConfigDict) -> None:
    config.tuning = with_defaults(ALIASES.get(args.tuning, args.tuning), METHODS)
    config.max_seq_len, config.buckets = BUCKETS[-1], BUCKETS
    config.batching, config.num_workers = "bucket", 16
    methods = parse_spec(config.tuning)
    full = any("llm" in method.trains for method in methods)
    config.optimizer.lr = LEARNING_RATES["full" if full else "peft"]
    if full and len(methods) > 1:  # what is attached learns at its own rate
        config.optimizer.lr_by_component = f"tuning={LEARNING_RATES['peft']}"
