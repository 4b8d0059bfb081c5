"""What the files of adapter folders may hold: types of their JSON, and finite arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

import msgspec
import numpy as np
from safetensors.numpy import load_file

from moresjax.core.errors import UserError
from moresjax.core.reading import Count, check_file

Number = int | float
Names = str | list[str] | None


class Base(TypedDict):
    """The model that an adapter of moresjax belongs to."""

    config: dict[str, Any]
    checksums: dict[str, int | str]


class Description(TypedDict, total=False):
    """`tuning.json`."""

    spec: Required[str]
    also_train: Required[list[str]]
    base: Required[Base]


class Edit(TypedDict):
    """The edits of a method at a site, as `edits.json` lists them."""

    method: str
    site: str
    layers: list[Count]


class EditsDescription(TypedDict, total=False):
    """`edits.json` beside the weights of an exported model."""

    spec: Required[str]
    edits: Required[list[Edit]]


class PeftConfig(TypedDict, total=False):
    """`adapter_config.json` of `peft`: the keys that are read."""

    peft_type: Required[str]
    peft_version: str | None
    r: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    lora_alpha: Number
    lora_dropout: Number | None
    vera_dropout: Number | None
    use_rslora: bool
    use_dora: bool
    use_cayley_neumann: bool
    init_lora_weights: bool | str
    projection_prng_key: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] | None
    target_modules: Names
    feedforward_modules: Names
    exclude_modules: Names
    modules_to_save: list[str] | None
    layers_to_transform: Count | list[Count] | None
    layers_pattern: Names
    rank_pattern: dict[str, Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]] | None
    alpha_pattern: dict[str, Number] | None
    ensure_weight_tying: bool
    bias: str
    num_virtual_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] | None
    num_layers: Count | None
    num_attention_heads: Count | None
    token_dim: Count | None
    encoder_hidden_size: Count | None


Entry = dict[str, Any] | list[Any]


class PyreftConfig(TypedDict, total=False):
    """`config.json` of a folder of pyreft: the keys that are read."""

    representations: list[Entry]
    intervention_types: str | list[str]
    intervention_constant_sources: bool | list[bool] | None


def load_tensors(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name.

    Raises:
      UserError: The file is not there, is damaged, or has a number that is not finite.
    """
    check_file(file)
    try:
        arrays = load_file(file)
    except Exception as error:  # safetensors has a kind of its own
        raise UserError(f"{file} cannot be read: {error}") from None
    return check_finite(arrays, file)


def check_finite(arrays: Mapping[str, np.ndarray], source: object) -> dict[str, np.ndarray]:
    """The arrays, if all of their numbers are finite.

    Raises:
      UserError: Names an array with a number that is not: its training has diverged.
    """
    for name, values in arrays.items():
        # Of bf16, which is no kind of numpy's own, the sum tells it as well.
        if not np.isfinite(np.asarray(values, np.float32)).all():
            raise UserError(
                f"{source}: {name} has numbers that are not finite, as of a training that diverged"
            )
    return dict(arrays)
