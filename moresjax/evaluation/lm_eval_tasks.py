"""Text benchmarks: the tasks of `lm_eval`, under their names there.

HellaSwag, MMLU, GSM8K, ARC and hundreds more, a few about images among them. A dataset is read from
`<data_root>/<its name on the hub>`, such as `cais/mmlu` (`hf download --repo-type dataset cais/mmlu
--local-dir data/cais/mmlu` writes it there), else from the cache of `datasets`.
"""

import contextlib
import difflib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from moresjax.core.errors import UserError
from moresjax.core.network import closed_network
from moresjax.data.processor_facts import short_hash
from moresjax.evaluation.lm import MoresjaxLM, gen_kwargs
from moresjax.evaluation.statistics import interval
from moresjax.evaluation.tasks import unknown_task
from moresjax.generation.sampling import GREEDY, Sampling

# Few-shot examples by dataset, where a task names no number and published scores have some.
_NUM_FEWSHOT = {"cais/mmlu": 5}
# The score of a task is the first of these that it has; they are shares of what is right.
_METRICS = ("acc_norm", "acc", "exact_match")
# How an environment variable says no.
_FALSE = ("0", "FALSE", "NO", "OFF")
_SEED = 1234  # draws the few-shot examples; the library's own


@functools.cache
def _manager(include_path: str | None = None) -> TaskManager:
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"include path {include_path} is not a folder")
    return TaskManager(include_path=include_path)


def may_download(download: bool = False) -> bool:
    """Whether data may be fetched: somebody says so, here or by both variables of the hub."""
    variables = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return download or all(os.environ.get(name, "").upper() in _FALSE for name in variables)


@contextlib.contextmanager
def _libraries(offline: bool) -> Iterator[None]:
    """Keeps the hub's libraries off the network, or lets them go there.

    They read the environment once, when they are imported: what they have read is set here,
    whatever the environment says by now.
    """
    import evaluate.config as hf_evaluate_config  # what loads tasks imports it

    places = (
        (datasets.config, "HF_HUB_OFFLINE"),
        (hf_evaluate_config, "HF_EVALUATE_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    )
    with contextlib.ExitStack() as stack:
        for module, name in places:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, offline)
        yield


def load_lm_eval_tasks(
    name: str,
    data_root: str | Path | None = None,
    *,
    download: bool = False,
    include_path: str | None = None,
) -> list[Task | Group]:
    """The task, the group, or the tasks of a tag, with their data.

    Args:
      name: The name in `lm_eval`.
      data_root: The folder that holds datasets under their names on the hub.
      download: Whether what is not at hand is fetched.
      include_path: A folder with tasks of your own in the library's format.

    Raises:
      UserError: `lm_eval` does not know the name, or the dataset is not at hand.
    """
    manager = _manager(include_path)
    if name not in manager.all_tasks:
        raise unknown_task(name, difflib.get_close_matches(name, manager.all_tasks, 5))
    try:
        with contextlib.ExitStack() as stack:
            # The library asks for datasets by their names: folders of that name come first.
            stack.enter_context(contextlib.chdir(data_root or "."))
            stack.enter_context(_libraries(offline=not may_download(download)))
            if not may_download(download):  # some tasks fetch by other means
                stack.enter_context(closed_network())
            loaded = manager.load([name])
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data of {name} are neither in the data root, under their name on the hub, nor in "
            f"the cache of `datasets` (--download fetches them): {reason}"
        ) from None
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def run_lm_eval_tasks(
    lm: MoresjaxLM,
    name: str,
    tasks: Sequence[Task | Group],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    cache: Path | None = None,
    download: bool = False,
    include_path: str | None = None,
    sampling: Sampling = GREEDY,
) -> tuple[dict[str, dict[str, Any]], list[dict]]:
    """Runs a task, a group of tasks or a tag of `lm_eval`.

    Args:
      lm: The model.
      name: The name in `lm_eval`.
      tasks: What `load_lm_eval_tasks` returned for the name.
      limit: The most documents per task.
      num_fewshot: The examples before each question; by default those of the task, five for `mmlu`.
      cache: The file, without its ending, that keeps replies to texts while they are made.
      download: Whether metrics that are not at hand are fetched.
      include_path: The folder that `load_lm_eval_tasks` was given.
      sampling: How tokens are chosen; greedy stands for what a task says itself.

    Returns:
      `scores` and `predictions` of an `EvaluationResult`. The entry `shots` of a score is the
      number of few-shot examples.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    leaves = [leaf for task in tasks for leaf in _leaves(task)]
    if any(getattr(leaf, "MULTIMODAL", False) for leaf in leaves):
        cache = None  # the library tells requests apart by their JSON
    for leaf in leaves:
        if leaf.get_config("num_fewshot") is None and leaf.DATASET_PATH in _NUM_FEWSHOT:
            leaf.set_config("num_fewshot", _NUM_FEWSHOT[leaf.DATASET_PATH])
    options: dict[str, Any] = {
        "model": lm,
        "tasks": list(tasks),
        "task_manager": _manager(include_path),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "use_cache": None if cache is None else str(cache),
        "bootstrap_iters": 1000,
        "fewshot_random_seed": _SEED,
        "gen_kwargs": gen_kwargs(sampling) or None,
    }
    with _libraries(offline=not may_download(download)):
        found: dict[str, Any] = dict(simple_evaluate(**options) or {})
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
        shots = found["n-shot"].get(members[0])
        scores[title] = {
            "benchmark": name,
            "metric": key.removesuffix(",none"),
            "score": numbers[key],
            "fraction": key.partition(",")[0] in _METRICS,
            **_spread(numbers, key),
            "n": len(own),
            "missing": 0,
            "shots": shots,
            "prompt_hash": short_hash(prompts),
            "details": details | ({"seed": _SEED} if shots else {}),
        }
        rows += [_row(title, task, sample, key) for task, sample in own]
    return scores, rows


def _spread(numbers: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The library's standard error of a score, for which documents are independent."""
    error, value = (_number(numbers.get(k)) for k in (key.replace(",", "_stderr,", 1), key))
    if error is None or value is None or math.isnan(error):
        return {"stderr": None}
    bounds = interval(value, error, share=key.partition(",")[0] in _METRICS)
    return {"stderr": error, "stderr_kind": "i.i.d.", "interval95": list(bounds)}


def failed_task(name: str, error: Exception) -> dict[str, dict[str, Any]]:
    """Scores of a task that could not be run."""
    empty = {"metric": "none", "score": None, "fraction": False, "stderr": None, "n": 0}
    reason = f"{type(error).__name__}: {error}"
    more = {"missing": 0, "prompt_hash": "", "details": {}, "errors": {name: reason}}
    return {name: {"benchmark": name, **empty, **more}}


def _leaves(task: Task | Group) -> list[Task]:
    """The tasks of a group, or the task itself."""
    return task.get_all_tasks() if isinstance(task, Group) else [task]


def _score_keys(numbers: Mapping[str, Any]) -> list[str]:
    """Names and filters of the scores among all numbers of a task, the one to report first."""
    keys = [key for key in numbers if "," in key and "_stderr" not in key]
    best = [key for metric in _METRICS for key in keys if key.partition(",")[0] == metric]
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
