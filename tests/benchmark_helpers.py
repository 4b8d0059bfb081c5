"""Benchmarks' official files and results, for the tests of evaluations."""

from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import EvaluationResult
from moresjax.evaluation.tasks import load_benchmark
from moresjax.testing.benchmark_files import write

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LIMIT = 100  # a part of a benchmark need not have the published number of questions


def the_task(name: str, root, **options):
    (task,) = load_benchmark(name, data_root=root, limit=LIMIT, **options)
    return task


def official(name: str, root, content, file: str = "predictions.json", **options) -> dict:
    """Scores of a result file in the benchmark's own format."""
    return rescored(name, root, content, file, **options).scores


def sent(name: str, root, content, **options) -> str:
    """What goes to the benchmark's server or its own tool with these predictions."""
    (text,) = rescored(name, root, content, "predictions.json", **options).submissions.values()
    return text


def rescored(name: str, root, content, file: str, **options) -> EvaluationResult:
    write(root, {file: content})
    return rescore(name, root / file, data_root=root, limit=LIMIT, **options)


class WordJudge:
    """Replies in turn, and remembers what it was asked."""

    name, settings = "words", {"temperature": 0}

    def __init__(self, *replies: str):
        self.replies, self.prompts, self.attempts = list(replies), [], []

    def __call__(self, prompt: str, attempt: int) -> str:
        self.prompts.append(prompt)
        self.attempts.append(attempt)
        return self.replies.pop(0)
