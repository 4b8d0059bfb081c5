"""Hugging Face folders to models.

Source of the layouts: transformers 5 (`LlamaForCausalLM`, `PhiForCausalLM`, `CLIPVisionModel`,
`SiglipVisionModel`, `LlavaForConditionalGeneration`), and TinyLLaVA Factory's
`TinyLlavaForConditionalGeneration`, whole or as the folders of a training stage.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jax.sharding import Mesh

from moresjax.core.errors import UserError, choice_error
from moresjax.core.reading import read_json
from moresjax.core.types import AnyArray
from moresjax.models.decoder import quantized
from moresjax.models.initialize import set_params
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.vision import VisionConfig, VisionEncoder
from moresjax.weights.dtypes import compute_dtype, with_dtype
from moresjax.weights.families.base import (
    LLM_FAMILIES,
    MLLM_FAMILIES,
    VISION_FAMILIES,
    HFConfig,
    MLLMFamily,
    decoder_config,
    llm_family,
    renamed,
    vision_family,
)
from moresjax.weights.families.eva import eva_config, eva_tensors
from moresjax.weights.families.keys import TWO_TOWER_KEYS
from moresjax.weights.families.llava_original import (
    RENAMED,
    LlavaOriginal,
    complete,
    find_tower,
    is_original,
)
from moresjax.weights.files import open_tensors, separated, stored_in
from moresjax.weights.tensor_mapping import (
    ParameterReader,
    Tensor,
    TensorMapping,
    check_tensors,
    module_mappings,
)

HEAD = "lm_head.weight"
TWO_TOWERS = {family.two_towers for family in VISION_FAMILIES.values()} - {""}
ROWS = 4096  # of a matrix that are compared at a time


class _Raw(TypedDict, total=False):
    model_type: str
    architectures: list[str] | None
    text_config: dict[str, Any] | None
    vision_config: dict[str, Any] | None


class HFFolder:
    """A Hugging Face folder, whose `config.json` is parsed once and whose tensors are opened once.

    Args:
      path: A folder with `config.json` and safetensors: a LLaVA (also TinyLLaVA Factory's), an LLM
        or a vision encoder. Or the file of an EVA-ViT as its authors publish it.
      allow_pickle: Whether `*.bin` files may be read where there are no safetensors.
      vision_tower: The folder of the vision encoder of a LLaVA as its authors publish it; default:
        what its `config.json` names.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        allow_pickle: bool = False,
        vision_tower: str | Path | None = None,
    ) -> None:
        self.path, self.allow_pickle = Path(path), allow_pickle
        self._tower = None if vision_tower is None else Path(vision_tower)

    @functools.cached_property
    def raw(self) -> dict[str, Any]:
        """The content of `config.json`.

        Raises:
          UserError: when there is none, or it is damaged.
        """
        if self.path.is_file():
            return eva_config(self.tensors, self.path)
        file = self.path / "config.json"
        if not file.is_file():
            raise UserError(f"{self.path} is not a Hugging Face checkpoint: it has no config.json")
        raw = read_json(file, _Raw)
        for part in (raw, raw.get("text_config"), raw.get("vision_config")):
            if isinstance(part, dict) and (how := part.get("quantization_config")):
                kind = how.get("quant_method", "") if isinstance(how, dict) else how
                raise UserError(
                    f"{self.path} is quantized ({kind}), which is not supported; use the folder of "
                    "the whole weights, and quantize=int8 for eight bits"
                )
        if is_original(raw):
            return raw | {"model_type": LlavaOriginal.model_type}
        if self._tower is not None:
            raise UserError(f"{self.path} names no vision tower; it takes none from elsewhere")
        return raw

    @functools.cached_property
    def tower(self) -> "HFFolder | None":
        """The folder of the vision encoder, where that is another one."""
        if not is_original(self.raw):
            return None
        path = find_tower(self.path, self.raw) if self._tower is None else self._tower
        return HFFolder(path, allow_pickle=self.allow_pickle)

    @property
    def image_folder(self) -> Path:
        """The folder that has the image processor."""
        return self.path if self.tower is None else self.tower.path

    @property
    def vision_hf(self) -> dict[str, Any]:
        """The vision encoder's part of `config.json`, in a folder of an encoder."""
        if self.hf["model_type"] not in TWO_TOWERS:
            return self.hf
        TWO_TOWER_KEYS.check(self.hf, str(self.path / "config.json"))
        return self.hf["vision_config"]

    @functools.cached_property
    def hf(self) -> dict[str, Any]:
        """`config.json` with its family's defaults for what it leaves out.

        Raises:
          UserError: when `transformers` does not know the architecture.
        """
        from transformers import AutoConfig

        raw = self.raw
        family = MLLM_FAMILIES.get(raw.get("model_type", ""))
        tower = None if self.tower is None else self.tower.vision_hf
        if self.path.is_file():
            return raw
        try:
            if tower is not None:
                return complete(raw, tower)
            if family is None or family.in_transformers:
                return AutoConfig.from_pretrained(
                    self.path, local_files_only=True, trust_remote_code=False
                ).to_dict()
            towers = ("text_config", "vision_config")
            return raw | {name: AutoConfig.for_model(**raw[name]).to_dict() for name in towers}
        except Exception as error:  # transformers raises many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.path / 'config.json'} cannot be used: {reason}") from None

    @functools.cached_property
    def config(self) -> MLLMConfig:
        """The architecture of a LLaVA or an LLM.

        Raises:
          UserError: when it is not supported.
        """
        try:
            config = config_from_hf(self.hf)
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # A value of another kind than transformers writes.
            raise UserError(f"{self.path / 'config.json'} cannot be used: {error!r}") from None
        if config.llm.tie_embeddings and self._has_own_head(config):
            config = dataclasses.replace(
                config, llm=dataclasses.replace(config.llm, tie_embeddings=False)
            )
        return config

    def _has_own_head(self, config: MLLMConfig) -> bool:
        """Whether a head is stored that is not the table, which transformers then does not tie."""
        untied = dataclasses.replace(config.llm, tie_embeddings=False)
        mappings = model_mappings(dataclasses.replace(config, llm=untied), self.hf)
        # An encoder of which no block is used has blocks without tensors.
        names = {mapping.path: mapping.names[0] for mapping in mappings if mapping.names}
        table, head = names["llm", "embed", "table"], names["llm", "head", "kernel"]
        try:
            tensors = self.tensors
        except UserError:  # which reading the weights will raise again
            return False
        if table not in tensors or head not in tensors:
            return False
        return not _equal(tensors[table], tensors[head])

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the state dict of `transformers`, unread.

        Raises:
          UserError: when there is no file that may be read, or one cannot be.
        """
        if self.path.is_file():
            stored, _ = stored_in(self.path, allow_pickle=self.allow_pickle)
            return eva_tensors(separated(stored), self.path)
        tensors = open_tensors(self.path, allow_pickle=self.allow_pickle)
        if self.tower is None:
            return tensors
        prefix = "model.vision_tower."
        tensors = {renamed(name, RENAMED): tensor for name, tensor in tensors.items()}
        if not any(name.startswith(prefix) for name in tensors):
            # A tower that was trained is in the folder; any other is the one that is named.
            tensors |= {prefix + name: x for name, x in self.tower.encoder_tensors.items()}
        return tensors

    @property
    def encoder_tensors(self) -> dict[str, Tensor]:
        """The tensors of an encoder's folder by their names in the encoder; nothing beside it."""
        if self.path.is_file():
            return dict(self.tensors)
        named = {_encoder_name(name): tensor for name, tensor in self.tensors.items()}
        beside = tuple(part for family in VISION_FAMILIES.values() for part in family.beside)
        return {name: tensor for name, tensor in named.items() if not name.startswith(beside)}

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of the tensors, such as `bfloat16`."""
        kinds = collections.Counter(str(np.dtype(x.dtype)) for x in self.tensors.values())
        return kinds.most_common(1)[0][0]

    @property
    def family(self) -> MLLMFamily | None:
        """The family of a multimodal LLM; None for another model."""
        return MLLM_FAMILIES.get(self.raw.get("model_type", ""))

    @property
    def is_vision(self) -> bool:
        """Whether it is a vision encoder, alone or beside a text encoder."""
        if not (self.path / "config.json").is_file():
            return self.path.is_file()
        return self.raw.get("model_type") in {*VISION_FAMILIES, *TWO_TOWERS}

    def parameters(self, part: str = "", mesh: Mesh | None = None) -> ParameterReader:
        """The base parameters of a LLaVA or an LLM; see `import_params`."""
        where = str(self.path)
        return import_params(self.config, self.hf, self.tensors, part=part, mesh=mesh, where=where)


def _encoder_name(name: str) -> str:
    """A tensor's name in the encoder alone, whatever stands around it in the file."""
    for family in VISION_FAMILIES.values():
        for prefix in family.prefixes:
            if name.startswith(prefix):
                return name.removeprefix(prefix)
    return name


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two stored matrices are the same; they are read some rows at a time."""
    if tuple(one.shape) != tuple(other.shape):
        return False
    starts = range(0, one.shape[0], ROWS)
    return all(np.array_equal(one[i : i + ROWS], other[i : i + ROWS]) for i in starts)


class HFFolders:
    """Hugging Face folders by path, each opened once.

    Args:
      allow_pickle: Whether `*.bin` files may be read where there are no safetensors.
    """

    def __init__(self, *, allow_pickle: bool = False) -> None:
        self.allow_pickle = allow_pickle
        self.towers: dict[Path, Path] = {}  # of LLaVAs whose vision encoder is another folder
        self._opened: dict[Path, HFFolder] = {}

    def __getitem__(self, path: str | Path) -> HFFolder:
        path = Path(path).resolve()
        if path not in self._opened:
            tower = self.towers.get(path)
            self._opened[path] = HFFolder(path, allow_pickle=self.allow_pickle, vision_tower=tower)
        return self._opened[path]


def config_from_hf(hf: HFConfig) -> MLLMConfig:
    """The architecture of a LLaVA's or an LLM's whole `config.json`.

    Raises:
      UserError: when it is not supported.
    """
    if family := MLLM_FAMILIES.get(hf["model_type"]):
        return family.from_hf(hf)
    if hf.get("vision_config"):
        raise choice_error("multimodal family", hf["model_type"], sorted(MLLM_FAMILIES))
    return MLLMConfig(llm=decoder_config(hf))


def model_mappings(
    config: MLLMConfig, hf: HFConfig, mesh: Mesh | None = None
) -> list[TensorMapping]:
    """Where every base parameter is in a model with this whole `config.json`.

    Args:
      config: The architecture.
      hf: The content of `config.json`.
      mesh: The devices to split the parameters over.
    """
    stored = dataclasses.replace(config, llm=dataclasses.replace(config.llm, int8=False))
    model = MLLM(stored)
    name_map = llm_family(hf.get("text_config", hf)).name_map
    llm = module_mappings(model.llm, name_map, mesh=mesh)
    if not isinstance(config.vision, VisionConfig) or model.connector is None:
        return [mapping.within("llm") for mapping in llm]
    connector_map = MLLM_FAMILIES[hf["model_type"]].connector_map(config.connector)
    vision = vision_mappings(config.vision, hf["vision_config"], mesh)
    connector = module_mappings(model.connector, connector_map, mesh=mesh)
    return [
        *(mapping.within("vision", "", "model.vision_tower.") for mapping in vision),
        *(mapping.within("connector", "", "model.") for mapping in connector),
        *(mapping.within("llm", "model.", "model.language_model.") for mapping in llm),
    ]


def vision_mappings(
    config: VisionConfig, hf: HFConfig, mesh: Mesh | None = None
) -> list[TensorMapping]:
    """Where every parameter of a vision encoder is in one with this `config.json`."""
    family = vision_family(hf)
    return module_mappings(
        VisionEncoder(config),
        family.names(hf),
        leading_ones=family.leading_ones,
        first=config.first_blocks,
        mesh=mesh,
    )


def unused_tensors() -> tuple[str, ...]:
    """Parts of the names of tensors that no parameter is made of, in any family: buffers, masks."""
    families = (*LLM_FAMILIES.values(), *VISION_FAMILIES.values())
    return tuple({part for family in families for part in family.unused})


def import_params(
    config: MLLMConfig,
    hf: HFConfig,
    tensors: Mapping[str, Tensor],
    *,
    part: str = "",
    mesh: Mesh | None = None,
    where: str = "checkpoint",
) -> ParameterReader:
    """Base parameters by name, each read straight to where it belongs.

    Args:
      config: The architecture that `hf` describes.
      hf: The content of the whole `config.json`.
      tensors: Tensors by their names in the state dict of `transformers`.
      part: The part of the model to read, such as `llm`; default: all.
      mesh: The devices to split the parameters over.
      where: The tensors' origin, for messages.

    Raises:
      UserError: that lists the tensors which are missing, unknown or of another shape.
    """
    mappings = model_mappings(config, hf, mesh)
    unused = (*unused_tensors(), *((HEAD,) if config.llm.tie_embeddings else ()))
    if config.llm.tie_embeddings and HEAD in tensors:
        # Either name may be the one that is stored.
        table = next(m.names[0] for m in mappings if m.path == ("llm", "embed", "table"))
        tensors = {table: tensors[HEAD], **tensors}
    check_tensors(mappings, tensors, unused, where)
    chosen = [mapping for mapping in mappings if part in ("", mapping.path[0])]
    return ParameterReader(chosen, tensors)


def build_mllm(config: MLLMConfig, params: Mapping[str, AnyArray], tuning: str = "none") -> MLLM:
    """A model with the given base parameters and freshly initialised tuning parameters."""
    model = MLLM(config, tuning)
    set_params(model, params, "checkpoint")
    model.tuning.initialize()
    return model


def pretrained_config(folder: str | Path) -> MLLMConfig:
    """The architecture of a folder with a `config.json`.

    Raises:
      UserError: when there is none or the architecture is not supported.
    """
    return HFFolder(folder).config


def load_pretrained(
    folder: str | Path | HFFolder,
    tuning: str = "none",
    *,
    dtype: str = "float32",
    quantize: str = "",
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
) -> MLLM:
    """The model of a folder.

    Args:
      folder: The folder of a LLaVA or an LLM, with `config.json` and safetensors.
      tuning: The spec of a tuning to attach, freshly initialised.
      dtype: The dtype of the activations, see `compute_dtype`; weights keep theirs.
      quantize: `int8` holds the LLM's blocks in eight bits.
      allow_pickle: Whether `*.bin` files may be read where there are no safetensors.
      mesh: The devices to split the parameters over.

    Raises:
      UserError: when the folder is not a checkpoint or its architecture is not supported.
    """
    if not isinstance(folder, HFFolder):
        folder = HFFolder(folder, allow_pickle=allow_pickle)
    config = folder.config
    parameters = folder.parameters(mesh=mesh)
    config = dataclasses.replace(config, llm=quantized(config.llm, quantize))
    config = with_dtype(config, compute_dtype(dtype, folder.stored_dtype))
    return build_mllm(config, parameters, tuning)
