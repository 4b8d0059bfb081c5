"""Training files of benchmarks: official downloads turned into LLaVA's conversation format.

A benchmark's file registers a function with `@training_records(name)`. It reads the annotations
below `root`, which are the files in the benchmark's docstring with `train` in the place of the
evaluation's split, and yields LLaVA records whose image paths start from `root`. Prompts are those
of LLaVA-Steering's training files, which differ from those of the benchmarks themselves.

In the written file image paths start from one folder for all tasks, which is where the file is:
`data/tasks/vizwiz_10000.json` names `vizwiz/train/...`, with the download in `data/tasks/vizwiz`.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.core.json_files import write_json
from moresjax.core.plugins import load_plugins
from moresjax.core.registry import registrar
from moresjax.data.images import image_path
from moresjax.data.samples import IMAGE_MARK
from moresjax.data.task_names import task_name

SEED = 42
# Photos that several downloads share lie beside them; a record names them from its own download.
SHARED = "../coco/"
# Sizes of the multi-scale experiments, by name.
SIZES = {"1K": 1_000, "5K": 5_000, "10K": 10_000}

Record = dict[str, Any]
# (root, split, random generator) -> records
RecordReader = Callable[[Path, str, random.Random], Iterator[Record]]
_READERS: dict[str, RecordReader] = {}


def training_records(name: str) -> Callable[[RecordReader], RecordReader]:
    """A decorator that registers the function which yields a benchmark's training records.

    Raises:
      UserError: The name belongs to another function.
    """
    return registrar(_READERS, "training records", name)


def trainable_names() -> list[str]:
    """The names of all benchmarks with training records, sorted."""
    # The built-in benchmarks register themselves on import.
    from moresjax.evaluation import benchmarks  # noqa: F401

    load_plugins()
    return sorted(_READERS)


def build_training_file(
    name: str,
    root: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    size: str = "",
    image_root: str | Path = "",
) -> dict[str, int]:
    """Writes a benchmark's training file.

    Args:
      name: The benchmark's name; spellings such as `iconQA-txt` stand for `iconqa_txt`.
      root: The folder of the official download.
      out: The JSON file to write.
      split: The split, under its name in the download.
      size: `1K`, `5K`, `10K` or a number of samples to draw; a smaller benchmark is taken whole.
        Empty takes all.
      image_root: The folder that image paths of the written file start from, with the download
        below it: `data.image_root` of a configuration. Default: the folder of `out`.

    Returns:
      `available`, how many samples there are, and `written`.

    Raises:
      UserError: The name or the size is unknown, the download is not below the image root or lacks
        a file, or an image path leaves the download.
    """
    names, name = trainable_names(), task_name(name)
    if name not in names:
        raise choice_error("task", name, names)
    if size and size not in SIZES and not (size.isdecimal() and int(size)):
        raise choice_error("size", size, (*SIZES, "a number of samples"))
    root, out = Path(root), Path(out)
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder")
    prefix = _below(root, Path(image_root) if image_root else out.parent)
    records = list(_READERS[name](root, split, random.Random(SEED)))
    if not records:
        raise UserError(f"task {name}: {root} has no samples of split {split!r}")
    chosen = subset(records, SIZES.get(size) or int(size)) if size else records
    placed = [_placed(record, prefix) for record in chosen]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, placed, indent=1)
    return {"available": len(records), "written": len(placed)}


def _below(root: Path, image_root: Path) -> Path:
    """The path of a download from the image root."""
    try:
        return root.resolve().relative_to(image_root.resolve())
    except ValueError:
        raise UserError(
            f"the download {root} is not below {image_root}, where image paths of the written file "
            f"would start; put it there, or start them elsewhere: --image-root {root}"
        ) from None


def _placed(record: Record, prefix: Path) -> Record:
    """A record whose image path starts from the image root instead of the download."""
    name, sample = record["image"], f"sample {record['id']}"
    if not name.startswith(SHARED):
        return record | {"image": image_path(prefix, name, sample).as_posix()}
    image_path(prefix, name.removeprefix(SHARED), sample)
    path = os.path.normpath(prefix / name)
    if path.startswith(os.pardir):
        raise UserError(
            f"{sample}: its photo is in the folder `coco` beside the download; start image paths "
            "above both: --image-root"
        )
    return record | {"image": Path(path).as_posix()}


def subset(records: Sequence[Record], size: int) -> list[Record]:
    """`min(size, len(records))` different records, drawn with the fixed seed."""
    return random.Random(SEED).sample(list(records), min(size, len(records)))


def llava_record(name: object, image: str, question: str, answer: object) -> Record:
    r"""One question about one image, in LLaVA's format.

    >>> llava_record(7, "a.jpg", "Is it red?", "yes")["conversations"][0]["value"]
    '<image>\nIs it red?'
    """
    rounds = [("human", f"{IMAGE_MARK}\n{question}"), ("gpt", str(answer))]
    conversations = [{"from": role, "value": value} for role, value in rounds]
    return {"id": str(name), "image": image, "conversations": conversations}
