"""Copy this file to start an experiment of your own: every line says what it is for.

moresjax train --config configs/forkme.py:tuning=mores:rank=2 --workdir runs/mine
"""

from ml_collections import ConfigDict

from moresjax.runs.config import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """The run; `arg` is what stands after the colon."""
    # Arguments after the colon, with their defaults and types.
    args = parse_arg(arg, tuning="mores:rank=1", lr=2e-4, seed=0)

    # Every key there is, with its default (`RunConfig` explains them); a misspelt key is an error.
    config = base_config()
    config.name = "mine"
    config.seed = args.seed

    # Where the weights come from: `moresjax import` of a LLaVA, and its tokenizer and images.
    config.init.update({"llm": "checkpoints/llava", "vision": "checkpoints/llava"})
    config.init.connector = "checkpoints/llava"
    config.tokenizer = config.image_processor = "checkpoints/llava/processor"
    config.template = "vicuna_v1"

    # The same architecture by name; `moresjax zoo` lists them.
    config.model.llm = "vicuna-7b"
    config.model.vision = "clip-l-14-336"
    config.dtype, config.remat = "bfloat16", True

    # The samples: a source by name, with its options.
    config.data = {"name": "llava", "files": "data/mine.json", "image_root": "data"}

    # What trains: a tuning spec, and base parameters beside it.
    config.tuning = args.tuning
    config.also_train = ("connector",)
    config.optimizer.lr = args.lr

    # How much: rows per step, tokens per row, and passes over the samples (or `samples`, `steps`).
    config.batch_size, config.max_seq_len, config.epochs = 128, 2048, 1

    # Over which devices: data x fsdp x tensor, -1 for all that are left.
    config.mesh.data, config.mesh.fsdp = 1, -1

    return config
