"""What the sources of a run's parts say about it: architecture and tokenizer.

A configuration that names where a part's weights come from need not say again what the part is.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError
from moresjax.core.types import Tokenizer
from moresjax.data.images import saved_image_size
from moresjax.data.saved_processors import has_tokenizer, saved_template
from moresjax.data.templates import OWN, get_template
from moresjax.models.decoder import DecoderConfig
from moresjax.models.vision import VisionConfig
from moresjax.models.zoo import ENCODERS, LLMS
from moresjax.runs.architecture import DEFAULT_CONNECTOR, llm_config, missing_fields, vision_config
from moresjax.runs.config import read_config
from moresjax.runs.paths import is_workdir, locate
from moresjax.runs.processor import load_tokenizer
from moresjax.runs.run_config import PARTS, RANDOM, PartChoice, RunConfig
from moresjax.runs.same_parts import PartConfig, check_same_part
from moresjax.weights.hf import HFFolder
from moresjax.weights.vision_folder import load_vision_config


def with_sources(config: RunConfig, root: str | Path) -> RunConfig:
    """The configuration with architecture and tokenizer of its sources, where it says nothing.

    `model.llm`, `model.vision` and `model.connector` come from the sources of the same parts, the
    tokenizer from that of the LLM. Fields of a part that are no whole architecture change some of
    its source's.

    Args:
      config: A run's configuration.
      root: The run's directory, from which paths with a leading dot start.

    Raises:
      UserError: A source that is needed does not exist or does not say it.
    """
    parts = config.model
    model = dataclasses.replace(
        parts,
        llm=_part(config, "llm", root),
        vision=_part(config, "vision", root),
        connector=_part(config, "connector", root) or DEFAULT_CONNECTOR,
    )
    tokenizer = config.tokenizer or _tokenizer(config, root)
    if (model, tokenizer) == (parts, config.tokenizer):
        return config
    return dataclasses.replace(config, model=model, tokenizer=tokenizer)


def check_sources(config: RunConfig, root: str | Path) -> None:
    """Refuses sources of parts that are others than the configuration says; reads no weights.

    Args:
      config: A run's configuration with its architecture.
      root: The run's directory, from which paths with a leading dot start.

    Raises:
      UserError: Names the key and both values.
    """
    for part in PARTS:
        given, source = getattr(config.model, part), config.init.source(part)
        if source == RANDOM or ";" in source or not given:
            continue
        folder = locate(source, root)
        if found := _part_of(part, folder):
            ours, theirs = (_configured(part, choice) for choice in (given, found))
            check_same_part(part, ours, theirs, folder)


def check_same_tokenizer(config: RunConfig, root: str | Path, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer whose words are not those that the source of the LLM was trained with.

    Words that one of the two lacks are no difference, nor are other names for control tokens.

    Args:
      config: A run's configuration.
      root: The run's directory, from which paths with a leading dot start.
      tokenizer: The run's tokenizer.

    Raises:
      UserError: Names a token that the two spell differently.
    """
    name = _tokenizer(config, root)
    if not name or _same_place(name, config.tokenizer, root):
        return
    theirs = load_tokenizer(name, root)
    control = {*tokenizer.all_special_tokens, *theirs.all_special_tokens}
    words = {i: word for word, i in tokenizer.get_vocab().items() if word not in control}
    other = {i: word for word, i in theirs.get_vocab().items() if word not in control}
    wrong = sorted(i for i in words.keys() & other.keys() if words[i] != other[i])
    if wrong:
        raise UserError(
            f"tokenizer {config.tokenizer} is not that of init.llm {config.init.llm}: {len(wrong)} "
            f"tokens differ, the first is {words[wrong[0]]!r} here and {other[wrong[0]]!r} there "
            f"(id {wrong[0]}); leave config key tokenizer out to take that one"
        )


def _same_place(one: str, other: str, root: str | Path) -> bool:
    return one == other or (
        "digits" not in (one, other) and locate(one, root) == locate(other, root)
    )


def _configured(part: str, choice: PartChoice) -> PartConfig:
    """The architecture of a part that is chosen by name or fields."""
    if part == "llm":
        return llm_config(choice)
    vision = vision_config(choice) if part == "vision" else None
    return str(choice) if vision is None else vision


# A part's configuration, and its names in the zoo.
_KINDS: dict[str, tuple[type, Mapping[str, Any]]] = {
    "llm": (DecoderConfig, LLMS),
    "vision": (VisionConfig, ENCODERS),
}


def _part(config: RunConfig, part: str, root: str | Path) -> Any:
    """A part as the configuration says it, or its source."""
    given, source = getattr(config.model, part), config.init.source(part)
    if source == RANDOM or ";" in source or not _needs_source(part, given):
        return given
    folder = locate(source, root)
    if part == "connector" and not folder.exists():
        return given  # for plans; a run is told when its sources are checked
    found = _part_of(part, folder)
    if not given or not found:
        return found or given
    _, zoo = _KINDS[part]
    fields = dataclasses.asdict(zoo[found]) if isinstance(found, str) else found
    return {**fields, **given}


def _needs_source(part: str, given: PartChoice) -> bool:
    """Whether a configuration leaves something of a part to its source."""
    if not given:
        return True
    if isinstance(given, str) or "encoders" in given:
        return False
    return bool(missing_fields(given, _KINDS[part][0]))


def _part_of(part: str, source: Path) -> PartChoice:
    """What a source says about a part; empty where it has none."""
    if is_workdir(source):
        return getattr(read_config(source / "config.json").model, part)
    if not (source.is_file() or (source / "config.json").is_file()):
        raise UserError(f"init.{part}: {source} is neither a workdir nor a Hugging Face folder")
    folder = HFFolder(source)
    if folder.is_vision:
        if part != "vision":
            raise UserError(f"init.{part}: {source} is a vision encoder")
        return dataclasses.asdict(load_vision_config(folder, at_size=saved_image_size(source)))
    if part == "connector":
        return folder.config.connector if folder.config.vision else ""
    found = getattr(folder.config, part)
    return dataclasses.asdict(found) if found else ""


def earlier_template(config: RunConfig, root: str | Path) -> tuple[str, str]:
    """The template that the LLM of a run was asked with before, and where it is from.

    Args:
      config: A run's configuration whose own template drops questions.
      root: The run's directory.

    Returns:
      The name of the template and the folder; both empty where none is known.
    """
    source = config.init.source("llm")
    if source == RANDOM:
        return "", ""
    folder = locate(source, root)
    if is_workdir(folder):
        run = read_config(folder / "config.json")
        if not run.tokenizer:
            return "", ""
        template = get_template(run.template, load_tokenizer(run.tokenizer, folder))
        return (run.template, source) if template.keep_question else earlier_template(run, folder)
    if noted := saved_template(folder):
        return noted, source
    if has_tokenizer(folder) and load_tokenizer(str(folder)).chat_template:
        return OWN, source
    return "", ""


def _tokenizer(config: RunConfig, root: str | Path) -> str:
    """The tokenizer of the LLM's source, as the configuration would name it; empty if unknown."""
    source = config.init.llm
    if source in ("", RANDOM):
        return ""
    folder = locate(source, root)
    if not is_workdir(folder):
        return source if has_tokenizer(folder) else ""
    name = read_config(folder / "config.json").tokenizer
    # What starts with a dot starts from the source.
    return f"{source}/{name}" if name.startswith(".") else name
