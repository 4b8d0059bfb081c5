"""What a JSON file of one's own holds: conversations, questions or labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from moresjax.core.errors import UserError
from moresjax.data.labels import LabelsSource
from moresjax.data.llava import LlavaSource
from moresjax.data.records import JsonRecords
from moresjax.data.samples import Sample, Turn
from moresjax.data.sources import Source
from moresjax.evaluation.examples import Example
from moresjax.evaluation.questions import load_questions


@dataclasses.dataclass(frozen=True)
class QuestionSamples:
    """Questions of an evaluation as samples, so that they are counted like those.

    Attributes:
      examples: The questions.
    """

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample:
        example = self.examples[index]
        accepted = example.answer if isinstance(example.answer, list) else [example.answer]
        return Sample(example.id, (Turn(example.prompt, accepted[0]),), example.images)


def open_file(path: str | Path, image_root: str | Path | None = None) -> tuple[str, Source]:
    """What a file's records are, and the file as a source of samples.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "mine.json")
    >>> _ = file.write_text('[{"question": "Who?", "answer": "Ann"}]')
    >>> kind, source = open_file(file)
    >>> kind, len(source)
    ('questions', 1)

    Args:
      path: A JSON list, an object with one under `data` or `questions`, or JSON Lines.
      image_root: The folder that image paths start from; default: that of the file.

    Raises:
      UserError: The file or the folder does not exist, its first record is of no known kind, or a
        question is wrong.
    """
    root = str(Path(path).parent if image_root is None else image_root)
    first = JsonRecords.scan(path)[0]
    fields = set(first) if isinstance(first, Mapping) else set()
    if fields & {"conversations", "messages"}:
        return "conversations", LlavaSource(str(path), root)
    if fields & {"label", "labels"}:
        return "labels", LabelsSource(str(path), root)
    if fields & {"question", "text"}:
        return "questions", QuestionSamples(load_questions(path, image_root=root).examples)
    named = ", ".join(sorted(fields)) or "none"
    raise UserError(
        f"the first record of {path} has neither `conversations` nor `messages`, no `question` or "
        f"`text` and no `label` or `labels`; its fields: {named}"
    )
