"""Hidden states of answers to the questions of benchmarks: which questions, and what is noted."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from moresjax.analysis.states import States
from moresjax.core.errors import UserError, choice_error
from moresjax.data.processor_facts import processor_facts, short_hash
from moresjax.data.word_lists import word_list
from moresjax.evaluation.examples import Example
from moresjax.evaluation.tasks import BenchmarkTask, draw_examples, load_tasks
from moresjax.inference.model import Model
from moresjax.inference.states import StatesOptions

FIELDS = ("id", "prompt", "answer")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which questions are asked: those with a field that is, or holds, one of some words.

    >>> chosen = Selection.parse("answer~yes;no")
    >>> [chosen(Example("1", "?", answer)) for answer in ("Yes", ["no", "no", "two"], "three")]
    [True, True, False]
    >>> Selection.parse("answer_type=number")(Example("1", "?", metadata={"answer_type": "other"}))
    False

    Attributes:
      field: `answer` (what most annotators say, or the first caption), `prompt`, `id`, or a field
        of the metadata.
      words: The words; case does not matter.
      whole: Whether the field must be one of the words; otherwise it holds one.
    """

    field: str
    words: tuple[str, ...]
    whole: bool = False

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """The selection that `FIELD~WORD;WORD` or `FIELD=VALUE;VALUE` stands for.

        Raises:
          UserError: The text is neither.
        """
        at = min((n for n in (text.find("~"), text.find("=")) if n > 0), default=0)
        words = tuple(word.strip().lower() for word in text[at + 1 :].split(";") if word.strip())
        if not at or not words:
            raise UserError(f"--select is FIELD~WORD;WORD or FIELD=VALUE;VALUE, got {text!r}")
        return cls(text[:at], words, text[at] == "=")

    def __call__(self, example: Example) -> bool:
        """Whether a question is asked.

        Raises:
          UserError: It has no such field.
        """
        if self.field == "answer":
            value = main_answer(example.answer)
        elif self.field in FIELDS:
            value = getattr(example, self.field)
        elif self.field in example.metadata:
            value = str(example.metadata[self.field])
        else:
            known = (*FIELDS, *example.metadata)
            raise choice_error(f"field of question {example.id}", self.field, known)
        value = value.strip().lower()
        return any(value == word if self.whole else word in value for word in self.words)


def main_answer(answer: Any) -> str:
    """What most annotators say, the first of these at a tie: of captions the first.

    >>> main_answer(["two", "no", "no"]), main_answer(("a dog", "a cat")), main_answer(None)
    ('no', 'a dog', '')
    """
    if answer is None or isinstance(answer, str):
        return answer or ""
    if isinstance(answer, Sequence) and answer:
        return str(Counter(map(str, answer)).most_common(1)[0][0])
    return str(answer)


def task_states(
    model: Model,
    tasks: Sequence[str],
    *,
    data_root: str | Path | None = None,
    image_root: str | Path | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    split: str | None = None,
    select: Sequence[str] = (),
    words: str | None = None,
    **options: Unpack[StatesOptions],
) -> States:
    """Hidden states of a model's answers to benchmarks.

    Args:
      model: The model.
      tasks: Names of benchmarks and presets, and files of questions.
      data_root: The folder of the benchmarks' official files.
      image_root: The folder that images of files of questions start from.
      limit: The most questions per task, of which the first are taken.
      sample: How many questions of every task to draw at random, instead of a limit.
      seed: Seeds `sample`.
      split: The split of the data, for all tasks or as `TASK=SPLIT,TASK=SPLIT`.
      select: Which of these questions are asked (see `Selection`): those that all of them choose.
      words: A list of words (see `word_list`): only questions whose answer holds one are asked, and
        `take="token"` takes these words.
      options: Those of `moresjax.inference.states.states`.

    Raises:
      UserError: As `states`; a task, split, selection or list of words is wrong, or no question is
        left.
    """
    chosen = [Selection.parse(text) for text in select]
    listed = () if words is None else word_list(words)
    if listed:
        chosen.append(Selection("answer", listed))
    loaded = load_tasks(tasks, data_root, limit, split, image_root)
    loaded = draw_examples(loaded, sample, seed, limit)
    examples = [
        (task, example)
        for task in loaded
        for example in task.examples
        if all(selection(example) for selection in chosen)
    ]
    if not examples:
        raise UserError(f"no question of {', '.join(t.name for t in loaded)} is selected")
    items = [_item(task, example, len(loaded) > 1) for task, example in examples]
    take = options.get("take", "prompt")
    if take == "token" and listed:
        options["take"] = f"token({';'.join(listed)})"
    facts = processor_facts(model.processor)
    meta = {
        "tasks": [task.name for task in loaded],
        "split": split,
        "limit": limit,
        "sample": sample,
        "seed": seed,
        "select": list(select),
        "class": words,
        "template": facts.get("template"),
        "questions": len(items),
        "data": short_hash(json.dumps([item | {"images": ()} for item in items], default=str)),
    }
    options["meta"] = meta | dict(options.get("meta") or {})
    options.setdefault("skip_bad", True)
    return model.states(items, **options)


def _item(task: BenchmarkTask, example: Example, several: bool) -> dict[str, Any]:
    """A question as `states` takes it."""
    answers = example.answer
    if answers is not None and not isinstance(answers, str):
        answers = list(answers) if isinstance(answers, Sequence) else answers
    return {
        "id": f"{task.name}/{example.id}" if several else example.id,
        "prompt": example.prompt,
        "images": example.images,
        "answers": answers,
        "metadata": {"task": task.name, **example.metadata},
    }
