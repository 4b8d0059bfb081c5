"""EVA-ViT in the file of its authors, `eva_vit_g.pth`, which BLIP-2, MiniGPT-4 and MiniGPT-v2 read.

Source: Vision-CAIR/MiniGPT-4, `models/eva_vit.py` (43b4f12) for the names, the heads of 88 features
and the 39 blocks that are used of 40; `models/minigpt_v2.py` (5bec4d0) and `models/base_model.py`
(045a1d0) for the norm that follows. No published file was at hand.

The file has no `config.json`: the shapes of its tensors say what the encoder is.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError
from moresjax.models.vision import EVA, OPENAI_MEAN, OPENAI_STD, VisionConfig
from moresjax.weights.families.base import HFConfig, VisionFamily, register
from moresjax.weights.families.keys import VISION_KEYS
from moresjax.weights.tensor_mapping import Tensor

logger = logging.getLogger(__name__)

HEAD_DIM = 88
# Blocks of the whole EVA-ViT-g, of which the last is not used.
ALL_BLOCKS = 40
# EVA's own norm and head, in whose place `ln_vision` stands.
LEFT_OUT = ("norm.", "fc_norm.", "head.")
NORM = "ln_vision"
PATCH, UP = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
# What says the shape of the encoder, with the number of its axes.
SHAPES = {"cls_token": 3, "pos_embed": 3, PATCH: 4, UP: 2}


@register
class Eva(VisionFamily):
    """EVA-ViT, with biases of queries and values but not of keys."""

    model_type = EVA
    in_transformers = False
    name_map = {
        "cls": "cls_token",
        "position": "pos_embed",
        "patch": "patch_embed.proj",
        "blocks.attn_norm": "blocks.{}.norm1",
        "blocks.attn.q": "blocks.{}.attn.q",
        "blocks.attn.k": "blocks.{}.attn.k",
        "blocks.attn.v": "blocks.{}.attn.v",
        "blocks.attn.q.bias": "blocks.{}.attn.q_bias",
        "blocks.attn.v.bias": "blocks.{}.attn.v_bias",
        "blocks.attn.o": "blocks.{}.attn.proj",
        "blocks.mlp_norm": "blocks.{}.norm2",
        "blocks.mlp.up": "blocks.{}.mlp.fc1",
        "blocks.mlp.down": "blocks.{}.mlp.fc2",
        "post_norm": NORM,
    }
    keys = VISION_KEYS | ConfigKeys(implemented=("intermediate_size",))
    leading_ones = {"cls_token": 2, "pos_embed": 1}
    position_embedding = "pos_embed"
    halves = {"attn.qkv.": ("attn.q.", "attn.k.", "attn.v.")}

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """The width of the MLP, and the features behind MiniGPT-v2's own norm."""
        return {
            "intermediate_size": hf["intermediate_size"],
            "class_token": True,
            "k_bias": False,
            "feature_layer": -1,
            "feature_norm_eps": 1e-5,
            "pixel_mean": OPENAI_MEAN,
            "pixel_std": OPENAI_STD,
        }

    def to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """Nothing: `transformers` has no encoder whose keys alone have no bias.

        Raises:
          UserError: always.
        """
        raise UserError("EVA-ViT is read from its authors' file, not written")


def eva_tensors(stored: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of the encoder by their names in the file; what it does not use is told.

    Without a norm of MiniGPT-v2's the features are normalised and not scaled, as in a new one.

    Args:
      stored: What is in the file, matrices of queries, keys and values apart.
      file: The file, for messages.

    Raises:
      UserError: The file is not that of an EVA-ViT.
    """
    for name, axes in SHAPES.items():
        if name not in stored or len(stored[name].shape) != axes:
            found = f"{tuple(stored[name].shape)}" if name in stored else "not there"
            raise UserError(f"{file} holds no EVA-ViT: its {name} is {found}")
    last = f"blocks.{ALL_BLOCKS - 1}."
    left_out = [name for name in stored if name.startswith((*LEFT_OUT, last))]
    if left_out:
        logger.warning(
            "%s: block %d, norm and head of EVA are not used, as in MiniGPT-v2: %d tensors, %s ..",
            file,
            ALL_BLOCKS,
            len(left_out),
            left_out[0],
        )
    width = stored["cls_token"].shape[-1]
    kept = {name: x for name, x in stored.items() if name not in left_out}
    return {
        f"{NORM}.weight": np.ones(width, np.float32),
        f"{NORM}.bias": np.zeros(width, np.float32),
    } | kept


def eva_config(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """What a `config.json` of the encoder would say.

    Args:
      tensors: Those of `eva_tensors`.
      file: The file, for messages.

    Raises:
      UserError: The features cannot be divided into heads, or the patches are no square.
    """
    width, patch = tensors["cls_token"].shape[-1], tensors[PATCH].shape[-1]
    positions = tensors["pos_embed"].shape[1]
    side = math.isqrt(positions - 1)
    if width % HEAD_DIM or side**2 != positions - 1:
        raise UserError(
            f"{file} holds no EVA-ViT with heads of {HEAD_DIM} features and a square of patches: "
            f"it has {width} features and {positions} positions"
        )
    blocks = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    return {
        "model_type": EVA,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": tensors[UP].shape[0],
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": width // HEAD_DIM,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
