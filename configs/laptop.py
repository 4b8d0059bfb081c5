"""One's own data with an LLM and a vision encoder that exist: folders of Hugging Face on disk.

    moresjax train --config laptop:stage=connector,llm=DIR,vision=DIR --workdir runs/connector
    moresjax train --config laptop:stage=tune,llm=DIR,vision=DIR --workdir runs/mores

Architecture, tokenizer, conversation template and image processor are those of the folders, such
as SmolLM2-135M, Qwen3-0.6B and siglip-base-patch16-224. The folder `data` is that of `scratch`,
without `tokenizer` and `text.json`. The connector is the one new part; the last stage looks for the
run that made it beside its own.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from moresjax.core.errors import UserError, choice_error
from moresjax.data.templates import OWN, get_template
from moresjax.runs.config import base_config, parse_arg
from moresjax.runs.processor import load_tokenizer
from moresjax.tuning.spec import parse_spec
from moresjax.weights.hf import HFFolder
from moresjax.weights.vision_folder import load_vision_config

# LLaVA's: of the connector, of methods that train the LLM itself, and of all others.
CONNECTOR_LR, FULL_LR, LR = 1e-3, 2e-5, 2e-4


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of one stage."""
    args = parse_arg(
        arg,
        stage="tune",
        llm="",
        vision="",
        data="mine",
        tuning="mores:rank=1",
        template="",
        seed=0,
    )
    stages = {"connector": _connector, "tune": _tune}
    if args.stage not in stages:
        raise choice_error("stage", args.stage, stages)
    for part, example in (("llm", "SmolLM2-135M"), ("vision", "siglip-base-patch16-224")):
        if not Path(args[part], "config.json").is_file():
            raise UserError(
                f"config argument {part} must be a folder of Hugging Face, such as {example}, got "
                f"{args[part]!r}"
            )
    config = base_config()
    config.name = args.stage
    config.seed = args.seed
    config.model.llm = dataclasses.asdict(HFFolder(args.llm).config.llm)
    config.model.vision = dataclasses.asdict(load_vision_config(HFFolder(args.vision)))
    config.init.update({"llm": args.llm, "vision": args.vision})
    config.tokenizer, config.image_processor = args.llm, args.vision
    config.remat = True
    config.batching = "bucket"
    config.batch_size, config.max_seq_len, config.epochs = 16, 1024, 1
    stages[args.stage](config, args)
    return config


def _files(args: ConfigDict, name: str) -> dict[str, str]:
    """The samples of a file."""
    return {"name": "llava", "files": str(Path(args.data, name)), "image_root": args.data}


def _connector(config: ConfigDict, args: ConfigDict) -> None:
    config.template = "plain"
    config.data = _files(args, "captions.json")
    config.optimizer.lr = CONNECTOR_LR


def _tune(config: ConfigDict, args: ConfigDict) -> None:
    config.init.connector = "../connector"
    config.template = args.template or _template(args.llm)
    config.tuning = args.tuning
    config.data = _files(args, "train.json")
    if Path(args.data, "validation.json").is_file():
        config.validation.data = _files(args, "validation.json")
    full = any("llm" in method.trains for method in parse_spec(args.tuning))
    config.optimizer.lr = FULL_LR if full else LR


def _template(llm: str) -> str:
    """The tokenizer's own chat template if it can be used, else one that its tokens allow."""
    tokenizer = load_tokenizer(llm)
    try:
        get_template(OWN, tokenizer)
    except UserError:
        return "chatml" if "<|im_start|>" in tokenizer.get_vocab() else "vicuna_v1"
    return OWN
