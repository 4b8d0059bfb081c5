"""The configuration of a run as a typed, frozen value: every key, its type and its default.

`resolve` makes it of what a user wrote. Everything behind the border, from `train` to `load`, takes
a `RunConfig` or only the part that it uses.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import ml_collections

from moresjax.core.errors import UserError, choice_error
from moresjax.core.ranges import (
    AboveZero,
    AtLeastZero,
    NonNegative,
    Positive,
    Range,
    Rate,
    Share,
)

# A part's weights are freshly initialised.
RANDOM = "random"
# The parts of a model that have a source of weights, in the order in which they are loaded.
PARTS = ("llm", "vision", "connector")
# A part by its name in the zoo, or by the fields of its configuration.
PartChoice = str | Mapping[str, Any]
# The conversation template of what does not name one: LLaVA-1.5's.
DEFAULT_TEMPLATE = "vicuna_v1"
# How long a run is: exactly one of these keys says it.
BUDGET = ("steps", "samples", "epochs")

Devices = Annotated[int, Range(1, also=(-1,))]


@dataclasses.dataclass(frozen=True)
class PartsConfig:
    """The parts that a model is put together from; `moresjax zoo` lists their names.

    Attributes:
      llm: Name of a decoder LLM, or fields of `DecoderConfig`; empty: that of `init.llm`. Fields
        that are no whole LLM change some of that one's.
      vision: Name of a vision encoder, or fields of `VisionConfig` or `FusedVisionConfig`; empty:
        that of `init.vision`, and without such a source the model is a plain LLM.
      connector: Name of the connector, such as `linear`, `mlp2x_gelu` or `qformer`; empty: that of
        `init.connector`, else `mlp2x_gelu`.
      classes: Number of classes of every label of a patch, for objective `patch_classes`; source
        `labels` has one label of a patch.
    """

    llm: PartChoice = ""
    vision: PartChoice = ""
    connector: str = ""
    classes: Annotated[tuple[int, ...], Range(1)] = ()


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights of each part come from.

    `random`, the workdir of an earlier run, or a Hugging Face folder. A path with a leading dot
    starts from the run's own workdir. Two vision encoders are `FOLDER;FOLDER`. An earlier run gives
    what it trained, and whatever it left frozen from its own sources. A part without a source is
    `random`; where such a part does not train either, a run that does not say `random` warns.

    Attributes:
      llm: Source of the LLM.
      vision: Source of the vision encoder.
      connector: Source of the connector.
      tuning: A run or an adapter folder whose tuning goes on, with the run's own spec; `random`
        starts afresh.
    """

    llm: str = ""
    vision: str = ""
    connector: str = ""
    tuning: str = ""

    def source(self, part: str) -> str:
        """The source of `llm`, `vision`, `connector` or `tuning`."""
        return getattr(self, part) or RANDOM

    @property
    def sources(self) -> dict[str, str]:
        """The sources of all four."""
        return {field.name: self.source(field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
      lr: The highest learning rate.
      lr_by_component: Learning rates of single components, `PATTERN=LR;...` by parameter path.
      schedule: `cosine`, `linear` or `constant`.
      warmup: Share of the steps in which the learning rate rises from 0.
      end: The last learning rate as a share of the highest.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Adam's term in the denominator.
      weight_decay: Decoupled weight decay of kernels and tables.
      clip: Largest global norm of the gradient; 0: none.
    """

    lr: AboveZero = 1e-3
    lr_by_component: str = ""
    schedule: str = "cosine"
    warmup: Share = 0.03
    end: Share = 0.0
    b1: Rate = 0.9
    b2: Rate = 0.999
    eps: AboveZero = 1e-8
    weight_decay: AtLeastZero = 0.0
    clip: AtLeastZero = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes all that the others leave."""

    data: Devices = -1
    fsdp: Devices = 1
    tensor: Devices = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Steps and minutes between checkpoints (0: by steps alone), and how many of them are kept."""

    every: Positive = 500
    minutes: AtLeastZero = 0.0
    keep: Positive = 2


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Loss and accuracy on samples that never train.

    Attributes:
      data: A source of its own, with the options of `RunConfig.data`; empty: none.
      share: Share of the training samples that is held out instead.
      every: Steps between two measurements; one comes at the end, too. 0: never.
      batches: Batches of `batch_size / microbatches` rows; 0: as many as there are.
    """

    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    share: Rate = 0.0
    every: NonNegative = 0
    batches: NonNegative = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run trains, and how.

    Example:
      >>> config = RunConfig(tokenizer="digits", steps=10)
      >>> config.optimizer.schedule
      'cosine'

    Attributes:
      name: Title of the run in logs.
      seed: Seeds the initial weights, dropout and the order of the data.
      model: The parts of the model.
      dtype: Dtype of activations in all parts; empty: as each part says.
      remat: Whether activations are computed again in the backward pass.
      attention: The LLM's attention: `auto`, `xla`, or a kernel: `splash` (TPU), `cudnn` (GPU).
      quantize: `int8` holds the LLM's frozen blocks in eight bits.
      init: Where the weights of each part come from.
      objective: `next_token`, `patch_classes` and `siglip` (a vision encoder alone, from labels of
        patches or from captions), or one that a plug-in registered.
      tuning: Spec of the tuning, such as `mores:rank=1,positions=image`.
      also_train: Base parameters that train beside it: path prefixes or regular expressions.
      tokenizer: `digits`, or a folder that `transformers` can load; empty: that of `init.llm`.
      image_processor: Folder with an image processor of `transformers`; empty: images are scaled
        to the encoder's square.
      image_aspect: `square`, or `pad`: first made square with the mean colour.
      template: Name of the conversation template.
      split_special_tokens: Whether control tokens such as `</s>` that stand in the text of samples
        are trained as the text that they are; `False` makes them control tokens, as LLaVA does.
      roi: Where regions of interest come from if the tuning acts on them: `boxes` of the samples,
        `all`, `center(60%)`, `random(60%)` and more, see `moresjax.data.region_providers`.
      data: The source of samples: its `name` and options.
      max_seq_len: S, tokens per row.
      images_per_row: N, images per row; 0 for text.
      batching: `pad` (a sample per row), `pack` (several), or `bucket` (rows of like length).
      pack_window: Samples that are packed, or sorted by length, together; 0: a usual number.
      buckets: Lengths of rows in buckets, those up to `max_seq_len`; empty: its quarters.
      on_bad_sample: `raise`, or `skip`: go on, count and list them.
      num_workers: Threads of each process that read samples.
      batch_size: B, rows per step over all devices.
      microbatches: Slices of a batch whose gradients are added up one after another.
      steps: Optimizer steps of the run. A run's length is one of `steps`, `samples` and `epochs`;
        the other two are made into steps when it starts, and its `config.json` has those.
      samples: Training samples of the run, those that are skipped included. Batches are whole, so
        that the last one may show a few more.
      epochs: Passes over the training samples.
      optimizer: The optimizer and its schedule.
      mesh: The devices along each axis.
      checkpoint: When the run is saved.
      log_every: Steps between two logged lines.
      watchdog: Seconds that a step, or the compilation before the first one, may take before the
        log says where every thread stands; 0: any time.
      validation: What is measured on samples that never train.
      lmar_every: Steps between two measurements of attention to the image (LMAR); 0: never.
      tensorboard: Whether TensorBoard events are written beside `metrics.jsonl`.
      plugins: Files of plug-ins that a config file wants. In a run's `config.json`: the files and
        installed packages whose plug-ins it was made with.
    """

    name: str = "run"
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    model: PartsConfig = PartsConfig()
    dtype: str = ""
    remat: bool = False
    attention: str = "auto"
    quantize: str = ""
    init: InitConfig = InitConfig()
    objective: str = "next_token"
    tuning: str = "none"
    also_train: tuple[str, ...] = ("connector",)
    tokenizer: str = ""
    image_processor: str = ""
    image_aspect: str = "square"
    template: str = DEFAULT_TEMPLATE
    split_special_tokens: bool = True
    roi: str = "boxes"
    data: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "digits"})
    max_seq_len: Positive = 2048
    images_per_row: NonNegative = 1
    batching: str = "pad"
    pack_window: NonNegative = 0
    buckets: Annotated[tuple[int, ...], Range(1)] = ()
    on_bad_sample: str = "raise"
    num_workers: Positive = 1
    batch_size: Positive = 128
    microbatches: Positive = 1
    steps: NonNegative = 0
    samples: NonNegative = 0
    epochs: AtLeastZero = 0.0
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: Positive = 20
    watchdog: AtLeastZero = 1800.0
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    lmar_every: NonNegative = 0
    tensorboard: bool = True
    plugins: tuple[str, ...] = ()

    @property
    def is_language_model(self) -> bool:
        """Whether the run trains a model that generates text, and not a vision encoder alone."""
        return self.objective not in ("patch_classes", "siglip")

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dicts, as it is written into the run's directory."""
        return dataclasses.asdict(self)


# Keys that version 0.1 had, and what they are called now.
RENAMED_KEYS = {
    "length": "max_seq_len",
    "images": "images_per_row",
    "window": "pack_window",
    "reading_threads": "num_workers",
    "probe_every": "lmar_every",
}


# What a user hands over: see `resolve`.
AnyConfig = RunConfig | ml_collections.ConfigDict | Mapping[str, Any]


def resolve(config: AnyConfig) -> RunConfig:
    """The typed configuration of what a user wrote.

    Args:
      config: A `ConfigDict` or a dict, whose missing keys have their defaults, or a `RunConfig`,
        which is returned as it is.

    Raises:
      UserError: for an unknown key, which names the allowed ones, a key of version 0.1, which names
        its present spelling, or a value of another type.
    """
    if isinstance(config, RunConfig):
        return config
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return _build(RunConfig, values, "")


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass of configuration from its fields, whose dotted keys begin with `prefix`."""
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            check_spelling(f"{prefix}{key}")
            raise choice_error("config key", f"{prefix}{key}", hints)
    return kind(**{key: _typed(f"{prefix}{key}", x, hints[key]) for key, x in values.items()})


def check_spelling(key: str) -> None:
    """Refuses a key of version 0.1 in one sentence that names the new one.

    Raises:
      UserError: for such a key.
    """
    if key in RENAMED_KEYS:
        raise UserError(f"config key {key} is now {RENAMED_KEYS[key]}")


def _typed(key: str, value: Any, hint: Any) -> Any:
    """A value of the type that a field is declared with."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return _build(hint, value, f"{key}.")
        raise _type_error(key, value, "with keys of its own")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # text or fields
        return value if isinstance(value, str) else _typed(key, value, arguments[1])
    if origin is tuple:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise _type_error(key, value, "tuple")
        return tuple(_typed(key, item, arguments[0]) for item in items)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise _type_error(key, value, "dict")
        return plain(value)
    if hint is float and type(value) is int:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _type_error(key, value, hint.__name__)
    return value


def _type_error(key: str, value: Any, wanted: str) -> UserError:
    return UserError(f"config key {key} takes a value of type {wanted}, got {value!r}")


def plain(value: Any) -> Any:
    """Nested dicts and tuples in place of other mappings and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value
