"""MRT on LLaVA v1 (Vicuna-7B v1.3, CLIP-L/14-224, linear connector), trained on Vision-Flan.

    moresjax train --config mrt:tuning=mrt-paper --workdir runs/mrt

Everything is frozen but the editors. `configs/README.md` lists the rows of the paper's tables.
"""

from ml_collections import ConfigDict

from moresjax.runs.config import base_config, parse_arg

SAMPLES, ROWS, PASSES = 191_105, 128, 3
# Table 1's baselines that are defined well enough to be repeated; their connector trains.
METHODS = {
    "lora": "lora:rank=16,alpha=32",
    "reft": "reft:rank=4",
    "full": "full",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of MRT or of a baseline."""
    args = parse_arg(arg, tuning="mrt-paper", seed=42)
    config = base_config()
    config.name = f"mrt-{args.tuning.partition(':')[0]}"
    config.seed = args.seed
    config.model.llm = "vicuna-7b"
    config.model.connector = "linear"
    config.dtype, config.remat = "bfloat16", True
    config.tuning = METHODS.get(args.tuning, args.tuning)
    config.also_train = ("connector",) if args.tuning in ("lora", "full") else ()
    config.max_seq_len = 1024
    config.batch_size = ROWS
    config.steps = -(-SAMPLES * PASSES // ROWS)
    config.optimizer.lr = {"lora": 4e-5, "full": 2e-5}.get(args.tuning, 6e-4)
    config.optimizer.schedule = "cosine" if args.tuning in ("lora", "full") else "linear"
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.model.vision = "clip-l-14-224"
    start = "checkpoints/llava-v1-7b"
    config.init.update({"llm": start, "vision": start, "connector": start})
    config.tokenizer = config.image_processor = start + "/processor"
    config.data = {
        "name": "llava",
        "files": "data/vision-flan/annotation_191-task_1k.json",
        "image_root": "data/vision-flan/images_191task_1k",
    }
    return config
