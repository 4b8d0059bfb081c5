"""The fine-tunings behind representation shift: LoRA on LLaVA-1.5 towards colors, places, feelings.

    moresjax data build --task vg-color --root data/visual_genome --out data/shift/color.json
    moresjax train --config shift:task=color --workdir runs/shift-color

Tasks: `color`, `place` and `sentiment`, captions of regions of Visual Genome whose phrase has a
word of a list. All parts are those of `start`, a run or a folder: LLaVA-1.5-7B, or one of another
size or family. The paper chooses rank, learning rate and epochs for each task and prints none; the
defaults are a rank of 16, the learning rate of LLaVA-1.5's LoRA and one pass.
"""

from ml_collections import ConfigDict

from moresjax.core.errors import choice_error
from moresjax.runs.config import base_config, parse_arg

TASKS = "color", "place", "sentiment"
ROWS = 128  # samples per step


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of one task."""
    args = parse_arg(
        arg,
        task="color",
        rank=16,
        lr=2e-4,
        epochs=1,
        start="checkpoints/llava-1.5-7b-hf",
        template="vicuna_v1",
        seed=42,
    )
    if args.task not in TASKS:
        raise choice_error("task", args.task, TASKS)
    config = base_config()
    config.name = f"shift-{args.task}"
    config.seed = args.seed
    config.dtype, config.remat = "bfloat16", True
    config.tuning = f"lora:rank={args.rank}"
    config.also_train = ()
    config.optimizer.lr = args.lr
    config.max_seq_len = 1024
    config.batching, config.num_workers = "bucket", 16
    config.batch_size, config.epochs = ROWS, args.epochs
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.init.update(dict.fromkeys(("llm", "vision", "connector"), args.start))
    config.image_processor = args.start
    config.template, config.image_aspect = args.template, "pad"
    config.data = {
        "name": "llava",
        "files": f"data/shift/{args.task}.json",
        "image_root": "data/visual_genome",
    }
    return config
