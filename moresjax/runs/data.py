"""The samples of a run and the batches made of them."""

from moresjax.core.errors import UserError
from moresjax.data.pipeline import Batches, make_iterator
from moresjax.data.processor import Processor
from moresjax.data.sources import Source, make_source
from moresjax.data.subset import train_val_split
from moresjax.runs.run_config import RunConfig


def build_sources(config: RunConfig) -> tuple[Source, Source | None]:
    """Training samples of a configuration, and validation samples if it has any.

    Raises:
      UserError: for an unknown source or option, a share that cannot be held out, or other classes
        than the model has.
    """
    source = make_source(**config.data)
    if config.objective == "patch_classes":
        _check_classes(config, source)
    if config.validation.share:
        return train_val_split(source, config.validation.share, config.seed)
    return source, make_source(**config.validation.data) if config.validation.data else None


def _check_classes(config: RunConfig, source: Source) -> None:
    """Refuses a model with other classes than the labels of its samples."""
    names, own = getattr(source, "class_names", None), tuple(config.model.classes)
    if names is not None and own != (len(names),):
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(f"model.classes is {own}, but the labels need ({len(names)},): {some}")


def build_iterator(
    config: RunConfig, processor: Processor, source: Source | None = None
) -> Batches:
    """The batches of a configuration: an endless iterator over this process's share.

    Args:
      config: The run's configuration.
      processor: The processor of its model.
      source: The training samples; default: all that `config.data` names.
    """
    return make_iterator(
        source or make_source(**config.data),
        processor,
        batch_size=config.batch_size,
        max_seq_len=config.max_seq_len,
        images_per_row=config.images_per_row,
        seed=config.seed,
        num_workers=config.num_workers,
        batching=config.batching,
        pack_window=config.pack_window,
        buckets=config.buckets,
        on_bad_sample=config.on_bad_sample,
    )
