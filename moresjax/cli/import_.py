"""`moresjax import`: a Hugging Face folder becomes a workdir."""

import argparse
from pathlib import Path

from moresjax.cli.options import Commands, add_command, show


def add_parser(commands: Commands) -> None:
    """Adds the subcommand."""
    command = add_command(commands, "import", run, "turn a Hugging Face folder into a workdir")
    command.add_argument(
        "source", metavar="SRC", help="folder of a LLaVA or of an LLM, or a .pth of xl-vlms"
    )
    command.add_argument("out", metavar="OUT", help="the new folder")
    command.add_argument(
        "--vision", default="", metavar="DIR[;DIR]", help="one or two vision encoders for an LLM"
    )
    command.add_argument(
        "--fusion",
        default="interleave",
        metavar="KIND",
        help="how features of two encoders are joined (default: %(default)s)",
    )
    command.add_argument(
        "--connector",
        default="",
        metavar="NAME",
        help="a new connector for an LLM with --vision (default: that of --projector, else "
        "mlp2x_gelu)",
    )
    command.add_argument(
        "--projector",
        default="",
        metavar="FILE",
        help="the connector's weights, such as mm_projector.bin of LLaVA's first stage",
    )
    command.add_argument(
        "--drop-first-token",
        action="store_true",
        help="leave out the first token of an encoder without class token, as LLaVA Steering does",
    )
    command.add_argument(
        "--image-processor", metavar="DIR", help="folder with preprocessor_config.json"
    )
    command.add_argument(
        "--template",
        metavar="NAME",
        help="conversation template; default: the one that export noted, else vicuna_v1",
    )
    command.add_argument(
        "--quantize", default="", metavar="int8", help="store the frozen weights in 8 bits"
    )
    command.add_argument(
        "--minigpt",
        default="",
        metavar="FILE",
        help="MiniGPT-v2's checkpoint, over LLaMA-2-chat (SRC) and eva_vit_g.pth (--vision)",
    )
    command.add_argument(
        "--keep-lora", action="store_true", help="keep the LoRA of --minigpt apart from the LLM"
    )
    command.add_argument("--site", default="", metavar="SITE", help="site of xl-vlms's states")
    command.add_argument("--layer", type=int, metavar="L", help="layer of xl-vlms's states")
    command.add_argument("--allow-pickle", action="store_true", help="read *.bin and *.pth too")


def run(args: argparse.Namespace) -> None:
    """Imports and counts the parameters; of a file of xl-vlms, says what it holds."""
    if Path(args.source).suffix == ".pth":
        from moresjax.analysis.xl_vlms import import_xl_vlms

        where = {"site": args.site, "layer": args.layer, "allow_pickle": args.allow_pickle}
        facts = import_xl_vlms(args.source, args.out, **where)
        show(args, facts, f"{args.out}: {facts['kind']}")
        return
    from moresjax.inference.convert import import_model
    from moresjax.models.count import count_parameters

    options = {
        key: getattr(args, key)
        for key in (
            "vision",
            "fusion",
            "connector",
            "projector",
            "drop_first_token",
            "template",
            "quantize",
            "minigpt",
            "keep_lora",
            "allow_pickle",
        )
    }
    model = import_model(args.source, args.out, image_processor=args.image_processor, **options)
    total = count_parameters(model.config, also_train=()).total
    data = {"out": args.out, "parameters": total, "model": model.config.to_dict()}
    show(args, data, f"{args.out}: {total:,d} parameters")
