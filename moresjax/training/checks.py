"""What is refused before a run builds or writes anything."""

import re
from pathlib import Path

from moresjax.core.errors import UserError, choice_error
from moresjax.runs.checkpoint import saved_identity
from moresjax.runs.config import read_config
from moresjax.runs.identity import changed_settings
from moresjax.runs.run_config import RunConfig


def check_numbers(config: RunConfig, shards: int) -> None:
    """Refuses sizes that cannot work before anything is built or written.

    Args:
      config: The run's configuration.
      shards: Number of devices that the rows of a batch are split over.

    Raises:
      UserError: names the key and its value.
    """
    check_evaluators(config)
    if config.objective == "siglip" and (config.batching == "pack" or config.microbatches > 1):
        raise UserError(
            "objective siglip compares the rows of a batch, a sample each; leave batching pack and "
            "microbatches out"
        )
    if config.batch_size % (shards * config.microbatches):
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {shards} parts of the mesh times "
            f"{config.microbatches} microbatches"
        )


def check_evaluators(config: RunConfig) -> None:
    """Refuses settings of validation and attention statistics that cannot work.

    Raises:
      UserError: names the key and its value.
    """
    wanted = config.validation
    if wanted.share and wanted.data:
        raise UserError("validation has both data and a share of the training samples; give one")
    if wanted.every and not (wanted.share or wanted.data):
        raise UserError(
            f"validation.every is {wanted.every}, but there is nothing to validate on; give "
            "validation.data or validation.share"
        )
    if (wanted.every or config.lmar_every) and not config.is_language_model:
        raise UserError(
            "validation.every and lmar_every need a language model, not objective "
            f"{config.objective}"
        )
    if config.lmar_every and not (config.model.vision and config.images_per_row):
        raise UserError("lmar_every measures attention to images; this run has none")


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
    if not workdir.exists() or not any(workdir.iterdir()):
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
