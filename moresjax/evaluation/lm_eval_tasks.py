"""Text benchmarks: the tasks of `lm_eval`, unchanged and under their names there.

HellaSwag, MMLU, GSM8K, ARC and hundreds more, a few about images among them. A dataset is read from
`<data_root>/<its name on the hub>`, such as `cais/mmlu` (`hf download --repo-type dataset cais/mmlu
--local-dir data/cais/mmlu` writes it there), else from the cache of `datasets`.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moresjax.core.errors import UserError, choice_error
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.tasks import benchmark_names

# Examples before a question, by dataset, where a task names no number and published scores have
# some.
SHOTS = {"cais/mmlu": 5}
# The score of a task is the first of these that it has; they are shares of what is right.
METRICS = ("acc_norm", "acc", "exact_match")
SEED = 1234  # of the choice of examples, the library's own


@functools.cache
def _manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_text_task(name: str, data_root: str | Path | None = None) -> list:
    """The task, the group, or the tasks of a tag, with their data.

    Raises:
      UserError: for a name that `lm_eval` does not know, or when the dataset is not at hand.
    """
    if name not in _manager().all_tasks:
        raise choice_error("task", name, benchmark_names())
    try:
        # The library asks for datasets by their names: folders of that name come first.
        with contextlib.chdir(data_root or "."):
            loaded = _manager().load([name])
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data of {name} are neither in the data root, under their name on the hub, nor in "
            f"the cache of `datasets`: {reason}"
        ) from None
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def run_text_task(
    lm: MoresjaxLM,
    name: str,
    tasks: list,
    *,
    limit: int | None = None,
    shots: int | None = None,
    cache: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict]]:
    """Scores and predictions, as in `EvaluationResult`, of a task, a group of tasks or a tag.

    Args:
      lm: the model.
      name: in `lm_eval`.
      tasks: what `load_text_task` returned for it.
      limit: at most this many documents per task.
      shots: examples before each question; default: those of the task, five for `mmlu`.
      cache: file, without its ending, that keeps replies to texts while they are made.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    leaves = [leaf for task in tasks for leaf in _leaves(task)]
    if any(getattr(leaf, "MULTIMODAL", False) for leaf in leaves):
        cache = None  # the library tells requests apart by their JSON
    for leaf in leaves:
        if leaf.get_config("num_fewshot") is None and leaf.DATASET_PATH in SHOTS:
            leaf.set_config("num_fewshot", SHOTS[leaf.DATASET_PATH])
    found = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=_manager(),
        num_fewshot=shots,
        limit=limit,
        use_cache=None if cache is None else str(cache),
        bootstrap_iters=1000,
        fewshot_random_seed=SEED,
    )
    samples = found["samples"]
    # A tag has no score of its own, nor have some groups.
    titles = [name] if _score_keys(found["results"].get(name, {})) else list(samples)
    scores, rows = {}, []
    for title in titles:
        members = [title] if title in samples else list(samples)
        numbers = found["results"][title]
        key = _score_keys(numbers)[0]
        parts = {task: found["results"][task].get(key) for task in members if task != title}
        own = [(task, sample) for task in members for sample in _of(samples[task], key)]
        prompts = "\0".join(sample["arguments"][0][0] for _, sample in own)
        details = {k: n for k, v in numbers.items() if (n := _number(v)) is not None} | parts
        shots_given = found["n-shot"].get(members[0])
        scores[title] = {
            "benchmark": name,
            "metric": key.removesuffix(",none"),
            "score": numbers[key],
            "fraction": key.partition(",")[0] in METRICS,
            "stderr": _number(numbers.get(key.replace(",", "_stderr,", 1))),
            "n": len(own),
            "missing": 0,
            "shots": shots_given,
            "prompt_hash": hashlib.sha256(prompts.encode()).hexdigest()[:12],
            "details": details | ({"seed": SEED} if shots_given else {}),
        }
        rows += [_row(title, task, sample, key) for task, sample in own]
    return scores, rows


def failed_task(name: str, error: Exception) -> dict[str, dict[str, Any]]:
    """Scores of a task that could not be run."""
    empty = {"metric": "none", "score": None, "fraction": False, "stderr": None, "n": 0}
    reason = f"{type(error).__name__}: {error}"
    more = {"missing": 0, "prompt_hash": "", "details": {}, "errors": {name: reason}}
    return {name: {"benchmark": name, **empty, **more}}


def _leaves(task) -> list:
    """The tasks of a group, or the task itself."""
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _score_keys(numbers: Mapping[str, Any]) -> list[str]:
    """Names and filters of the scores among all numbers of a task, the one to report first."""
    keys = [key for key in numbers if "," in key and "_stderr" not in key]
    best = [key for metric in METRICS for key in keys if key.partition(",")[0] == metric]
    return best + [key for key in keys if key not in best]


def _of(samples: Sequence[Mapping], key: str) -> list[Mapping]:
    """The samples as the filter of a score saw them."""
    return [sample for sample in samples if sample["filter"] == key.partition(",")[2]]


def _row(title: str, task: str, sample: Mapping, key: str) -> dict:
    replies, arguments = sample["filtered_resps"], sample["arguments"]
    if len(replies) > 1:  # choices with their log-likelihoods
        best = max(range(len(replies)), key=lambda i: replies[i][0])
        prediction = arguments[best][1].strip()
    else:
        prediction = str(replies[0])
    return {
        "task": title,
        "id": f"{task}/{sample['doc_id']}",
        "prompt": arguments[0][0],
        "prediction": prediction,
        "answer": str(sample["target"]),
        "score": _number(sample.get(key.partition(",")[0])),
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
