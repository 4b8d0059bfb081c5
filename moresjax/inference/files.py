"""Answers to a file of prompts."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from moresjax.core.errors import UserError, choice_error
from moresjax.core.row import Row
from moresjax.data.images import LazyPixels, named_image
from moresjax.data.llava import has_rounds, image_names, to_sample
from moresjax.data.records import JsonRecords
from moresjax.data.samples import Sample
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.inference.model import Model
from moresjax.inference.prompt_inputs import asked_sample
from moresjax.tuning.multi_adapter import BASE

PROMPTS = ("prompt", "question", "text")  # the fields with what is asked, the first one counts
WINDOW = 32  # batches of records that are held at a time


def generate_file(
    model: Model,
    source: str | Path,
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    sampling: Sampling = GREEDY,
    stop: str | Sequence[str] = (),
    adapter_field: str = "adapter",
    details: bool = False,
    logprobs: bool = False,
    system: str | None = None,
    on_answer: Callable[[dict], None] | None = None,
) -> dict[str, int]:
    """Answers every prompt of a JSON or JSON Lines file.

    >>> import pathlib, tempfile
    >>> from moresjax.testing import talking_model
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "in.jsonl").write_text('{"prompt": "how many ?"}')
    >>> generate_file(talking_model(), folder / "in.jsonl", folder / "out.jsonl", max_new_tokens=2)
    {'records': 1, 'errors': 0}

    Args:
      model: The model.
      source: Records `{"id", "prompt", "images"}`, with `roi` and `marks` as `Model.generate` takes
        them for one prompt where selectors want them. `images` is a list of paths or `data:` URLs
        and may be missing; so may `id`, whose place the record's number takes. Files of questions
        are read, too: `question_id`, `question` or `text`, and `image`. In place of a prompt may be
        a conversation that ends with a question, as `messages` or `conversations` (see
        `data/llava.py`). A record may have a `system` prompt, a `seed` for its draws and, where the
        model has several adapters, the name of one (`adapter_field`).
      out: JSON Lines in the same order, `{"id", "prompt", "images", "text"}`, and `adapter` where
        the record names one; of a conversation `prompt` is the last question. A record that cannot
        be answered has the reason as `error` instead of `text`.
      image_root: The folder that paths of images start from; default: the folder of `source`.
      max_new_tokens: An answer has at most this many tokens.
      batch_size: How many prompts are answered at a time.
      sampling: How tokens are chosen; greedy by default.
      stop: An answer ends before the first of these strings.
      adapter_field: The field of a record that names its adapter; `base` or no name stands for the
        base model.
      details: Whether lines also have `tokens` and `stop_reason`.
      logprobs: Whether these lines also have the `logprobs` of their tokens.
      system: The system prompt of records without one of their own; default: the template's.
      on_answer: Called with every line.

    Returns:
      How many records there were (`records`) and how many of them failed (`errors`).

    Raises:
      UserError: `source` cannot be read, `out` cannot be written, an option is bad, or the template
        has no place for a system prompt.
    """
    if logprobs and not details:
        raise UserError("logprobs=True needs details=True: a text has no log-probabilities")
    source, out = Path(source), Path(out)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the file of prompts; the answers need another one")
    model.prompts.system_prompt(system)  # refused before anything is written
    root = source.parent if image_root is None else Path(image_root)
    records, errors = JsonRecords.scan(source), 0
    names = (*model.adapters, BASE) if model.adapters else ()
    with _create(out) as file:
        for start in range(0, len(records), WINDOW * batch_size):
            window = range(start, min(start + WINDOW * batch_size, len(records)))
            lines, rows, known = [], [], {}
            for number in window:
                record = records[number]
                ids = record if isinstance(record, dict) else {}
                lines.append({"id": ids.get("id", ids.get("question_id", number))})
                try:
                    asked = _asked(record, number, str(lines[-1]["id"]))
                    lines[-1] |= _told(record, asked)
                    lines[-1] |= _choices(record, number, adapter_field if names else "", names)
                    asked = _with_images(model, asked, root, record.get("system", system))
                    rows.append(_row(model, asked, max_new_tokens, known))
                except UserError as error:
                    lines[-1]["error"] = str(error)
                    errors += 1
            good = [line for line in lines if "error" not in line]
            seeds = [line.pop("seed", sampling.seed) for line in good]
            done = model.service.generate_many(
                rows,
                max_new_tokens,
                batch_size=batch_size,
                adapters=[line.get("adapter") for line in good] if names else None,
                sampling=sampling,
                seeds=seeds,
                stop=stop,
                logprobs=logprobs,
            )
            for line, one in zip(good, done, strict=True):
                if details:
                    line |= model.prompts.answer(one.tokens, one.logprobs, stop).to_dict()
                else:
                    line["text"] = model.prompts.text(one.tokens, stop)
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if on_answer is not None:
                    on_answer(line)
    return {"records": len(records), "errors": errors}


def _create(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _asked(record: Any, number: int, name: str) -> Sample:
    """The prompt or the conversation of a record, with its images as it names them.

    Raises:
      UserError: It has neither, or one that is malformed.
    """
    record = record if isinstance(record, dict) else {}
    prompt = next((record[key] for key in PROMPTS if key in record), None)
    if isinstance(prompt, list):  # parts of types
        record = record | {"messages": [{"role": "user", "content": prompt}]}
    elif not isinstance(prompt, str) and not has_rounds(record):
        raise UserError(f"record {number} has no text as its 'prompt', 'question' or 'text'")
    images = image_names(record, name)
    if not isinstance(prompt, str):
        return to_sample(record, name, images, prompt=True)
    if not prompt.strip() and not images:
        raise UserError("the prompt is empty")
    return asked_sample(name, prompt, images, roi=record.get("roi"), marks=record.get("marks"))


def _told(record: dict, asked: Sample) -> dict:
    """What an answer's line repeats of its record; of a `data:` URL the beginning."""
    prompt = next((record[key] for key in PROMPTS if key in record), None)
    urls = [image.startswith("data:") for image in asked.images]
    images = [f"{x[:40]}..." if url else x for x, url in zip(asked.images, urls, strict=True)]
    return {
        "prompt": prompt if isinstance(prompt, str) else asked.turns[-1].question,
        "images": images,
    }


def _choices(record: dict, number: int, adapter_field: str, adapters: Sequence[str]) -> dict:
    """The `adapter` and the `seed` that a record asks for.

    Raises:
      UserError: The adapter is unknown, or the seed is none.
    """
    chosen = {}
    adapter, seed = record.get(adapter_field) if adapter_field else None, record.get("seed")
    if adapter is not None:
        if adapter not in adapters:
            raise choice_error(f"adapter of record {number}", adapter, adapters)
        chosen["adapter"] = adapter
    if seed is not None:
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(
                f"record {number}: 'seed' must be a whole number below 2**32, got {seed!r}"
            )
        chosen["seed"] = seed
    return chosen


def _with_images(model: Model, asked: Sample, root: Path, system: str | None) -> Sample:
    """The conversation with its images to be opened, and its system prompt."""
    system = model.prompts.system_prompt(asked.system or system)
    images = tuple(named_image(root, image, f"sample {asked.id}") for image in asked.images)
    return dataclasses.replace(asked, images=images, system=system)


def _row(model: Model, asked: Sample, max_new_tokens: int, known: dict) -> Row:
    row = model.prompts.sample_row(asked, known)
    model.service.check_context(row, max_new_tokens)
    if isinstance(row.pixels, LazyPixels):
        row.pixels.open()  # a broken image is this record's error
    return row
