"""Edits beside a folder of `transformers`, which acts on them through forward hooks.

`edits/edits.safetensors` has the parameters of every edit in the layers that it acts in, ready for
use (an orthonormal `rotate`); `edits/edits.json` says at which modules, in which arithmetic and at
which tokens they act, and has the spec string from which they are read here. They are in a folder
of their own because many readers take every `*.safetensors` beside a `config.json` for weights.
`load_edits.py` is `moresjax/weights/load_edits.py`: plain torch, for those who load the folder
there.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from moresjax.core.errors import UserError
from moresjax.core.folders import replace_file
from moresjax.core.json_files import write_json
from moresjax.core.reading import read_json
from moresjax.models.block import BlockConfig
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig
from moresjax.tuning.attach import Tuning
from moresjax.tuning.base import Edit, Method
from moresjax.tuning.low_rank import LowRankEdit
from moresjax.tuning.methods.houlsby import Houlsby
from moresjax.tuning.methods.mores import MoReS
from moresjax.tuning.methods.red import RED
from moresjax.tuning.methods.reft import FAMILY
from moresjax.tuning.methods.steer import Steer
from moresjax.tuning.selectors import Selector, parse_selector
from moresjax.tuning.spec import format_spec
from moresjax.weights.acting_layers import entries_of_layers
from moresjax.weights.adapter_files import EditsDescription, load_tensors
from moresjax.weights.families.base import HFConfig, llm_family, vision_family

DESCRIPTION, TENSORS, LOADER = "edits/edits.json", "edits/edits.safetensors", "load_edits.py"
FORMAT = "moresjax-edits"
# How the loader computes each method; a method of a plug-in is none of these.
ARITHMETIC: dict[type[Method], str] = {
    **dict.fromkeys((MoReS, *FAMILY.values()), "low_rank"),
    RED: "scale",
    Steer: "constant",
    Houlsby: "bottleneck",
}
# The module of a block whose output is a site's activations: without and with norms after it.
_BRANCHES = {"attn.out": ("blocks.attn.o", "attn"), "mlp.out": ("blocks.mlp.down", "mlp")}


def has_edits(folder: Path) -> bool:
    """Whether edits lie beside a folder's weights."""
    return (folder / DESCRIPTION).is_file()


def unheld(method: Method, sites: Iterable[str]) -> str:
    """What of a method with parameters of its own cannot be written as an edit; empty if all can.

    >>> unheld(MoReS(), ["llm.block.out"]), unheld(MoReS(positions="roi"), ["llm.block.out"])
    ('', 'mores at the tokens roi')
    >>> unheld(MoReS(positions="all:skip(1;0)"), ["connector.out"])
    'mores at the tokens all:skip(1;0)'
    """
    if not isinstance(method, Edit) or type(method) not in ARITHMETIC:
        return method.name
    selector = parse_selector(method.positions)
    for region, part in selector.parts:
        # An image is a row there, but `all` counts over all images of a prompt.
        joined = "connector.out" in sites and region == "all" and not part.whole
        if region == "roi" or selector.marks or joined:
            return f"{method.name} at the tokens {method.positions}"
    return ""


def write_edits(
    mllm: MLLM, folder: Path, hf: HFConfig, *, system_ids: tuple[int, ...] = ()
) -> None:
    """Writes the attached edits and their loader beside a folder's weights.

    Args:
      mllm: The model.
      folder: The folder of `transformers` with its weights.
      hf: Its whole `config.json`.
      system_ids: The tokens before a user's first word, as the template writes them.

    Raises:
      UserError: when something else is attached, or needs what inputs of `transformers` do not
        tell.
    """
    tuning, records, arrays = mllm.tuning, [], {}
    tuning.check_single("a folder with edits")
    for key, method in tuning.methods:
        if key in tuning.params and (what := unheld(method, tuning.params[key])):
            raise UserError(f"a folder of transformers has no place for {what}")
    words = dict(tuning.words)
    for key, method in tuning.methods:
        for site, variables in tuning.params.get(key, {}).items():
            assert isinstance(method, Edit)
            mask = tuning.layer_mask(key, site)
            layers = [] if mask is None else np.flatnonzero(mask).tolist()
            for leaf, x in written_params(method, variables).items():
                arrays[f"{len(records)}.{leaf}"] = x[None] if mask is None else x[layers]
            records.append(
                {
                    "method": key,
                    "site": site,
                    "layers": layers,
                    "modules": _modules(mllm.config, hf, site, layers),
                    "before": site == "llm.embed.out",
                    "tower": site.split(".")[0],
                    "arithmetic": ARITHMETIC[type(method)],
                    "half": getattr(method, "parity", "paper") != "paper",
                    "subtracts": getattr(method, "subtracts", False),
                    "positions": _positions(parse_selector(method.positions), words),
                    "while_decoding": parse_selector(method.positions).acts_while_decoding,
                }
            )
    vision = mllm.config.vision
    description = {
        "format": FORMAT,
        "spec": format_spec(_without_file(method) for _, method in tuning.methods),
        "image_token_id": hf.get("image_token_index", hf.get("image_token_id")),
        "visual_tokens": mllm.config.visual_tokens,
        "vision_prefix": vision.prefix_tokens if isinstance(vision, VisionConfig) else 0,
        "system_ids": [*system_ids],
        "edits": records,
    }
    (folder / TENSORS).parent.mkdir(parents=True)
    save_file(arrays, folder / TENSORS, metadata={"format": FORMAT})
    write_json(folder / DESCRIPTION, description)
    replace_file(folder / LOADER, Path(__file__).with_name(LOADER).read_text())


def read_edits(mllm: MLLM, folder: Path) -> None:
    """Attaches the edits beside a folder's weights.

    Raises:
      UserError: when they are damaged or do not belong to this model; the attached tuning is then
        as it was.
    """
    file = folder / DESCRIPTION
    description = read_json(file, EditsDescription)
    arrays = load_tensors(folder / TENSORS)
    records = [(r["method"], r["site"], r["layers"]) for r in description["edits"]]
    tuning = Tuning(description["spec"], mllm.config)
    wanted = [(key, site) for key, _ in tuning.methods for site in tuning.params.get(key, {})]
    if [(key, site) for key, site, _ in records] != wanted:
        raise UserError(f"{file} does not list the edits of its spec {tuning.spec!r}")
    for number, (key, site, layers) in enumerate(records):
        mask = tuning.layer_mask(key, site)
        for leaf, variable in tuning.params[key][site].items():
            x = arrays.get(f"{number}.{leaf}")
            if x is None or not x.ndim or x.shape[0] != max(len(layers), mask is None):
                raise UserError(f"{folder / TENSORS} lacks {leaf} of {key} at {site}")
            x = x[0] if mask is None else x[entries_of_layers(mask)]
            if x.shape != variable.shape:
                raise UserError(
                    f"{folder / TENSORS}: {leaf} of {key} at {site} has shape {x.shape}, the model "
                    f"needs {tuple(variable.shape)}"
                )
            variable.set_value(jnp.asarray(x))
    mllm.tuning = tuning


def _without_file(method: Method) -> Method:
    """The method without the file of a vector, which is among the tensors."""
    return dataclasses.replace(method, vector="") if isinstance(method, Steer) else method


def written_params(method: Method, variables: Any) -> dict[str, np.ndarray]:
    """Parameters in fp32 as they are written; `rotate` is orthonormal where its method is."""
    params = {leaf: np.asarray(x[...], np.float32) for leaf, x in variables.items()}
    if isinstance(method, LowRankEdit) and method.orthogonal:
        q, r = np.linalg.qr(params["rotate"].astype(np.float64))
        signs = np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)
        params["rotate"] = (q * signs[..., None, :]).astype(np.float32)
    return params


def _positions(selector: Selector, words: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """The parts of a selector, as the loader reads them."""
    parts = []
    for region, part in selector.parts:
        if region.startswith("token("):
            word = region[len("token(") : -1]
            if word not in words:
                raise UserError(
                    f"the tokens of {region!r} are not known: the model has no tokenizer"
                )
            parts.append({"region": "token", "ids": [*words[word]]})
        else:
            parts.append({"region": region, "slice": dataclasses.asdict(part)})
    return parts


def _modules(config: MLLMConfig, hf: HFConfig, site: str, layers: list[int]) -> list[str]:
    """The modules of `transformers` whose outputs (or inputs) the edit changes, one per layer."""
    tower, _, place = site.partition(".")
    if tower == "connector":
        return ["model.multi_modal_projector"]
    if tower == "vision":
        names, block = vision_family(hf["vision_config"]).names(hf["vision_config"]), config.vision
        names = {ours: f"model.vision_tower.{name}" for ours, name in names.items()}
    else:
        names, block = llm_family(hf.get("text_config", hf)).name_map, config.llm
        if config.vision is not None:
            new = "model.language_model."
            names = {ours: name.replace("model.", new, 1) for ours, name in names.items()}
    first, _, _ = names["blocks.attn.q"].partition("{}")
    if place == "embed.out":
        if config.llm.positions == "learned":
            raise UserError(f"format hf has no place for edits at {site}; use format adapter")
        return [f"{first}0"]
    if place == "norm.out":
        return [names["norm"]]
    if place == "block.out":
        return [f"{first}{layer}" for layer in layers]
    linear, branch = _BRANCHES[place.removeprefix("block.")]
    name = names[linear]
    assert isinstance(block, BlockConfig)
    if block.post_norms:
        name = names[f"blocks.{branch}_post_norm"]
    elif block.layer_scale:
        name = names[f"blocks.{branch}_scale"].rpartition(".")[0]
    return [name.format(layer) for layer in layers]
