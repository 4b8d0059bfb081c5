"""A small multimodal LLM, every part of it from a folder of one's own files (CPU, minutes).

    moresjax train --config scratch:stage=llm,data=mine --workdir runs/llm
    moresjax train --config scratch:stage=vision,data=mine --workdir runs/vision
    moresjax train --config scratch:stage=connector,data=mine --workdir runs/connector
    moresjax train --config scratch:stage=tune,data=mine,tuning=lora:rank=8 --workdir runs/lora

Later stages look for the runs of earlier ones beside their own, under the stage's name; other runs
are named by `--config.init.llm` and so on. The folder `data` holds, with image paths that start
from it, all but the first in LLaVA's format:

| name | what is in it | stage |
|---|---|---|
| `tokenizer/` | a tokenizer, such as `moresjax data tokenizer` makes | all |
| `text.json` | conversations without images | `llm` |
| `captions.json` | images, each with a caption as its answer | `vision`, `connector` |
| `train.json` | questions and answers about images, each asked by itself | `tune` |
| `validation.json` | the same, only measured; may be missing | `tune` |
"""

from pathlib import Path

from ml_collections import ConfigDict

from moresjax.core.errors import UserError, choice_error
from moresjax.runs.config import base_config, parse_arg
from moresjax.runs.processor import load_tokenizer

# No markers around questions and answers: short rows. `plain` leaves questions out.
TEMPLATE, CAPTIONS = "bare", "plain"
# Tokens of a row, 16 of which are the image's; `moresjax data check` says what is too long.
LENGTH, CAPTION_LENGTH = 64, 32

LLM = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_layers": 3,
    "num_heads": 6,
    "rope_theta": 100.0,  # rows are short: more of the frequencies tell neighbours apart
    "unroll": True,
}
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 3,
    "num_heads": 4,
    "activation": "gelu_tanh",
    "feature_layer": -1,  # all blocks; LLaVA leaves the last one of a downloaded encoder out
    "unroll": True,
}
# Of the last stage, by method; the connector has its own.
LEARNING_RATES = {"none": 8e-3, "mores": 3e-2, "ia3": 1e-1, "full": 3e-3}
OTHER_LR, CONNECTOR_LR = 1e-2, 8e-3


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of one stage."""
    args = parse_arg(
        arg, stage="tune", data="mine", tuning="mores:rank=4,positions=image,init=identity", seed=0
    )
    stages = {"llm": _llm, "vision": _vision, "connector": _connector, "tune": _tune}
    if args.stage not in stages:
        raise choice_error("stage", args.stage, stages)
    folder = Path(args.data)
    if not (folder / "tokenizer").is_dir():
        raise UserError(
            f"{folder / 'tokenizer'} does not exist; make it with: moresjax data tokenizer "
            f"--files {folder / 'text.json'} --vocab-size 512 --out {folder / 'tokenizer'}"
        )
    config = base_config()
    config.name = args.stage
    config.seed = args.seed
    config.tokenizer = str(folder / "tokenizer")
    config.model.llm = {"vocab_size": len(load_tokenizer(config.tokenizer)), **LLM}
    config.model.vision = VISION
    config.batch_size, config.max_seq_len = 32, LENGTH
    config.optimizer.b2 = 0.98
    config.optimizer.warmup = config.optimizer.end = 0.05
    stages[args.stage](config, args)
    return config


def _files(args: ConfigDict, name: str, **options: str) -> dict[str, str]:
    """The samples of a file."""
    path = Path(args.data, name)
    return {"name": "llava", "files": str(path), "image_root": args.data, **options}


def _llm(config: ConfigDict, args: ConfigDict) -> None:
    config.model.vision = ""
    config.template = TEMPLATE
    config.tuning, config.also_train = "full", ()
    config.data = _files(args, "text.json")
    config.images_per_row = 0
    config.steps = 400
    config.optimizer.lr, config.optimizer.weight_decay = 3e-3, 0.1


def _vision(config: ConfigDict, args: ConfigDict) -> None:
    config.objective = "siglip"
    config.also_train = ("vision", "llm", "vision_head", "text_head", "log_temperature", "bias")
    config.template = CAPTIONS
    config.data = _files(args, "captions.json")
    config.batch_size, config.max_seq_len, config.steps = 64, CAPTION_LENGTH, 800
    config.optimizer.lr = 2e-3


def _connector(config: ConfigDict, args: ConfigDict) -> None:
    config.init.update({"llm": "../llm", "vision": "../vision"})
    config.template = CAPTIONS
    config.data = _files(args, "captions.json")
    config.max_seq_len, config.steps = CAPTION_LENGTH, 300
    config.optimizer.lr = 2e-3


def _tune(config: ConfigDict, args: ConfigDict) -> None:
    config.init.update({"llm": "../llm", "vision": "../vision", "connector": "../connector"})
    config.template = TEMPLATE
    config.tuning = args.tuning
    config.data = _files(args, "train.json", turns="independent")
    if Path(args.data, "validation.json").is_file():
        config.validation.data = _files(args, "validation.json", turns="independent")
        config.validation.every = 100
    config.steps = 300
    config.optimizer.lr = LEARNING_RATES.get(args.tuning.split(":")[0], OTHER_LR)
    config.optimizer.lr_by_component = f"connector={CONNECTOR_LR}"
