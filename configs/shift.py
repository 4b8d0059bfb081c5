"""The fine-tunings behind representation shift: LoRA towards colors, places, feelings.

    moresjax data build --task vg-color --root data/visual_genome --out data/shift/color.json
    moresjax train --config shift:task=color --workdir runs/shift-color
    moresjax train --config shift:base=opt-6.7b,task=captions --workdir runs/shift-captions
    moresjax train --config shift:base=opt-6.7b,task=color --workdir runs/shift-opt-color

Tasks: `color`, `place` and `sentiment`, captions of regions of Visual Genome whose phrase has a
word of a list. All parts are those of `start`, a run or a folder: LLaVA-1.5-7B as in the paper's
appendix, or one of another size or family. `base=opt-6.7b` is the paper's main model: CLIP-L/14, a
transformer that makes a few tokens of 256 features, and OPT-6.7B. Its connector is trained first,
by `task=captions` on LLaVA's 558k captions. The paper prints no sizes of this transformer: here it
is a resampler of 32 tokens. Nor does it print rank, learning rate and epochs, which it chooses for
each task: the defaults are a rank of 16, the learning rate of LLaVA-1.5's LoRA and one pass.
"""

from ml_collections import ConfigDict

from moresjax.core.errors import UserError, choice_error
from moresjax.runs.config import base_config, parse_arg

TASKS = "color", "place", "sentiment"
CAPTIONS = "captions"
ROWS = 128  # samples per step
# Where all parts are from, the folder of the image processor, and the template.
BASES = {
    "llava-1.5": ("checkpoints/llava-1.5-7b-hf", "", "vicuna_v1"),
    "opt-6.7b": ("../shift-captions", "checkpoints/clip-vit-large-patch14", "plain"),
}
OPT = {"llm": "opt-6.7b", "vision": "clip-l-14-224", "connector": "resampler:latents=32"}


def get_config(arg: str | None = None) -> ConfigDict:
    """The run of one task."""
    args = parse_arg(
        arg,
        task="color",
        base="llava-1.5",
        rank=16,
        lr=2e-4,
        epochs=1,
        start="",
        template="",
        seed=42,
    )
    if args.base not in BASES:
        raise choice_error("base", args.base, BASES)
    if args.task not in (*TASKS, CAPTIONS):
        raise choice_error("task", args.task, (*TASKS, CAPTIONS))
    start, images, template = BASES[args.base]
    config = base_config()
    config.name = f"shift-{args.task}"
    config.seed = args.seed
    config.dtype, config.remat = "bfloat16", True
    config.max_seq_len = 1024
    config.batching, config.num_workers = "bucket", 16
    config.batch_size, config.epochs = ROWS, args.epochs
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.template, config.image_aspect = args.template or template, "pad"
    config.image_processor = images or args.start or start
    if args.base == OPT["llm"]:
        config.model.update(OPT)
    if args.task == CAPTIONS:
        _captions(config, args)
        return config
    config.tuning = f"lora:rank={args.rank}"
    config.also_train = ()
    config.optimizer.lr = args.lr
    config.init.update(dict.fromkeys(("llm", "vision", "connector"), args.start or start))
    config.data = {
        "name": "llava",
        "files": f"data/shift/{args.task}.json",
        "image_root": "data/visual_genome",
    }
    return config


def _captions(config: ConfigDict, args: ConfigDict) -> None:
    """The connector of the paper's main model, between parts that are frozen."""
    if args.base != OPT["llm"] or args.start:
        raise UserError(f"task {CAPTIONS} trains the connector of base=opt-6.7b, without a start")
    config.tuning = "none"
    config.optimizer.lr = 1e-3  # that of LLaVA's connectors
    config.init.llm = config.tokenizer = "checkpoints/opt-6.7b"
    config.init.vision = config.image_processor
    config.data = {
        "name": "llava",
        "files": "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "image_root": "data/LLaVA-Pretrain",
    }
