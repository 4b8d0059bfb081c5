"""A run's directory as a model."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from moresjax.core.errors import UserError, choice_error
from moresjax.core.plugins import explain_missing
from moresjax.data.processor import Processor
from moresjax.models.initialize import abstract_params, initialize, set_params
from moresjax.models.layers import DTYPES
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.runs.architecture import model_config
from moresjax.runs.config import read_config
from moresjax.runs.init_tuning import load_shared
from moresjax.runs.init_weights import load_parts, trained_parameters
from moresjax.runs.paths import is_workdir
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import PARTS, RANDOM, RunConfig
from moresjax.tuning.methods.qlora import without_qlora
from moresjax.tuning.spec import parse_spec
from moresjax.weights.hf import HFFolders, pretrained_config


def load_workdir(
    workdir: str | Path,
    *,
    tuning: str | None = None,
    quantize: str | None = None,
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> tuple[MLLM, Processor | None]:
    """Model and processor of a run.

    The base parts come from their sources, what trained from the newest checkpoint.

    Args:
      workdir: The run's directory.
      tuning: Spec that is attached, freshly initialised, instead of the run's own; `none` gives the
        base with what trained beside the tuning, such as the connector. Default: the run's own
        with its trained parameters, and the same for the same spec.
      quantize: `int8`, or empty for weights as they are stored; default: as the run had it.
      allow_pickle: Whether `*.bin` files of the base parts may be read where there are no
        safetensors.
      mesh: The devices over which weights of Hugging Face folders are split as they are read.
      dtype: The dtype of the activations; default: as the run had it.

    Raises:
      UserError: when the folder is not a run's directory, or the tuning does not fit its model.
    """
    workdir = Path(workdir)
    trained = trained_parameters(workdir)
    config = read_config(workdir / "config.json")
    if not config.is_language_model:
        raise UserError(f"{workdir} trained {config.objective}; it is not a language model")
    if quantize is not None:
        config = dataclasses.replace(config, quantize=quantize)
    if dtype is not None:
        if dtype not in DTYPES:
            raise choice_error("dtype of a run", dtype, DTYPES)
        config = dataclasses.replace(config, dtype=dtype)
    with explain_missing(config.plugins, str(workdir)):
        return _build(config, workdir, trained, tuning, allow_pickle, mesh)


def _build(
    config: RunConfig,
    workdir: Path,
    trained: dict[str, jax.Array],
    tuning: str | None,
    allow_pickle: bool,
    mesh: Mesh | None,
) -> tuple[MLLM, Processor | None]:
    """Model and processor of a run from its configuration and the parameters that it trained."""
    architecture = model_config(config)
    # Over whole weights, which an export writes, the same parameters are those of `lora`.
    spec = config.tuning if architecture.llm.int8 else without_qlora(config.tuning)
    model = MLLM(architecture, spec)
    chosen = None if tuning is None else MLLM(architecture, tuning)
    if chosen is not None and chosen.tuning.spec != model.tuning.spec:
        model = chosen
        trained = {name: x for name, x in trained.items() if not name.startswith("tuning.")}
    set_params(model, trained, str(workdir))
    sources = {p: config.init.source(p) if abstract_params(model, p) else RANDOM for p in PARTS}
    folders = HFFolders(allow_pickle=allow_pickle)
    load_parts(model, sources, workdir, mesh=mesh, folders=folders)
    # A model that was imported without a tokenizer has no processor.
    processor = build_processor(config, root=workdir) if config.tokenizer else None
    initialize(model, config.seed)
    if model is not chosen:
        load_shared(model.tuning, workdir)
    set_params(model, trained, str(workdir))  # what trained wins over what it was started from
    return model, processor


def saved_config(folder: str | Path) -> tuple[MLLMConfig, str]:
    """Architecture and tuning spec of a run's directory or a Hugging Face folder, without weights.

    Raises:
      UserError: when the folder is neither.
    """
    folder = Path(folder)
    if is_workdir(folder):
        config = read_config(folder / "config.json")
        with explain_missing(config.plugins, str(folder)):
            parse_spec(config.tuning)
        return model_config(config), config.tuning
    return pretrained_config(folder), "none"
