"""What is refused, and what is warned of, before a run reads its data or writes anything.

A check of a start is a function that yields a sentence for everything it objects to; `REFUSALS` and
`WARNINGS` list them.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from moresjax.core.errors import UserError, choice_error
from moresjax.core.folders import is_empty
from moresjax.core.parameter_names import named_parameters
from moresjax.data.processor import Processor
from moresjax.data.samples import IMAGE_MARK, Sample
from moresjax.data.sources import Source
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLM
from moresjax.models.vision import VisionConfig
from moresjax.runs.architecture import AnyModel, new_model
from moresjax.runs.config import read_config
from moresjax.runs.identity import changed_settings
from moresjax.runs.run_config import PARTS, RANDOM, RunConfig
from moresjax.runs.saved_identity import saved_identity
from moresjax.training.step import split_model

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """What is known of a run before its data.

    Attributes:
      config: The run's configuration as the user gave it, with the architecture of its sources.
      model: The model; it holds shapes only.
      trains: Names of the parameters that train.
      shards: Number of devices that the rows of a batch are split over.
      processor: The processor of the model; None in a plan, which reads no folder.
    """

    config: RunConfig
    model: AnyModel
    trains: frozenset[str]
    shards: int
    processor: Processor | None = None

    @property
    def llm(self) -> DecoderConfig | None:
        """The LLM, or the text encoder of objective `siglip`."""
        llm = getattr(self.model, "llm", None)
        return None if llm is None else llm.config

    @property
    def vision(self) -> VisionConfig | None:
        """The vision encoder, where there is exactly one."""
        config = getattr(getattr(self.model, "vision", None), "config", None)
        return config if isinstance(config, VisionConfig) else None

    @property
    def visual_tokens(self) -> int:
        """Tokens of an image in a row."""
        return self.model.config.visual_tokens if isinstance(self.model, MLLM) else 1

    def part_trains(self, part: str) -> bool:
        """Whether any base parameter of a part trains."""
        return any(name.startswith(f"{part}.") for name in self.trains)


def check_start(config: RunConfig, shards: int, processor: Processor | None = None) -> None:
    """Refuses a run that cannot be right, and warns of one that is probably not meant.

    Args:
      config: The run's configuration as the user gave it, with the architecture of its sources.
      shards: Number of devices that the rows of a batch are split over.
      processor: The processor of the model; default: what it would tell is not checked.

    Raises:
      UserError: names the key and its value.
    """
    model = new_model(config)
    trains = frozenset(named_parameters(split_model(model, config.also_train)[1]))
    start = Start(config, model, trains, shards, processor)
    for check in REFUSALS:
        for sentence in check(start):
            raise UserError(sentence)
    for check in WARNINGS:
        for sentence in check(start):
            logger.warning(sentence)


# ---- What is refused.


def batch_divides(start: Start) -> Iterator[str]:
    """Every device gets as many rows of every microbatch."""
    config = start.config
    if config.batch_size % (start.shards * config.microbatches):
        yield (
            f"batch_size {config.batch_size} does not divide into {start.shards} parts of the mesh "
            f"times {config.microbatches} microbatches"
        )


def data_has_a_source(start: Start) -> Iterator[str]:
    """Samples come from a source with a name."""
    for key, data in (
        ("data", start.config.data),
        ("validation.data", start.config.validation.data),
    ):
        if (data or key == "data") and not data.get("name"):
            yield f"config key {key} needs a name of a source of samples, such as llava"


def validation_has_data(start: Start) -> Iterator[str]:
    """What is measured has samples, from one place."""
    wanted = start.config.validation
    if wanted.share and wanted.data:
        yield "validation has both data and a share of the training samples; give one"
    if wanted.every and not (wanted.share or wanted.data):
        yield (
            f"validation.every is {wanted.every}, but there is nothing to validate on; give "
            "validation.data or validation.share"
        )


def evaluators_fit_the_model(start: Start) -> Iterator[str]:
    """Validation needs a language model, attention to images also images."""
    config = start.config
    if (config.validation.every or config.lmar_every) and not config.is_language_model:
        yield (
            "validation.every and lmar_every need a language model, not objective "
            f"{config.objective}"
        )
    if config.lmar_every and not (config.model.vision and config.images_per_row):
        yield "lmar_every measures attention to images; this run has none"


def siglip_compares_rows(start: Start) -> Iterator[str]:
    """SigLIP's loss compares the rows of a whole batch, one sample each."""
    config = start.config
    if config.objective != "siglip":
        return
    if config.batching == "pack" or config.microbatches > 1:
        yield (
            "objective siglip compares the rows of a batch, a sample each; leave batching pack and "
            "microbatches out"
        )
    if config.batch_size < 2 or not config.images_per_row:
        yield (
            "objective siglip compares the images and captions of a batch; batch_size must be at "
            f"least 2 and images_per_row at least 1, got {config.batch_size} and "
            f"{config.images_per_row}"
        )


def patches_have_classes(start: Start) -> Iterator[str]:
    """A patch classifier predicts something."""
    if start.config.objective == "patch_classes" and not start.config.model.classes:
        yield "objective patch_classes needs model.classes, the number of classes of every label"


def an_image_fits_a_row(start: Start) -> Iterator[str]:
    """A row has room for one image and a word."""
    config, tokens = start.config, start.visual_tokens
    if config.model.vision and config.images_per_row and tokens >= config.max_seq_len:
        yield (
            f"an image makes {tokens} visual tokens, which do not fit rows of max_seq_len "
            f"{config.max_seq_len}"
        )


def rows_have_learned_positions(start: Start) -> Iterator[str]:
    """Learned positions are a table."""
    llm, length = start.llm, start.config.max_seq_len
    if llm is not None and llm.positions == "learned" and length > llm.max_positions:
        yield f"max_seq_len {length} is more than the LLM's {llm.max_positions} learned positions"


def the_vocabulary_has_all_words(start: Start) -> Iterator[str]:
    """Every token that a text may have has an embedding.

    Control tokens beside those of beginning and end, such as padding, stand in no text.
    """
    if start.llm is None or start.processor is None:
        return
    tokenizer, rows = start.processor.tokenizer, start.llm.vocab_size
    unused = {*tokenizer.all_special_tokens} - {tokenizer.bos_token, tokenizer.eos_token}
    last = max((i for word, i in tokenizer.get_vocab().items() if word not in unused), default=0)
    if last >= rows:
        yield (
            f"the tokenizer has tokens up to id {last}, but model.llm.vocab_size is {rows}; it "
            f"must be at least {last + 1}"
        )


def attention_runs_here(start: Start) -> Iterator[str]:
    """Kernels belong to one kind of device."""
    # A plan has no processor; it is made for devices that are not here.
    wanted, platform = start.config.attention, jax.default_backend()
    at_home = {"splash": "tpu", "cudnn": "gpu"}.get(wanted, platform)
    if start.processor is not None and at_home != platform:
        yield (
            f"config key attention={wanted} is a kernel of {at_home.upper()}s, and this is a "
            f"{platform.upper()}; leave it out, or give xla"
        )


# ---- What is warned of.

NAMES = {"llm": "LLM", "vision": "vision encoder", "connector": "connector"}


def random_parts_train(start: Start) -> Iterator[str]:
    """A part with random weights that stay random is seldom meant."""
    parts = {name.partition(".")[0] for name in named_parameters(start.model)}
    for part in PARTS:
        said = getattr(start.config.init, part)
        if part in parts and not said and not start.part_trains(part):
            yield (
                f"the {NAMES[part]} has random weights and does not train: give init.{part}=RUN or "
                f"FOLDER, train it (also_train={part}), or say init.{part}=random if it is meant"
            )


def new_encoders_use_all_blocks(start: Start) -> Iterator[str]:
    """Blocks after the feature layer are for encoders that were trained with them."""
    vision = start.vision
    if vision is None or start.config.init.source("vision") != RANDOM:
        return
    if (unused := vision.num_layers - vision.used_layers) and start.part_trains("vision"):
        yield (
            f"model.vision.feature_layer={vision.feature_layer} leaves the last {unused} of "
            f"{vision.num_layers} blocks of a vision encoder without use that trains from random "
            "weights; feature_layer=-1 uses all of them"
        )


def rows_have_positions(start: Start) -> Iterator[str]:
    """Rotary positions go on for ever, but an LLM has only seen so many."""
    llm, length = start.llm, start.config.max_seq_len
    if llm is not None and llm.positions == "rope" and length > llm.max_positions:
        yield (
            f"rows of max_seq_len {length} tokens are longer than the {llm.max_positions} "
            "positions that the LLM is made for (model.llm.max_positions)"
        )


def answers_end(start: Start) -> Iterator[str]:
    """A model that never saw an end token never ends an answer."""
    if start.processor is None or not start.config.is_language_model:
        return
    template, eos = start.processor.template, start.processor.tokenizer.eos_token
    if template.keep_question and not (eos if template.end is None else template.end):
        yield (
            "the tokenizer has no end token (eos_token), so that answers train without an end and "
            "generation stops at max_new_tokens only"
        )


def new_vocabularies_know_images(start: Start) -> Iterator[str]:
    """LLaVA folders of `transformers` have an embedding for `<image>`, which is never read."""
    if start.processor is None or start.llm is None or start.config.tokenizer == "digits":
        return
    rows, words = start.llm.vocab_size, start.processor.tokenizer.get_vocab()
    new = start.config.init.source("llm") == RANDOM and start.part_trains("llm")
    if new and IMAGE_MARK not in words and max(words.values(), default=0) >= rows - 1:
        yield (
            f"model.llm.vocab_size {rows} has no row for an {IMAGE_MARK} token, which folders of "
            f"LLaVA need: `export` will add one; {rows + 1} has it from the start"
        )


def edits_meet_tokens(start: Start) -> Iterator[str]:
    """An edit of images alone needs images."""
    config = start.config
    if not isinstance(start.model, MLLM) or (config.model.vision and config.images_per_row):
        return
    for key, selector in start.model.tuning.selectors.items():
        if all(region in ("image", "roi") for region, _ in selector.parts):
            yield f"{key} edits tokens of images only (positions={selector}); this run has none"


def held_out_samples_are_measured(start: Start) -> Iterator[str]:
    """Samples that neither train nor are measured are lost."""
    wanted = start.config.validation
    if (wanted.share or wanted.data) and not (wanted.every or start.config.lmar_every):
        yield (
            "validation samples are held out, but nothing measures them: give validation.every, or "
            "leave validation out"
        )


REFUSALS: tuple[Callable[[Start], Iterator[str]], ...] = (
    batch_divides,
    data_has_a_source,
    validation_has_data,
    evaluators_fit_the_model,
    siglip_compares_rows,
    patches_have_classes,
    an_image_fits_a_row,
    rows_have_learned_positions,
    the_vocabulary_has_all_words,
    attention_runs_here,
)
WARNINGS: tuple[Callable[[Start], Iterator[str]], ...] = (
    random_parts_train,
    new_encoders_use_all_blocks,
    rows_have_positions,
    answers_end,
    new_vocabularies_know_images,
    edits_meet_tokens,
    held_out_samples_are_measured,
)


# ---- What needs the data, or the directory.


def check_samples(config: RunConfig, source: Source) -> None:
    """Refuses samples that the objective cannot train on.

    It looks at the first one, and at the number of classes where the source knows it.

    Raises:
      UserError: says what the objective needs.
    """
    if not len(source):
        raise UserError("there are no training samples")
    try:
        sample = source[0]
    except UserError:  # a bad sample, which is told or skipped when its turn comes
        return
    if config.objective == "patch_classes":
        _check_labels(config, sample)
        _check_classes(config, getattr(source, "class_names", ()))
    elif config.objective in ("next_token", "siglip") and not isinstance(sample, Sample):
        raise UserError(
            f"objective {config.objective} trains on conversations and captions, but "
            f"config.data.name={config.data['name']} gives labels of patches (patch_classes)"
        )


def _check_labels(config: RunConfig, sample: Sample | Mapping) -> None:
    if isinstance(sample, Sample):
        raise UserError(
            "objective patch_classes trains on labels of patches, but "
            f"config.data.name={config.data['name']} gives conversations (next_token)"
        )
    labels, classes = np.asarray(sample["classes"]), config.model.classes
    sets = labels.shape[-1]
    if sets != len(classes) or (labels.max(tuple(range(labels.ndim - 1))) >= classes).any():
        raise UserError(
            f"model.classes is {list(classes)}, but sample {sample['id']} has {sets} labels of a "
            f"patch, up to {labels.reshape(-1, sets).max(0).tolist()}"
        )


def _check_classes(config: RunConfig, names: Sequence[str]) -> None:
    if names and config.model.classes[0] < len(names):
        raise UserError(
            f"model.classes is {list(config.model.classes)}, but the labels of the data are "
            f"{len(names)}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )


def check_workdir(config: RunConfig, workdir: Path, resume: str) -> None:
    """Refuses to mix two runs in one directory, and what is no directory.

    Args:
      config: The run's configuration.
      workdir: The run's directory, which need not exist.
      resume: `auto` or `never`.

    Raises:
      UserError: says what is in the way.
    """
    if resume not in ("auto", "never"):
        raise choice_error("resume", resume, ("auto", "never"))
    if re.match(r"\w+:/", str(workdir)):  # would become a folder of that name
        raise UserError(f"workdir {workdir} is in an object store; give a folder or a mounted one")
    if not workdir.exists() or is_empty(workdir):
        return
    if resume == "never":
        raise UserError(f"workdir {workdir} is not empty and --resume is never")
    if not (workdir / "config.json").is_file():
        raise UserError(f"workdir {workdir} is not empty and holds no run to resume")
    saved = workdir / "checkpoints"
    if saved.is_dir() and not any(saved.glob("[0-9]*")):
        return  # a run that ended before its first checkpoint has nothing to mix with
    step, identity = saved_identity(saved)
    earlier = read_config(workdir / "config.json").to_dict()
    changed = changed_settings(earlier, config, paths_may_change=bool(identity))
    if identity:
        changed += changed_settings(identity["config"], config, paths_may_change=True)
    if changed:
        names = ", ".join(dict.fromkeys(changed))
        raise UserError(
            f"workdir {workdir} holds a run with other settings ({names}); "
            "give another --workdir or the same settings"
        )
    if step > config.steps:
        raise UserError(
            f"workdir {workdir} has trained {step} steps already, more than the {config.steps} of "
            "config key steps; give as many or more, or another --workdir"
        )
