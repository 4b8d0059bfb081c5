"""What a family file says: where the tensors of a checkpoint are, and what its `config.json` means.

A family is a class under `@register`, one for every `model_type` of `transformers`:

    @register
    class Phi(LLMFamily):
        model_type = "phi"
        name_map = {"embed": "model.embed_tokens", "blocks.attn.q": ...}

        def from_hf(self, hf): ...    # `config.json` to fields of DecoderConfig
        def to_hf(self, config): ...  # and back

A name map gives the Hugging Face module of each of our modules; `{}` stands for the layer number of
stacked blocks. The names of parameters follow: `kernel` is a transposed `weight`, `scale` and
`table` are `weight`, `bias` is `bias`. A map may also name a parameter itself.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from moresjax.core.config_keys import ConfigKeys
from moresjax.core.errors import UserError, choice_error
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLMConfig
from moresjax.models.vision import VisionConfig

# The content of a `config.json`.
HFConfig = Mapping[str, Any]
Config = TypeVar("Config", DecoderConfig, VisionConfig)

# Names of activation functions: Hugging Face's -> ours. The first of several is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Fields that every LLM family has: ours -> Hugging Face's.
LLM_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}

# Fields that every vision family has; image and patch size and the activation are converted.
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
}


class LLMFamily(abc.ABC):
    """A decoder-only LLM of `transformers`.

    Attributes:
      model_type: The family's name in `config.json`.
      name_map: Our module paths -> Hugging Face's.
      keys: What every key of the family's `config.json` means here.
      unused: Parts of the names of tensors in files that no parameter is made of.
    """

    model_type: ClassVar[str]
    name_map: ClassVar[dict[str, str]]
    keys: ClassVar[ConfigKeys]
    unused: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)

    @abc.abstractmethod
    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """The fields of `DecoderConfig` that a `config.json` sets beyond `LLM_FIELDS`.

        Raises:
          UserError: for a variant of the family that is not supported.
        """

    @abc.abstractmethod
    def to_hf(self, config: DecoderConfig) -> dict[str, Any]:
        """The settings of `config.json` beyond `LLM_FIELDS`; the inverse of `from_hf`."""


class VisionFamily(abc.ABC):
    """A vision encoder of `transformers`.

    Attributes:
      model_type: The family's name in the `config.json` of the encoder.
      two_towers: Its `model_type` when a text encoder stands beside it; empty if there is none.
      name_map: Our module paths -> Hugging Face's.
      keys: What every key of the encoder's `config.json` means here.
      leading_ones: Tensors with leading axes of size one, and the number of these axes.
      position_embedding: The tensor that is interpolated for another image size; empty if the
        size is fixed.
      prefixes: What an encoder's names may start with in a file that holds more than the encoder.
      old_modules: Names of modules in files of older releases -> in the state dict.
      halves: Names of modules in files whose first axis holds two modules -> those two.
      unused: Parts of the names of tensors in files that no parameter is made of.
      beside: Beginnings of what stands next to an encoder, or on top of it, in a folder of its own.
      in_transformers: Whether `transformers` knows the encoder by `model_type`.
    """

    model_type: ClassVar[str]
    two_towers: ClassVar[str] = ""
    name_map: ClassVar[dict[str, str]]
    keys: ClassVar[ConfigKeys]
    leading_ones: ClassVar[Mapping[str, int]] = {}
    position_embedding: ClassVar[str] = ""
    prefixes: ClassVar[tuple[str, ...]] = ()
    old_modules: ClassVar[Mapping[str, str]] = {}
    halves: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    unused: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    in_transformers: ClassVar[bool] = True

    def names(self, hf: HFConfig) -> dict[str, str]:
        """The name map of the variant that a `config.json` describes."""
        return self.name_map

    @abc.abstractmethod
    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """The fields of `VisionConfig` that a `config.json` sets beyond `VISION_FIELDS`."""

    @abc.abstractmethod
    def to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """The settings of `config.json` beyond `VISION_FIELDS`; the inverse of `from_hf`."""


class MLLMFamily(abc.ABC):
    """A multimodal LLM: a vision encoder, a connector and an LLM in one `config.json`.

    Attributes:
      model_type: The family's name in `config.json`.
      keys: What every key of the whole `config.json` means here, but for its parts.
      prefixes: Beginnings of the names of tensors in files -> in the state dict of transformers 5.
      written: Beginnings in the state dict -> in new files.
      in_transformers: Whether `transformers` knows the whole, or its two towers only.
      architecture: Its class in `transformers`.
      image_mark: The token that stands for a visual token in ids of `transformers`; empty where
        there is none.
      template: The conversation template of a folder whose tokenizer has none of its own; empty
        where folders do not say how they are asked.
    """

    model_type: ClassVar[str]
    keys: ClassVar[ConfigKeys]
    prefixes: ClassVar[Mapping[str, str]]
    written: ClassVar[Mapping[str, str]]
    in_transformers: ClassVar[bool] = True
    architecture: ClassVar[str] = ""
    image_mark: ClassVar[str] = ""
    template: ClassVar[str] = ""

    @abc.abstractmethod
    def from_hf(self, hf: HFConfig) -> MLLMConfig:
        """The whole model that a `config.json` describes.

        Raises:
          UserError: for a part, or a combination of parts, that is not supported.
        """

    @abc.abstractmethod
    def to_hf(self, config: MLLMConfig) -> dict[str, Any]:
        """The whole `config.json` of a model; the inverse of `from_hf`.

        Raises:
          UserError: when no model of the family is the same.
        """

    @abc.abstractmethod
    def connector_map(self, connector: str) -> dict[str, str]:
        """The name map of the connector."""

    def processor(
        self, image_processor: Any, tokenizer: Any, config: MLLMConfig, hf: HFConfig
    ) -> Any:
        """The processor of `transformers` for such a model.

        Args:
          image_processor: Its image processor.
          tokenizer: Its tokenizer, which has `image_mark`.
          config: The architecture.
          hf: The content of its `config.json`.

        Raises:
          UserError: when the family has none, or the tokenizer is none for it.
        """
        raise UserError(f"{self.model_type} has no processor in transformers")

    def written_name(self, name: str) -> str:
        """The name in a new file of a tensor of the state dict."""
        return renamed(name, self.written)


LLM_FAMILIES: dict[str, LLMFamily] = {}
VISION_FAMILIES: dict[str, VisionFamily] = {}
MLLM_FAMILIES: dict[str, MLLMFamily] = {}
Registered = TypeVar("Registered", bound=type[LLMFamily | VisionFamily | MLLMFamily])


def register(cls: Registered) -> Registered:
    """Adds a family to those that can be imported and exported."""
    family = cls()
    if isinstance(family, LLMFamily):
        LLM_FAMILIES[family.model_type] = family
    elif isinstance(family, VisionFamily):
        VISION_FAMILIES[family.model_type] = family
    elif isinstance(family, MLLMFamily):
        MLLM_FAMILIES[family.model_type] = family
    return cls


def llm_family(hf: HFConfig) -> LLMFamily:
    """The family of an LLM's `config.json`.

    Raises:
      UserError: for a family that is not supported.
    """
    if hf["model_type"] not in LLM_FAMILIES:
        raise choice_error("LLM family", hf["model_type"], sorted(LLM_FAMILIES))
    return LLM_FAMILIES[hf["model_type"]]


def vision_family(hf: HFConfig) -> VisionFamily:
    """The family of a vision encoder's `config.json`.

    Raises:
      UserError: for a family that is not supported.
    """
    if hf["model_type"] not in VISION_FAMILIES:
        raise choice_error("vision encoder family", hf["model_type"], sorted(VISION_FAMILIES))
    return VISION_FAMILIES[hf["model_type"]]


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """The LLM that a Hugging Face `config.json` describes.

    Raises:
      UserError: for a family, or a variant of one, that is not supported.
    """
    family = llm_family(hf)
    family.keys.check(hf, f"{family.model_type} in config.json")
    fields: dict[str, Any] = {"model_type": family.model_type}
    fields |= {ours: hf[name] for ours, name in LLM_FIELDS.items() if hf.get(name) is not None}
    return DecoderConfig(**(fields | family.from_hf(hf)))


def vision_config(hf: HFConfig, **changes: Any) -> VisionConfig:
    """The vision encoder that a Hugging Face `config.json` describes.

    Args:
      hf: The content of `config.json`.
      changes: Fields of `VisionConfig` to set otherwise.

    Raises:
      UserError: for a family, or a variant of one, that is not supported.
    """
    family = vision_family(hf)
    family.keys.check(hf, f"{family.model_type} in config.json")
    fields: dict[str, Any] = {"model_type": family.model_type}
    fields |= {ours: hf[name] for ours, name in VISION_FIELDS.items()}
    fields |= {name: _side(hf, name) for name in ("image_size", "patch_size")}
    fields["activation"] = activation(hf["hidden_act"])
    return VisionConfig(**(fields | family.from_hf(hf) | changes))


def hf_decoder_config(
    config: DecoderConfig,
    read: Callable[[HFConfig], DecoderConfig] = decoder_config,
    what: str = "LLM",
) -> dict[str, Any]:
    """The `config.json` of an LLM, with its family's defaults; the inverse of `decoder_config`.

    Args:
      config: The LLM.
      read: What the result is read with; it must give `config` again.
      what: What has to be the same, for the message.

    Raises:
      UserError: when no LLM of `transformers` is the same.
    """

    def write(family: LLMFamily) -> dict[str, Any]:
        common = {name: getattr(config, ours) for ours, name in LLM_FIELDS.items()}
        return common | family.to_hf(config)

    return _inverse(config, LLM_FAMILIES, write, read, what)


def hf_vision_config(
    config: VisionConfig, read: Callable[[HFConfig], VisionConfig] = vision_config
) -> dict[str, Any]:
    """The `config.json` of a vision encoder; the inverse of `vision_config`.

    Args:
      config: The encoder.
      read: What the result is read with; it must give `config` again.

    Raises:
      UserError: when no vision encoder of `transformers` is the same.
    """

    def write(family: VisionFamily) -> dict[str, Any]:
        common = {name: getattr(config, ours) for ours, name in VISION_FIELDS.items()}
        return common | {"hidden_act": hf_activation(config.activation)} | family.to_hf(config)

    return _inverse(config, VISION_FAMILIES, write, read, "encoder")


Family = TypeVar("Family", LLMFamily, VisionFamily)


def _inverse(
    config: Config,
    families: Mapping[str, Family],
    write: Callable[[Family], dict[str, Any]],
    read: Callable[[HFConfig], Config],
    what: str,
) -> dict[str, Any]:
    """The `config.json` that is read as `config`.

    A configuration that was written by hand, or by version 0.1, names no family: then every family
    is tried.
    """
    from transformers import AutoConfig

    differences: list[tuple[str, list[str]]] = []
    for name in [config.model_type] if config.model_type in families else families:
        try:
            hf = AutoConfig.for_model(name, **write(families[name])).to_dict()
            found = read(hf)
        except (UserError, ValueError, TypeError):  # the family has no such configuration
            continue
        if found == config:
            return hf
        fields = [f.name for f in dataclasses.fields(config) if f.compare]
        other = [n for n in fields if getattr(found, n) != getattr(config, n)]
        differences.append((name, [f"{n}={getattr(config, n)!r}" for n in other]))
    if not differences:
        raise UserError(f"no {what} of transformers is like this one")
    name, other = min(differences, key=lambda difference: len(difference[1]))
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    raise UserError(
        f"no {what} of transformers is like this one: {name} with {', '.join(other[:3])}{more}"
    )


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the longest of the prefixes that it starts with replaced."""
    for old in sorted(prefixes, key=len, reverse=True):
        if name.startswith(old):
            return prefixes[old] + name.removeprefix(old)
    return name


def activation(name: str) -> str:
    """The name here of one of Hugging Face's activation functions.

    Raises:
      UserError: for one that is not supported.
    """
    if name not in ACTIVATIONS:
        raise choice_error("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def hf_activation(name: str) -> str:
    """The name in `transformers` of one of the activation functions here."""
    return next(hf for hf, ours in ACTIVATIONS.items() if ours == name)


def _side(hf: HFConfig, key: str) -> int:
    """The side of a square that a `config.json` may give as a pair."""
    value = hf[key]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UserError(f"{hf['model_type']} with {key}={value} is not supported: not a square")
    return int(sides.pop())
