"""Reading a whole data set before training: what is in it, how long it is, and what is bad."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.core.row import Row
from moresjax.data.images import open_image
from moresjax.data.packing import first_fit
from moresjax.data.pipeline import PACK_WINDOW
from moresjax.data.processor import Processor
from moresjax.data.records import ChangedFile
from moresjax.data.samples import EARLY_TURNS, LATER_TURNS, Sample
from moresjax.data.sources import Source

CHUNK = 64  # samples that a worker takes at once
STARTING = 40  # chunks that are read while a worker starts
BINS = 16
FAR_FROM_SQUARE = 1.25  # the longer side by the shorter one, from which a shape is told


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What `check_data` found.

    Attributes:
      samples: The number of samples, bad ones included.
      text_only: The number of good samples without an image.
      images: The number of images of all good samples.
      tokens: The number of tokens of all good samples, visual ones included.
      answer_tokens: The number of those tokens that are trained.
      longest: The number of tokens of the longest good sample.
      histogram: For bins of equal width the first token count and the number of good samples.
      useful: The fraction of tokens that are no padding, by batching `pad` and `pack`, for the
        samples that fit.
      too_long: The sizes of every sample that does not fit into a row, by its number.
      bad: The error of every other sample that cannot be used, by its number.
      cut: What is left out of a good sample, by its number.
      cut_kinds: The number of good samples by what is left out of them.
      reshaped: The number of images whose sides differ by a quarter or more and that become squares
        without padding: squeezed, or cropped.
      labels: The number of labels of every class, for images with labels.
    """

    samples: int
    text_only: int
    images: int
    tokens: int
    answer_tokens: int
    longest: int
    histogram: tuple[tuple[int, int], ...]
    useful: dict[str, float]
    too_long: dict[int, str]
    bad: dict[int, str]
    cut: dict[int, str]
    cut_kinds: dict[str, int]
    reshaped: int = 0
    labels: dict[str, int] = dataclasses.field(default_factory=dict)


def count_cut(source: Source, processor: Processor) -> dict[str, int]:
    """The number of samples by what is left out of them, without reading them.

    Where the source does not know its turns, nothing is counted.
    """
    turns = np.asarray(getattr(source, "turn_counts", ()))
    if not turns.size:
        return {}
    early, questions = turns.T
    later = 0 if processor.template.keep_question else int((questions > 1).sum())
    counts = {EARLY_TURNS: int((early > 0).sum()), LATER_TURNS: later}
    return {kind: count for kind, count in counts.items() if count}


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One sample: tokens, trained tokens and images, or why it is bad."""

    index: int
    name: str = ""
    tokens: int = 0
    answer_tokens: int = 0
    images: int = 0
    reshaped: int = 0
    error: str = ""
    cut: str = ""


def check_data(
    source: Source,
    make_processor: Callable[[], Processor] | None,
    *,
    max_seq_len: int | None = None,
    images_per_row: int | None = None,
    num_workers: int = 0,
    decode: bool = True,
    progress: bool = True,
) -> DataReport:
    """Reads and tokenises every sample, and looks at every image.

    Args:
      source: The samples.
      make_processor: Builds the processor, once in every worker process (so it must be picklable);
        without one no tokens are counted.
      max_seq_len: The number of tokens that a row holds; None for any number.
      images_per_row: The number of images that a row holds; None for any number.
      num_workers: The number of processes; 0: one per core, fewer for few samples. One worker is
        this process.
      decode: Whether images are decoded, which takes most of the time; else they are not opened.
      progress: Whether to show a progress bar.

    Raises:
      UserError: The processor cannot be built.
    """
    chunks = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    num_workers = num_workers or min(os.cpu_count() or 1, -(-len(chunks) // STARTING))
    # Here as well: a mistake is told before workers start.
    processor = make_processor and make_processor()
    if num_workers == 1:
        results = (_measure(source, processor, chunk, decode) for chunk in chunks)
    else:
        results = _in_parallel(source, make_processor, chunks, num_workers, decode)
    found = []
    with tqdm(total=len(source), unit="sample", disable=not progress) as bar:
        for measured in results:
            found += measured
            bar.update(len(measured))
    report = _report(found, max_seq_len, images_per_row)
    return dataclasses.replace(report, labels=getattr(source, "label_counts", {}))


def _measure(
    source: Source, processor: Processor | None, chunk: range, decode: bool
) -> list[_Measured]:
    found = []
    for index in chunk:
        try:
            sample = source[index]
            if hasattr(source, "label_counts"):
                assert not isinstance(sample, Sample)
                sample = Sample(sample["id"], (), (sample["pixels"],))
                found.append(_measure_one(index, sample, None, decode))
            else:
                found.append(_measure_one(index, sample, processor, decode))
        except ChangedFile:
            raise
        except UserError as error:
            found.append(_Measured(index, error=str(error)))
        except Exception as error:  # one bad sample of a plug-in's source costs itself
            said = f"sample {index}: {type(error).__name__}: {error}"
            found.append(_Measured(index, error=said))
    return found


def _measure_one(
    index: int, sample: object, processor: Processor | None, decode: bool
) -> _Measured:
    if not isinstance(sample, Sample):
        raise UserError(f"sample {index} of this source is no conversation")
    row = Row.text(()) if processor is None else processor.text_row(sample)
    kept = processor is None or processor.image is None or processor.image.aspect != "square"
    reshaped = 0
    try:
        for image in sample.images if decode else ():
            width, height = open_image(image).size
            reshaped += not kept and max(width, height) >= FAR_FROM_SQUARE * min(width, height)
    except UserError as error:
        raise UserError(f"sample {sample.id}: {error}") from None
    if processor is not None and decode:
        processor.roi(sample)
    answers = int((row.kind == TokenKind.ANSWER).sum())
    cut = sample.cut if processor is None else processor.left_out(sample)
    return _Measured(index, sample.id, len(row), answers, len(sample.images), reshaped, cut=cut)


# The source and the processor of a worker process. They are set once when it starts, since sending
# them with every chunk would cost more than the work.
_worker: list[tuple[Source, Processor | None]] = []


def _start_worker(source: Source, make_processor: Callable[[], Processor] | None) -> None:
    _worker[:] = [(source, make_processor and make_processor())]


def _work(chunk: range, decode: bool) -> list[_Measured]:
    (source, processor), *_ = _worker
    return _measure(source, processor, chunk, decode)


def _in_parallel(
    source: Source,
    make_processor: Callable[[], Processor] | None,
    chunks: Sequence[range],
    num_workers: int,
    decode: bool,
) -> Iterator[list[_Measured]]:
    with concurrent.futures.ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # JAX's threads do not survive a fork
        initializer=_start_worker,
        initargs=(source, make_processor),
    ) as pool:
        yield from pool.map(_work, chunks, [decode] * len(chunks))


def _report(
    found: Sequence[_Measured], max_seq_len: int | None, images_per_row: int | None
) -> DataReport:
    good = [m for m in found if not m.error]
    most = math.inf if max_seq_len is None else max_seq_len
    pictures = math.inf if images_per_row is None else images_per_row
    fits = [m for m in good if m.tokens <= most and m.images <= pictures]
    sizes = f"rows hold {max_seq_len} tokens and {images_per_row} images"
    too_long = {
        m.index: f"sample {m.name}: {m.tokens} tokens and {m.images} images, but {sizes}"
        for m in good
        if m.tokens > most or m.images > pictures
    }
    tokens = np.asarray([m.tokens for m in good], int)
    longest = int(tokens.max(initial=0))
    width = max(-(-(longest + 1) // BINS), 1)
    counts = np.bincount(tokens // width, minlength=1)
    return DataReport(
        samples=len(found),
        text_only=sum(m.images == 0 for m in good),
        images=sum(m.images for m in good),
        tokens=int(tokens.sum()),
        answer_tokens=sum(m.answer_tokens for m in good),
        longest=longest,
        histogram=tuple((i * width, int(n)) for i, n in enumerate(counts)),
        useful={}
        if max_seq_len is None or images_per_row is None
        else _useful(fits, max_seq_len, images_per_row),
        too_long=too_long,
        bad={m.index: m.error for m in found if m.error},
        cut={m.index: f"sample {m.name}: {m.cut}" for m in good if m.cut},
        reshaped=sum(m.reshaped for m in good),
        cut_kinds={
            kind: count
            for kind in (EARLY_TURNS, LATER_TURNS)
            if (count := sum(kind in m.cut for m in good))
        },
    )


def _useful(fits: Sequence[_Measured], max_seq_len: int, images_per_row: int) -> dict[str, float]:
    """The fractions of tokens that are no padding, were the samples read in their order."""
    if not fits:
        return {}
    tokens, images = [m.tokens for m in fits], [m.images for m in fits]
    starts = range(0, len(fits), PACK_WINDOW)
    windows = [slice(start, start + PACK_WINDOW) for start in starts]
    packed = sum(len(first_fit(tokens[w], images[w], max_seq_len, images_per_row)) for w in windows)
    rows = {"pad": len(fits), "pack": packed}
    return {name: sum(tokens) / (count * max_seq_len) for name, count in rows.items()}
