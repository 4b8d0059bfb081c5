"""Tasks of lm_eval by their names, on a few local rows in the layout of the hub's datasets."""

import functools
import json
import socket
import sys

import numpy as np
import PIL.Image
import pytest
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from scipy.special import log_softmax

from moresjax.core.errors import UserError
from moresjax.evaluation import lm_eval_tasks
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.lm_eval_tasks import load_lm_eval_tasks, run_lm_eval_tasks
from moresjax.evaluation.results import write_results
from moresjax.evaluation.run import evaluate
from moresjax.testing.models import talking_model

ENDINGS = ["two", "three four", "no . yes", "the largest"]
SCENES = [("is there", "a two ?", 0), ("how many", "times three ?", 2), ("what", "is at", 1)]
README = """---
configs:
- config_name: {name}
  data_files:
{files}
---
"""


def write(folder, name: str, **splits) -> None:
    """A dataset of one configuration, as downloaded from the hub."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = "\n".join(f"  - split: {s}\n    path: {s}.jsonl" for s in splits)
    (folder / "README.md").write_text(README.format(name=name, files=files))


@pytest.fixture(scope="module")
def root(tmp_path_factory, monkeypatch_module):
    root = tmp_path_factory.mktemp("hub")
    monkeypatch_module.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
    scenes = [
        {
            "activity_label": "numbers",
            "ctx_a": first,
            "ctx_b": second,
            "endings": ENDINGS,
            "label": str(label),
        }
        for first, second, label in SCENES
    ]
    write(root / "Rowan" / "hellaswag", "default", train=scenes, validation=scenes)
    questions = [
        {"question": f"how many {word} ?", "choices": ENDINGS, "answer": i % 4}
        for i, word in enumerate(["two", "three", "four", "five", "six", "seven"])
    ]
    folder = root / "cais" / "mmlu"
    write(folder, "abstract_algebra", test=questions[:3], dev=questions)
    science = [
        {
            "id": str(i),
            "question": f"how many {word} ?",
            "choices": {"text": ENDINGS, "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i, word in enumerate(["two", "three", "four"])
    ]
    splits = {"train": science, "validation": science, "test": science}
    write(root / "allenai" / "ai2_arc", "ARC-Challenge", **splits)
    sums = [{"question": "how many two ?", "answer": "two and two #### 4"}] * 6
    write(root / "openai" / "gsm8k", "main", train=sums, test=sums[:2])
    return root


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def model():
    return talking_model("none")


def log_likelihood(model, context: str, continuation: str) -> float:
    tokenizer = model.processor.tokenizer
    ids = tokenizer(context + continuation)["input_ids"]
    logs = log_softmax(np.asarray(model.logits(input_ids=np.asarray([ids])))[0], axis=-1)
    head = len(tokenizer(context)["input_ids"])
    return sum(logs[i - 1, ids[i]] for i in range(head, len(ids)))


def test_hellaswag_is_the_hand_computed_share(model, root, tmp_path):
    result = evaluate(model, ["hellaswag"], data_root=root, out=tmp_path)
    right = []
    for (first, second, label), row in zip(SCENES, result.predictions, strict=True):
        context = f"numbers: {first} {second.capitalize()}"
        each = [log_likelihood(model, context, f" {e}") / len(e) for e in ENDINGS]
        right.append(int(np.argmax(each)) == label)
        assert (row["id"].split("/")[0], row["prompt"]) == ("hellaswag", context)
        assert row["score"] == right[-1]
    score = result.scores["hellaswag"]
    assert (score["metric"], score["n"], score["shots"]) == ("acc_norm", 3, 0)
    assert score["score"] == pytest.approx(np.mean(right))
    assert score["stderr"] == pytest.approx(np.std(right, ddof=1) / 3**0.5)
    assert "acc,none" in score["details"]
    saved = json.loads(write_results(result, tmp_path).read_text())
    assert saved["scores"] == result.scores


def test_arc_is_the_hand_computed_share(model, root):
    result = evaluate(model, ["arc_challenge"], data_root=root)
    right = {"acc": [], "acc_norm": []}
    for i, word in enumerate(["two", "three", "four"]):
        context = f"Question: how many {word} ?\nAnswer:"
        each = [log_likelihood(model, context, f" {e}") for e in ENDINGS]
        normed = [x / len(e) for x, e in zip(each, ENDINGS, strict=True)]
        right["acc"].append(int(np.argmax(each)) == i)
        right["acc_norm"].append(int(np.argmax(normed)) == i)
    score = result.scores["arc_challenge"]
    assert (score["n"], score["shots"]) == (3, 0)
    for metric, values in right.items():
        assert score["details"][f"{metric},none"] == pytest.approx(np.mean(values))


def test_mmlu_has_five_examples_before_each_question(model, root):
    name = "mmlu_abstract_algebra"
    result = evaluate(model, [name], data_root=root)
    assert [row["prompt"].count("Answer:") for row in result.predictions] == [6, 6, 6]
    assert {row["prediction"] for row in result.predictions} <= set("ABCD")
    bare = evaluate(model, [name], data_root=root, num_fewshot=0, limit=2)
    assert [row["prompt"].count("Answer:") for row in bare.predictions] == [1, 1]
    assert (bare.scores[name]["metric"], bare.scores[name]["shots"]) == ("acc", 0)
    assert result.scores[name]["details"]["seed"] == 1234
    assert "seed" not in bare.scores[name]["details"]


def test_a_task_that_fails_leaves_the_others(model, root, tmp_path, monkeypatch, caplog):
    def broken(self, requests, **options):
        raise RuntimeError("no device")

    monkeypatch.setattr(MoresjaxLM, "loglikelihood", broken)
    result = evaluate(model, ["hellaswag", "gsm8k"], data_root=root, out=tmp_path)
    entry = result.scores["hellaswag"]
    assert (entry["score"], entry["errors"]) == (None, {"hellaswag": "RuntimeError: no device"})
    assert result.scores["gsm8k"]["n"] == 2
    assert "hellaswag failed" in caplog.text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["scores"] == result.scores
    with pytest.raises(UserError, match="no question of task hellaswag could be asked: Runtime"):
        evaluate(model, ["hellaswag"], data_root=root)


def test_a_task_that_names_its_examples_keeps_their_number(model, root):
    name = "mmlu_flan_cot_fewshot_abstract_algebra"
    result = evaluate(model, [name], data_root=root, limit=1)
    assert result.scores[name]["shots"] == 4


def test_members_of_a_group_without_a_score_have_theirs(model, root):
    group = Group.from_config(GroupConfig(group="pair", task=["hellaswag"]))
    for task in load_lm_eval_tasks("hellaswag", root):
        group.add(task)
    scores, rows = run_lm_eval_tasks(MoresjaxLM(model), "pair", [group], limit=2)
    assert {(title, entry["benchmark"]) for title, entry in scores.items()} == {
        ("hellaswag", "pair")
    }
    assert [row["task"] for row in rows] == ["hellaswag"] * 2


def test_replies_are_kept_while_they_are_made(model, root, tmp_path, monkeypatch):
    tasks = ["gsm8k", "hellaswag"]
    first = evaluate(model, tasks, data_root=root, out=tmp_path)
    assert first.scores["gsm8k"]["metric"] == "exact_match,strict-match"
    assert len(first.predictions) == 5

    def never(*arguments, **options):
        raise AssertionError("asked again")

    monkeypatch.setattr(MoresjaxLM, "_score", never)
    monkeypatch.setattr(type(model.service), "generate_many", never)
    again = evaluate(model, tasks, data_root=root, out=tmp_path)
    assert (again.scores, again.predictions) == (first.scores, first.predictions)


def test_a_task_with_images_runs_too(model, root, tmp_path):
    from datasets import Dataset, Features, Image, Sequence, Value

    folder = tmp_path / "HuggingFaceM4" / "ChartQA"
    folder.mkdir(parents=True)
    pictures = [PIL.Image.new("RGB", (12, 12), (90 * i, 10, 10)) for i in range(2)]
    columns = {"image": pictures, "query": ["how many ?"] * 2, "label": [["2"], ["3"]]}
    features = Features(
        {"image": Image(), "query": Value("string"), "label": Sequence(Value("string"))}
    )
    Dataset.from_dict(columns, features=features).to_parquet(folder / "test.parquet")
    result = evaluate(model, ["chartqa"], data_root=tmp_path, out=tmp_path / "out")
    score = result.scores["chartqa"]
    assert (score["metric"], score["n"]) == ("exact_match", 2)
    assert len({row["prediction"] for row in result.predictions}) == 2  # the images are seen


def test_a_prompt_that_is_too_long_loses_its_beginning(root):
    small = talking_model("none", max_positions=48)
    result = evaluate(small, ["mmlu_abstract_algebra"], data_root=root)
    assert result.scores["mmlu_abstract_algebra"]["n"] == 3


def test_an_unknown_name_is_told_what_is_like_it():
    known = r"unknown task 'hellaswg'; choose from: .* more, FILE.jsonl.*"
    with pytest.raises(UserError, match=known + r"or a task of lm_eval \(such as hellaswag,"):
        load_lm_eval_tasks("hellaswg")


def test_tasks_of_ones_own_lie_in_an_include_path(model, root, tmp_path, monkeypatch):
    load_lm_eval_tasks("hellaswag", root)  # its manager is held, and the next one is small
    small = functools.partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", small)
    lines = (
        "task: my_sums",
        "dataset_path: openai/gsm8k",
        "dataset_name: main",
        "test_split: test",
        'doc_to_text: "{{question}}"',
        'doc_to_target: "{{answer}}"',
        "output_type: loglikelihood",
        "metric_list: [{metric: acc}]",
    )
    (tmp_path / "my.yaml").write_text("\n".join(lines))
    result = evaluate(model, ["my_sums"], data_root=root, include_path=tmp_path, limit=1)
    assert (result.scores["my_sums"]["metric"], result.scores["my_sums"]["n"]) == ("acc", 1)
    with pytest.raises(UserError, match="none is not a folder"):
        evaluate(model, ["my_sums"], data_root=root, include_path=tmp_path / "none")


@pytest.mark.parametrize("read", [False, True])  # from the environment, when they were imported
@pytest.mark.parametrize(
    ("values", "download", "open_"),
    [
        ({}, False, False),
        ({"HF_HUB_OFFLINE": "1"}, False, False),  # what nobody has read any more
        ({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": ""}, False, False),
        ({"HF_HUB_OFFLINE": "0"}, False, False),
        ({"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "false"}, False, True),
        ({}, True, True),
        ({"HF_HUB_OFFLINE": "1"}, True, True),
    ],
)
def test_nothing_is_fetched_unless_somebody_says_so(read, values, download, open_, monkeypatch):
    import datasets.config
    import evaluate.config as metrics_config
    import huggingface_hub.constants
    from lm_eval.tasks import TaskManager

    places = [
        (datasets.config, "HF_HUB_OFFLINE"),
        (metrics_config, "HF_EVALUATE_OFFLINE"),
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
    ]
    seen = []

    def load(self, names):
        seen.append({getattr(module, name) for module, name in places})
        try:  # a reserved name, which no server knows
            socket.getaddrinfo("nowhere.invalid", 80)
        except OSError as error:
            seen.append("the network is closed" not in str(error))
        raise ValueError("not at hand")

    monkeypatch.setattr(TaskManager, "load", load)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for module, name in places:
        monkeypatch.setattr(module, name, read)
    for variable in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match="the data of hellaswag are neither"):
        load_lm_eval_tasks("hellaswag", download=download)
    assert seen == [{not open_}, open_]
    assert {getattr(module, name) for module, name in places} == {read}


def resolve(host, *_):
    """What `socket.getaddrinfo` tells its listeners, without asking a server."""
    sys.audit("socket.getaddrinfo", host, 80, 0, 0, 0)
    raise OSError("unknown")


def test_data_that_are_not_at_hand_are_not_asked_for(model, tmp_path, monkeypatch):
    """The libraries were imported online, and the environment says offline too late for them."""
    import datasets.config
    import huggingface_hub.constants

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("there is no network in this test")

    tried = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("arc_easy", "gsm8k"):
        with pytest.raises(UserError, match=rf"the data of {name} are neither .*--download"):
            evaluate(model, [name], data_root=tmp_path)
    assert tried == []


def test_what_cannot_be_run_is_refused(model, root, tmp_path):
    with pytest.raises(
        UserError, match=r"'helaswag'.*more, FILE.jsonl.* task of lm_eval \(such as"
    ):
        evaluate(model, ["helaswag"])
    with pytest.raises(UserError, match="the data of arc_easy are neither in the data root"):
        evaluate(model, ["arc_easy"], data_root=tmp_path)
    with pytest.raises(UserError, match="hellaswag is a task of lm_eval"):
        evaluate(model, ["hellaswag"], data_root=root, split="train")
