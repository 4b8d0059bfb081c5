"""The folders that a run's configuration names."""

import dataclasses
from pathlib import Path

from moresjax.runs.run_config import RANDOM, InitConfig, RunConfig


def locate(name: str, root: str | Path) -> Path:
    """The folder that a configuration names.

    Args:
      name: What starts with a dot (`../llm`) starts from `root`, so that runs may move together;
        everything else starts from where the command runs.
      root: The run's directory.
    """
    return (Path(root) / name if name.startswith(".") else Path(name)).resolve()


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A configuration whose folders can be found from anywhere.

    Paths that start from where the command runs are made absolute; a part without a source is
    `random`.
    """

    def absolute(name: str) -> str:
        kept = not name or name in (RANDOM, "digits") or name.startswith(".")
        return name if kept else ";".join(str(Path(part).resolve()) for part in name.split(";"))

    return dataclasses.replace(
        config,
        init=InitConfig(**{part: absolute(source) for part, source in config.init.sources.items()}),
        tokenizer=absolute(config.tokenizer),
        image_processor=absolute(config.image_processor),
    )


def is_workdir(path: Path) -> bool:
    """Whether a folder is a run's directory rather than a Hugging Face checkpoint."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()
