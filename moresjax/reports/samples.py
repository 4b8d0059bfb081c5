"""What a model is given of a sample: its tokens, their kinds, labels and edits, and its images.

Axis legend: Y, X pixels.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moresjax.core.layout import TokenKind, loss_mask
from moresjax.data.processor import Processor
from moresjax.data.samples import Sample
from moresjax.reports.html import image_uri, render
from moresjax.tuning.selectors import Selector, marked_tokens


@dataclasses.dataclass(frozen=True)
class ShownToken:
    """One token of a row.

    Attributes:
      text: What the tokenizer writes for it alone; empty for a visual token.
      id: Its number; the one under a visual token is never read.
      kind: The name of its `TokenKind`.
      branch: 0 for the trunk, k for the k-th independent question.
      position: Its rotary position.
      trained: Whether it is a label, that is whether a token's loss asks for it.
      edits: The edits that change it.
    """

    text: str
    id: int
    kind: str
    branch: int
    position: int
    trained: bool
    edits: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShownSample:
    """The tokens of a sample, and its images as the encoder is given them, in colours again."""

    name: str
    tokens: tuple[ShownToken, ...]
    images: tuple[UInt8[np.ndarray, "Y X 3"], ...]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, without the images."""
        tokens = [dataclasses.asdict(token) for token in self.tokens]
        return {"name": self.name, "images": len(self.images), "tokens": tokens}

    def segments(self) -> list[tuple[ShownToken, ...]]:
        """Consecutive tokens of one kind and branch."""
        groups = itertools.groupby(self.tokens, key=lambda token: (token.kind, token.branch))
        return [tuple(tokens) for _, tokens in groups]


def show_sample(
    sample: Sample,
    processor: Processor,
    edits: Mapping[str, Selector] | None = None,
    words: Mapping[str, Sequence[int]] | None = None,
) -> ShownSample:
    """A sample as a model is given it.

    >>> from moresjax.data.digits import build_tokenizer
    >>> from moresjax.data.samples import Turn
    >>> from moresjax.data.templates import get_template
    >>> processor = Processor(build_tokenizer(), get_template("bare"))
    >>> shown = show_sample(Sample("one", (Turn("what is it ?", "nine"),)), processor)
    >>> [token.text for token in shown.tokens if token.trained]
    ['nine', '</s>']

    Args:
      sample: A conversation with its images.
      processor: The processor of the model.
      edits: Names of edits, and which tokens each changes.
      words: Token ids of each word that a `token(WORD)` selector names.

    Raises:
      UserError: The sample cannot be made a row.
    """
    row = processor.row(sample)
    batch = processor.batch([row])
    marked = marked_tokens(batch.marks, processor.marks)
    trained = np.roll(np.asarray(loss_mask(batch.layout))[0], 1)
    masks = {
        name: np.asarray(selector(batch.layout, batch.tokens, batch.roi, words, marked=marked))[0]
        for name, selector in (edits or {}).items()
    }
    tokens = []
    for number, id in enumerate(row.tokens.tolist()):
        visual = row.kind[number] == TokenKind.IMAGE
        token = ShownToken(
            text="" if visual else processor.tokenizer.decode([id]),
            id=id,
            kind=TokenKind(row.kind[number]).name,
            branch=int(row.branch[number]),
            position=int(row.position[number]),
            trained=bool(trained[number]),
            edits=tuple(name for name, mask in masks.items() if mask[number]),
        )
        tokens.append(token)
    images = () if row.pixels is None else np.asarray(row.pixels)
    shown = () if processor.image is None else map(processor.image.to_picture, images)
    return ShownSample(sample.id, tuple(tokens), tuple(shown))


def sample_text(shown: ShownSample, processor: Processor) -> str:
    """A sample in a few lines: every segment with its positions, its text and what acts on it."""
    trained = sum(token.trained for token in shown.tokens)
    lines = [
        f"{shown.name}: {len(shown.tokens)} tokens, {trained} of them trained; "
        f"images: {len(shown.images)}"
    ]
    for tokens in shown.segments():
        first, last = tokens[0], tokens[-1]
        name = f"{first.kind}{f' {first.branch}' if first.branch else ''}"
        ids = [token.id for token in tokens]
        image = first.kind == TokenKind.IMAGE.name
        text = f"{len(ids)} visual tokens" if image else repr(processor.tokenizer.decode(ids))
        counts = {"trained": sum(token.trained for token in tokens)}
        for edit in dict.fromkeys(edit for token in tokens for edit in token.edits):
            counts[edit] = sum(edit in token.edits for token in tokens)
        notes = [f"{what} {n} of {len(ids)}" for what, n in counts.items() if n]
        where = f"{first.position}-{last.position}"
        lines.append("  ".join([f"  {name:<12}{where:>9}", text, *notes]))
    return "\n".join(lines)


def write_samples_page(shown: Sequence[ShownSample], path: str | Path) -> Path:
    """One self-contained HTML page of several samples."""
    samples = [
        {
            "name": sample.name,
            "count": len(sample.tokens),
            "trained": sum(token.trained for token in sample.tokens),
            "segments": sample.segments(),
            "images": [image_uri(image) for image in sample.images],
        }
        for sample in shown
    ]
    edits = dict.fromkeys(edit for s in shown for token in s.tokens for edit in token.edits)
    return render("samples.html.j2", path, samples=samples, edits=list(edits))
