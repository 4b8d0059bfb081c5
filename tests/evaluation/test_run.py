"""Evaluations that are killed and go on, ranked tasks, results and tables, with a tiny model."""

import http.server
import json
import shutil
import threading

import pytest
from flax import nnx
from lm_eval.api.instance import Instance
from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.evaluation.judges import EndpointJudge, ModelJudge
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.predictions import PredictionLog
from moresjax.evaluation.presets import PRESETS, expand_presets, table
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import EvaluationResult, write_results
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import benchmark_names, load_benchmark
from moresjax.generation.config import EngineConfig
from moresjax.inference.model import Model
from moresjax.testing.models import tiny_model
from moresjax.weights.fingerprint import fingerprint


def make_model(seed: int = 0) -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    return Model(tiny_model(seed=seed, vocab_size=len(vocabulary())), processor)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """GQA and SEED-Bench with nine questions each; the photo of the last one is missing."""
    root = tmp_path_factory.mktemp("official")
    folder = root / "gqa" / "images"
    folder.mkdir(parents=True)
    seed = root / "seed_bench" / "SEED-Bench-image"
    seed.mkdir(parents=True)
    questions, rows = {}, []
    for number in range(9):
        if number < 8:
            photo = Image.new("RGB", (12, 12), (25 * number, 90, 10))
            photo.save(folder / f"n{number}.jpg")
            photo.save(seed / f"{number}.png")
        text = "is there a two ?" if number % 2 else "what is the largest ?"
        types = {"structural": "query"}
        questions[str(number)] = {
            "question": text,
            "answer": "two",
            "imageId": f"n{number}",
            "types": types,
        }
        choices = zip("abcd", ("two", "three", "four five", "six"), strict=True)
        rows.append(
            {
                "question_id": str(number),
                "question": text,
                "answer": "B",
                "data_id": f"{number}.png",
                "data_type": "image",
                "question_type_id": 1,
                **{f"choice_{letter}": word for letter, word in choices},
            }
        )
    (root / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    seed = {"questions": rows, "question_type": {"Scene": 1}}
    (root / "seed_bench" / "SEED-Bench.json").write_text(json.dumps(seed))
    return root


@pytest.fixture(scope="module")
def whole(model, root) -> EvaluationResult:
    return evaluate(model, ["gqa"], data_root=root, limit=9, batch_size=1)


def test_one_bad_question_leaves_the_others(whole):
    entry = whole.scores["gqa"]
    assert (entry["n"], entry["missing"]) == (9, 1)
    assert list(entry["errors"]) == ["8"]
    assert "n8.jpg does not exist" in entry["errors"]["8"]
    assert [row["id"] for row in whole.predictions] == list("01234567")
    assert entry["max_new_tokens"] == 128


def test_a_killed_evaluation_continues(model, root, whole, tmp_path, monkeypatch):
    asked = []
    generate = MoresjaxLM.generate_until

    def until_killed(self, requests, **options):
        if asked:
            raise KeyboardInterrupt
        asked.extend(request.doc.id for request in requests)
        return generate(self, requests, **options)

    options = {"data_root": root, "limit": 9, "batch_size": 1, "out": tmp_path}
    monkeypatch.setattr(MoresjaxLM, "generate_until", until_killed)
    monkeypatch.setattr(model.service, "config", EngineConfig(batches_per_chunk=4))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, ["gqa"], **options)
    saved = tmp_path / "predictions.jsonl"
    assert [json.loads(line)["id"] for line in saved.read_text().splitlines()] == asked
    assert len(asked) == 4
    # It was killed in the middle of a line.
    with saved.open("a") as file:
        file.write('{"task": "gqa", "id": "7", "pro')

    again = []

    def count(self, requests, **kwargs):
        texts = generate(self, requests, **kwargs)
        again.extend(request.doc.id for request in requests)
        return texts

    monkeypatch.setattr(MoresjaxLM, "generate_until", count)
    result = evaluate(model, ["gqa"], **options)
    assert sorted(again) == sorted(set("01234567") - set(asked))
    assert result.scores == whole.scores
    assert result.predictions == whole.predictions
    path = write_results(result, tmp_path, split="testdev_balanced")
    assert json.loads(path.read_text())["fingerprint"] == fingerprint(model.mllm)
    again.clear()
    assert evaluate(model, ["gqa"], **options).scores == whole.scores
    assert again == []
    with pytest.raises(UserError, match="predictions of another model"):
        evaluate(make_model(seed=1), ["gqa"], **options)
    rescored = rescore("gqa", saved, data_root=root, limit=9).scores["gqa"]
    assert rescored == {k: v for k, v in whole.scores["gqa"].items() if k != "errors"}


def test_an_answer_is_written_as_soon_as_it_has_ended(model, root, whole, tmp_path, monkeypatch):
    add, added = PredictionLog.add, []

    def until_killed(self, task, example, prediction):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(example.id)
        add(self, task, example, prediction)

    options = {"data_root": root, "limit": 9, "batch_size": 4, "out": tmp_path}
    with monkeypatch.context() as patched:
        patched.setattr(PredictionLog, "add", until_killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, ["gqa"], **options)
    saved = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in saved] == added
    assert evaluate(model, ["gqa"], **options).predictions == whole.predictions


def test_a_question_longer_than_the_context_leaves_the_others(model, root, tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "images").symlink_to(root / "gqa" / "images")
    name = "gqa/testdev_balanced_questions.json"
    questions = json.loads((root / name).read_text())
    questions["3"]["question"] = "is " * 3000
    (tmp_path / name).write_text(json.dumps(questions))
    entry = evaluate(model, ["gqa"], data_root=tmp_path, limit=5, batch_size=4).scores["gqa"]
    assert list(entry["errors"]) == ["3"]
    assert "do not fit the model's 2048 positions" in entry["errors"]["3"]


def test_a_broken_image_is_met_on_the_way_and_the_other_answers_stay(
    model, root, tmp_path, monkeypatch
):
    shutil.copytree(root / "gqa", tmp_path / "gqa")
    broken = tmp_path / "gqa" / "images" / "n4.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    answered, add = [], PredictionLog.add

    def note(self, task, example, prediction):
        answered.append(example.id)
        add(self, task, example, prediction)

    monkeypatch.setattr(PredictionLog, "add", note)
    options = {"data_root": tmp_path, "limit": 8, "batch_size": 2}
    found = evaluate(model, ["gqa"], **options)
    errors = found.scores["gqa"]["errors"]
    assert list(errors) == ["4"]
    assert "n4.jpg cannot be read" in errors["4"]
    assert sorted(answered) == list("0123567")  # each once
    assert [row["id"] for row in found.predictions] == list("0123567")


def test_tasks_may_have_splits_of_their_own(model, root):
    options = {"data_root": root, "limit": 2, "batch_size": 4}
    both = ["gqa", "seed_bench_rank"]
    found = evaluate(model, both, split="gqa=testdev_balanced", **options)
    assert list(found.scores) == both
    with pytest.raises(UserError, match="split of gqa 'other'"):
        evaluate(model, both, split="gqa=other", **options)
    with pytest.raises(UserError, match=r"task of a split 'vqav2'.*gqa, seed_bench_rank"):
        evaluate(model, both, split="gqa=testdev_balanced,vqav2=val", **options)


def test_a_choice_longer_than_the_context_leaves_the_other_questions(model, root, tmp_path):
    (tmp_path / "seed_bench").mkdir()
    (tmp_path / "seed_bench" / "SEED-Bench-image").symlink_to(
        root / "seed_bench" / "SEED-Bench-image"
    )
    name = "seed_bench/SEED-Bench.json"
    questions = json.loads((root / name).read_text())
    questions["questions"][1]["choice_c"] = "is " * 3000
    (tmp_path / name).write_text(json.dumps(questions))
    options = {"data_root": tmp_path, "limit": 3, "batch_size": 4}
    found = evaluate(model, ["seed_bench_rank"], **options)
    entry, bad = found.scores["seed_bench_rank"], questions["questions"][1]["question_id"]
    assert list(entry["errors"]) == [str(bad)]
    assert "an answer of 3000 tokens do not fit the model's 2048" in entry["errors"][str(bad)]
    assert len(found.predictions) == 2


def test_a_task_of_which_nothing_can_be_asked_says_why(model, root, tmp_path):
    (tmp_path / "gqa").mkdir()
    name = "gqa/testdev_balanced_questions.json"
    (tmp_path / name).write_text((root / name).read_text())
    with pytest.raises(UserError, match=r"no question of task gqa could be asked.*n\d\.jpg"):
        evaluate(model, ["gqa"], data_root=tmp_path, limit=2, batch_size=2)


def test_ranked_choices_are_those_of_highest_likelihood(model, root):
    result = evaluate(model, ["seed_bench_rank"], data_root=root, limit=3, batch_size=4)
    (task,) = load_benchmark("seed_bench_rank", data_root=root, limit=3)
    lm = MoresjaxLM(model, batch_size=4)
    for example, row in zip(task.examples, result.predictions, strict=True):
        pairs = [
            (example.prompt, choice, {"visual": list(example.images)}) for choice in example.choices
        ]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        scores = [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        assert row["prediction"] == "ABCD"[scores.index(max(scores))]
    expected = sum(row["prediction"] == "B" for row in result.predictions) / 3
    assert result.scores["seed_bench_rank"]["score"] == pytest.approx(expected)


def test_questions_with_images_run_in_lm_eval_itself(model, root):
    """The library ranks the choices of the same questions as its own multiple-choice task."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run

    (task,) = load_benchmark("seed_bench_rank", data_root=root, limit=3)
    docs = [
        {
            "prompt": example.prompt,
            "choices": list(example.choices),
            "gold": "ABCD".index(example.answer),
            "image": str(example.images[0]),
        }
        for example in task.examples
    ]
    in_library = ConfigurableTask(
        config={
            "task": "ranked",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "doc_to_image": lambda doc: [doc["image"]],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
    )
    tasks = {"tasks": {"ranked": in_library}, "groups": {}}
    lm = MoresjaxLM(model, batch_size=4)
    found = run(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=False)
    ours = evaluate(model, ["seed_bench_rank"], data_root=root, limit=3, batch_size=4)
    value = ours.scores["seed_bench_rank"]["score"]
    assert found["results"]["ranked"]["acc,none"] == pytest.approx(value)


def test_a_fingerprint_does_not_end_the_engines(model):
    name, engine = fingerprint(model.mllm), model.service.engine()
    assert isinstance(model._mllm.llm.blocks, nnx.List)
    assert model.fingerprint == name
    assert model.service.engine() is engine
    kernel = model._mllm.llm.blocks[-1].attn.q.kernel
    kernel[...] = kernel[...] + 1
    assert model.fingerprint != name
    kernel[...] = kernel[...] - 1


def test_fingerprints_tell_models_apart(model):
    assert fingerprint(model.mllm) == fingerprint(make_model().mllm)
    assert fingerprint(model.mllm) != fingerprint(make_model(seed=1).mllm)
    tuned = make_model()
    tuned.attach("mores:rank=1")
    first = fingerprint(tuned.mllm)
    tuned.attach("mores:rank=1", seed=1)
    assert len({first, fingerprint(tuned.mllm), fingerprint(model.mllm)}) == 3


def test_a_model_can_judge(model):
    judge = ModelJudge(model, "tiny", max_new_tokens=2)
    assert judge("is there a two ?", 0) == model.generate("is there a two ?", max_new_tokens=2)
    settings = {"temperature": 0, "max_tokens": 2, "fingerprint": model.fingerprint}
    assert (judge.name, judge.settings) == ("tiny", settings)
    assert len({judge("is there a two ?", attempt) for attempt in range(4)}) > 1


def entry(benchmark: str, score: float | None, **more) -> dict:
    spread = None if score is None or score > 1 else 0.01
    common = {"benchmark": benchmark, "metric": "accuracy", "n": 4, "missing": 0, "details": {}}
    return common | {"score": score, "stderr": spread} | more


def test_tables_have_the_columns_of_the_papers():
    scores = {
        f"pope_{kind}": entry("pope", score)
        for kind, score in zip("rpa", (0.9, 0.8, 0.7), strict=True)
    }
    scores["hallusionbench"] = entry(
        "hallusionbench",
        0.5,
        details={"hard aAcc": 42.6, "fAcc": 19.4},
        judge={"name": "rule"},
        missing=2,
    )
    lines = table(scores, ["mores-table6"]).split("\n")
    assert " ".join(lines[0].split()) == "pope_r 0.900 +- 0.010 (accuracy, n = 4)"
    assert lines[3].endswith("2 missing, counted as wrong, judge: rule)")
    assert lines[-3].split("  ") == ["POPE Acc", "Hard Acc", "Figure Acc", "Question Acc"]
    assert lines[-2].split() == ["80.0", "42.6*", "19.4*", "50.0*"]


def test_the_average_of_a_table_skips_points_and_waits_for_all_columns():
    names = expand_presets(["mrt-table1"])
    scores = {name: entry(name, 0.5) for name in names} | {
        "mme_sampled": entry("mme_sampled", 1587.26)
    }
    assert table(scores, ["mrt-table1"]).split("\n")[-1].split() == ["1587.3", *["50.0"] * 8]
    scores["vsr"] = entry("vsr", None)
    last = table(scores, ["mrt-table1"]).split("\n")[-1].split()
    assert (last[2], last[-1]) == ("-", "-")
    nothing = {"hallusionbench": entry("hallusionbench", None)}  # without its details
    assert table(nothing, ["mores-table6"]).split("\n")[-1].split() == ["-"] * 4


def test_presets_name_benchmarks_that_exist():
    for name in PRESETS:
        assert set(expand_presets([name])) <= set(benchmark_names())
    assert expand_presets(["gqa", "mores-table6", "pope"]) == ["gqa", "pope", "hallusionbench"]


def test_the_endpoint_judge_asks_and_reads_like_an_openai_client(monkeypatch):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            reply = {"choices": [{"message": {"content": "Yes"}}]} if len(seen) < 3 else {}
            data = json.dumps(reply).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("JUDGE_KEY", "abc")
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1/"
        judge = EndpointJudge(url, "vicuna", 9, "JUDGE_KEY")
        assert [judge("Is it?", 0), judge("Is it?", 1)] == ["Yes", "Yes"]
        with pytest.raises(UserError, match=r"the judge vicuna at .* failed"):
            judge("Is it?", 0)
    finally:
        server.shutdown()
        server.server_close()
    path, key, body = seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer abc")
    assert body["messages"] == [{"role": "user", "content": "Is it?"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("vicuna", 0, 9)
    assert seen[1][2]["temperature"] == 0.5
    with pytest.raises(UserError, match="must begin with http"):
        EndpointJudge("ftp://x", "vicuna")
