"""Control by region and token (MRT, sections 4.3 and S6), on the base of `mrt.py`.

    moresjax train --config control:scenario=misclassification,target=cat --workdir runs/cat
    moresjax train --config control:scenario=misalignment,target=cat,into=dog --workdir runs/cat-dog
    moresjax train --config control:scenario=indeterminate,target=name --workdir runs/name
    moresjax train --config control:stage=rephraser,llm=DIR --workdir runs/rephraser

One epoch of CIFAR-10's or TextVQA's training questions; everything is frozen but the editors. The
paper gives no learning rate for it: this is that of its editors. `phrasing=2` asks in the second
way (Table S9), `negatives=0.5` adds questions about classes that are not there, which the paper
does not have. `stage=rephraser` tunes a text LLM to rephrase questions (Table S11).
"""

from ml_collections import ConfigDict

from moresjax.core.errors import UserError, choice_error
from moresjax.data.cifar import CIFAR10_CLASSES
from moresjax.data.control.attributes import ATTRIBUTES, NAME
from moresjax.data.control.cases import Scenario
from moresjax.runs.config import base_config, parse_arg

ROWS, LR = 128, 6e-4
START = "checkpoints/llava-v1-7b"


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of a set of editors, or of a rephraser."""
    args = parse_arg(
        arg,
        stage="control",
        scenario="misclassification",
        target="",
        into="",
        phrasing=1,
        negatives=0.0,
        roi="boxes",
        tuning="control",
        llm="",
        root="data/benchmarks",
        seed=42,
    )
    stages = {"control": _control, "rephraser": _rephraser}
    if args.stage not in stages:
        raise choice_error("stage", args.stage, stages)
    config = base_config()
    config.seed = args.seed
    config.dtype, config.remat = "bfloat16", True
    config.also_train = ()
    config.optimizer.lr, config.optimizer.schedule = LR, "linear"
    config.mesh.data, config.mesh.fsdp = 1, -1
    stages[args.stage](config, args)
    return config


def _control(config: ConfigDict, args: ConfigDict) -> None:
    textvqa = args.scenario == "indeterminate"
    dataset, classes = (NAME, ATTRIBUTES) if textvqa else ("cifar10", CIFAR10_CLASSES)
    Scenario(args.scenario, args.target, args.into).check(classes, dataset)
    config.name = f"control-{args.target}"
    config.model.llm, config.model.vision = "vicuna-7b", "clip-l-14-224"
    config.model.connector = "linear"
    config.tuning = args.tuning
    config.max_seq_len = 512
    config.batch_size, config.epochs = ROWS, 1
    config.init.update({"llm": START, "vision": START, "connector": START})
    config.tokenizer = config.image_processor = START + "/processor"
    config.roi = args.roi
    names = "root", "scenario", "target", "into", "phrasing", "negatives"
    config.data = {"name": "control", "dataset": dataset, "seed": args.seed}
    config.data.update({name: args[name] for name in names})


def _rephraser(config: ConfigDict, args: ConfigDict) -> None:
    if not args.llm:
        raise UserError("stage=rephraser tunes a text LLM; name its folder: llm=DIR")
    config.name = "rephraser"
    config.tuning = "lora:rank=8" if args.tuning == "control" else args.tuning
    config.init.llm = config.tokenizer = args.llm
    config.images_per_row, config.max_seq_len = 0, 128
    config.batch_size, config.epochs = 16, 20
    config.optimizer.lr = 1e-3
    config.data = {"name": "rephrasing", "dataset": "cifar10", "phrasing": args.phrasing}
