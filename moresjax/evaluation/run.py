"""Running benchmarks: a model's answers, written while they come, and their scores."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm_eval.api.instance import Instance
from tqdm import tqdm

from moresjax.analysis.attention import AnswerAttention, AttentionProbe
from moresjax.core.errors import UserError
from moresjax.core.locks import one_writer
from moresjax.core.row import Row
from moresjax.data.images import image_keys
from moresjax.data.processor_facts import processor_facts, short_hash
from moresjax.evaluation.attention_log import AttentionLog, check_attention, write_maps
from moresjax.evaluation.examples import Example
from moresjax.evaluation.judges import CachedJudge, Judge
from moresjax.evaluation.lm import MoresjaxLM, task_requests
from moresjax.evaluation.lm_eval_tasks import failed_task, load_lm_eval_tasks, run_lm_eval_tasks
from moresjax.evaluation.predictions import PredictionLog
from moresjax.evaluation.presets import expand_presets
from moresjax.evaluation.results import (
    EvaluationResult,
    sample_facts,
    score_task,
    write_results,
)
from moresjax.evaluation.tasks import (
    BenchmarkTask,
    benchmark_names,
    check_names,
    choice_letter,
    draw_examples,
    is_file,
    limit_answers,
    load_available_tasks,
)
from moresjax.generation.sampling import GREEDY, Sampling
from moresjax.generation.scheduler import Completion
from moresjax.inference.model import Model


@one_writer
def evaluate(
    model: Model,
    tasks: str | Sequence[str | BenchmarkTask],
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    split: str | None = None,
    image_root: str | Path | None = None,
    batch_size: int = 64,
    attention: bool = False,
    title: str = "",
    out: str | Path | None = None,
    judge: Judge | None = None,
    num_fewshot: int | None = None,
    download: bool = False,
    include_path: str | Path | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int | None = None,
) -> EvaluationResult:
    """Scores a model on benchmarks.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model("none")
    >>> result = evaluate(model, ["digits"], limit=2, batch_size=4)
    >>> sorted(result.scores)[0], result.scores["digits_count"]["n"]
    ('digits_compare', 2)

    Args:
      model: The model.
      tasks: Names of benchmarks and presets, of tasks of `lm_eval` (`hellaswag`, `mmlu`), and files
        with questions of yours (`questions.jsonl`, see `evaluation/questions.py`) or with code that
        makes them (`my.py:NAME`): a list, which may also hold tasks themselves, or one text with
        commas. Of a preset those whose data are at hand are run, and the others are in the result's
        `not_run`.
      data_root: The folder of the benchmarks' official files.
      limit: The most examples per task, of which the first are taken.
      sample: How many examples of every task to draw at random, instead of a limit.
      seed: Seeds `sample`.
      split: The split of the data, for all tasks or as `TASK=SPLIT,TASK=SPLIT` for some; by default
        each benchmark's own.
      image_root: The folder that images of files of questions start from; default: the file's own.
      batch_size: The rows of a batch.
      attention: Whether to read the attention statistics of every generated token too, in the same
        pass. Answers that are in `out` without them are asked for again.
      title: The title of the progress bar, and the model's name in `attention.json`.
      out: The directory where predictions, their attention and a judge's replies are kept while
        they are made, and scores after every task: a killed evaluation continues.
      judge: Grades answers where a benchmark wants it.
      num_fewshot: The examples before a question of an `lm_eval` task; by default as published.
      download: Whether data of `lm_eval` tasks that are not at hand are fetched from the hub.
      include_path: A folder with tasks of yours in the format of `lm_eval`.
      sampling: How tokens of written answers are chosen. What is drawn for a question depends on
        the seed, the task and the question only. Greedy leaves it to tasks of `lm_eval`.
      max_new_tokens: The most tokens of a written answer, instead of each benchmark's own limit;
        tasks of `lm_eval` keep theirs.

    Raises:
      UserError: A task is unknown, a file is missing (of a benchmark in a preset: all are), a
        limit or the batch size is below 1, no task has written answers about images to read the
        attention of, or no question of any task could be asked.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    wanted = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    given = [name for name in wanted if isinstance(name, str)]
    names = expand_presets(given)
    include = None if include_path is None else str(Path(include_path).resolve())
    texts = {
        name: load_lm_eval_tasks(name, data_root, download=download, include_path=include)
        for name in names
        if name not in benchmark_names() and not is_file(name)
    }
    if texts and (attention or split or sample):
        name = next(iter(texts))
        raise UserError(
            f"{name} is a task of lm_eval: it has its own splits, no images, and a limit only"
        )
    loaded, not_run = load_available_tasks(
        [name for name in given if name not in texts], data_root, limit, split, image_root
    )
    made = [task for task in wanted if isinstance(task, BenchmarkTask)]
    check_names([*loaded, *made])
    loaded += [dataclasses.replace(task, examples=task.examples[:limit]) for task in made]
    loaded = limit_answers(draw_examples(loaded, sample, seed, limit), max_new_tokens)
    if not_run and not loaded and not texts:
        raise UserError(next(iter(not_run.values())))
    if attention:
        check_attention(loaded)
    start = time.monotonic()
    facts = processor_facts(model.processor)
    provenance = {"model": model.fingerprint, "processor": facts["hash"]}
    decoding = sampling.describe()
    drawn = {} if decoding == GREEDY.describe() else {"decoding": decoding}
    log = PredictionLog(out, provenance | {"weights": model.exact_fingerprint} | drawn)
    looked = AttentionLog(out, log.provenance) if attention else None
    judge = judge if judge is None or out is None else CachedJudge(judge, out)
    result = EvaluationResult(
        model=log.provenance["model"], processor=facts, not_run=not_run, decoding=decoding
    )

    def finish(found: EvaluationResult) -> EvaluationResult:
        whole = dataclasses.replace(result.joined(found), seconds=time.monotonic() - start)
        if looked is not None:
            own = [task for task in loaded if task.name in whole.scores]
            whole = whole.with_attention(*looked.summaries(own))
        if out is not None:
            facts = {"split": split, **sample_facts(sample, seed)}
            write_results(whole, out, name=title, **facts)
        return whole

    size = sum(len(task.examples) for task in loaded)
    with tqdm(total=size, desc=title or "evaluate", disable=None) as bar:
        asker = _Asker(model, log, bar, batch_size, looked, sampling)
        for task in loaded:
            found, errors = asker.answer(task)
            provenance = log.made(task, found)
            result = finish(
                score_task(
                    task,
                    found,
                    errors=errors,
                    provenance=provenance,
                    judge=judge,
                    sampling=sampling,
                )
            )
    lm = MoresjaxLM(model, batch_size=batch_size)
    made_by = [short_hash(x) if x == decoding else x for x in log.provenance.values()]
    cache = None if out is None else Path(out) / f"replies-{'-'.join(made_by)}"
    for name, chosen in texts.items():
        try:
            scores, rows = run_lm_eval_tasks(
                lm,
                name,
                chosen,
                limit=limit,
                num_fewshot=num_fewshot,
                cache=cache,
                download=download,
                include_path=include,
                sampling=sampling,
            )
        except Exception as error:  # of the library: what was scored before stays
            logging.getLogger(__name__).warning(f"{name} failed", exc_info=True)
            scores, rows = failed_task(name, error), []
        result = finish(EvaluationResult(scores, [row | log.provenance for row in rows]))
    _check_any_answer(result)
    if looked is not None and out is not None:
        write_maps(model, loaded, result.predictions, looked, out)
    return dataclasses.replace(result, seconds=time.monotonic() - start)


def _check_any_answer(result: EvaluationResult) -> None:
    failed = {name: entry["errors"] for name, entry in result.scores.items() if "errors" in entry}
    if failed and not result.predictions:
        name, errors = next(iter(failed.items()))
        reason = next(iter(errors.values()))
        raise UserError(f"no question of task {name} could be asked: {reason}")


class _Asker:
    """Asks a model the questions of benchmarks, and logs every answer as soon as it is known.

    Args:
      model: The model.
      log: The predictions that are known already, to which new ones are added.
      bar: A progress bar over all questions.
      batch_size: The rows of a batch.
      looked: The attention statistics that are known already; None where none are wanted.
      sampling: How tokens are chosen.
    """

    def __init__(
        self,
        model: Model,
        log: PredictionLog,
        bar: tqdm,
        batch_size: int,
        looked: AttentionLog | None,
        sampling: Sampling,
    ) -> None:
        self._model, self._log, self._bar, self._looked = model, log, bar, looked
        self._batch_size, self._probe, self._sampling = batch_size, AttentionProbe(), sampling
        probes = () if looked is None else (self._probe,)
        self._lm = MoresjaxLM(model, batch_size=batch_size, probes=probes, on_done=self._done)
        # By task and example id, also those before something went wrong.
        self._replies: dict[tuple[str, str], str] = {}

    def answer(self, task: BenchmarkTask) -> tuple[dict[str, str], dict[str, str]]:
        """Predictions by id, and by id what is wrong with the questions that cannot be asked."""
        known, errors = self._log.known(task), {}
        if self._looked is not None and not task.ranks_choices:
            read = self._looked.known(task)
            known = {name: text for name, text in known.items() if name in read}
        self._bar.update(len(known))
        pending = _in_order(example for example in task.examples if example.id not in known)
        knobs, scores = self._model.service.config, task.ranks_choices
        batches = knobs.scored_batches_per_chunk if scores else knobs.batches_per_chunk
        size = self._batch_size * batches
        for start in range(0, len(pending), size):
            chunk = pending[start : start + size]
            found, bad = self._answer_chunk(task, chunk)
            for example in chunk if task.ranks_choices else ():
                if example.id in found:
                    self._log.add(task.name, example, found[example.id])
            known, errors = known | found, errors | bad
            self._bar.update(len(chunk) if task.ranks_choices else len(bad))
        return known, errors

    def _done(self, request: Instance, row: Row, completion: Completion, text: str) -> None:
        task, example = request.task_name, request.doc
        assert task is not None
        assert isinstance(example, Example)
        if self._looked is not None:  # before the prediction, without which it is asked again
            stats = completion.stats[self._probe.name]
            answer = AnswerAttention.of(stats, completion.tokens, row.pixels is not None)
            self._looked.add(task, example, answer)
        self._log.add(task, example, text)
        self._replies[task, example.id] = text
        self._bar.update()

    def _answer_chunk(
        self, task: BenchmarkTask, examples: Sequence[Example]
    ) -> tuple[dict[str, str], dict[str, str]]:
        try:
            return self._ask(task, examples), {}
        except Exception:  # of whatever kind: one bad question costs itself only
            found = {
                example.id: self._replies[task.name, example.id]
                for example in examples
                if (task.name, example.id) in self._replies
            }
            left = [example for example in examples if example.id not in found]
            errors = {e.id: error for e in left if (error := self._problem(task, e))}
            if not errors:
                raise
            rest = [example for example in left if example.id not in errors]
            return found | (self._ask(task, rest) if rest else {}), errors

    def _problem(self, task: BenchmarkTask, example: Example) -> str:
        """Why an example cannot be asked; empty if it can."""
        model = self._model
        try:
            asked = example.prompt, example.images, example.id
            row = model.prompts.row(*asked, **example.pointed)
            if not task.ranks_choices:
                model.service.check_context(row, task.length_limit(example))
            for choice in example.choices if task.ranks_choices else ():
                pair = model.prompts.with_answer(row, *asked[:2], choice, marks=example.marks)
                model.service.check_answer(*pair)
        except UserError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _ask(self, task: BenchmarkTask, examples: Sequence[Example]) -> dict[str, str]:
        if not task.ranks_choices:
            requests = task_requests(task, examples, self._sampling)
            texts = self._lm.generate_until(requests, disable_tqdm=True)
            return {e.id: text for e, text in zip(examples, texts, strict=True)}
        scores = iter(self._lm.loglikelihood(task_requests(task, examples), disable_tqdm=True))
        return {e.id: choice_letter([next(scores)[0] for _ in e.choices]) for e in examples}


def _in_order(examples: Iterable[Example]) -> list[Example]:
    """Questions such that neighbours share images, and otherwise have about the same length."""
    groups: dict[tuple, list[Example]] = {}
    for example in sorted(examples, key=lambda example: len(example.prompt)):
        groups.setdefault(image_keys(example.images), []).append(example)
    return [example for group in groups.values() for example in group]
