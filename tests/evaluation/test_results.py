"""What an evaluation leaves in its directory: nothing is lost, nothing is told of another model."""

import dataclasses
import json

import pytest
from PIL import Image

from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.processor_facts import processor_facts
from moresjax.data.templates import get_template
from moresjax.evaluation import results
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.rescore import rescore
from moresjax.evaluation.results import EvaluationResult, score_task, write_results
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.tasks import BenchmarkTask, load_benchmark
from moresjax.inference.model import Model
from moresjax.testing.models import tiny_model

LIMIT = 4


@pytest.fixture(scope="module")
def model() -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    return Model(tiny_model(vocab_size=len(vocabulary())), processor)


def run_digits(model, out, limit=LIMIT, **options) -> EvaluationResult:
    result = evaluate(model, ["digits"], out=out, limit=limit, batch_size=4, **options)
    write_results(result, out)
    return result


@pytest.fixture
def asked(monkeypatch):
    """The ids that the model is asked."""
    found, generate = [], MoresjaxLM.generate_until

    def count(self, requests, **options):
        found.extend(request.doc.id for request in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(MoresjaxLM, "generate_until", count)
    return found


def saved(out, name: str):
    text = (out / name).read_text()
    return json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))


def test_a_part_and_another_split_leave_what_was_answered(model, tmp_path, asked):
    whole = run_digits(model, tmp_path)
    before = len(asked)
    part = run_digits(model, tmp_path, limit=2)
    assert len(asked) == before
    assert len(part.predictions) == len(whole.predictions) // 2
    run_digits(model, tmp_path, limit=2, split="val")
    scores = saved(tmp_path, "results.json")["scores"]
    assert {entry["split"] for entry in scores.values()} == {"val"}
    rows = saved(tmp_path, "predictions.jsonl")
    assert len(rows) == len(whole.predictions) + len(part.predictions)
    asked.clear()
    assert run_digits(model, tmp_path).scores == whole.scores
    assert asked == []


def test_splits_may_have_the_same_ids(model, tmp_path, asked):
    whole = run_digits(model, tmp_path)
    others = [row | {"prompt": "?", "prediction": "!"} for row in whole.predictions]
    write_results(dataclasses.replace(whole, predictions=others), tmp_path)
    assert len(saved(tmp_path, "predictions.jsonl")) == 2 * len(others)
    asked.clear()
    assert run_digits(model, tmp_path).predictions == whole.predictions
    assert asked == []
    again = rescore("digits", tmp_path / "predictions.jsonl", limit=LIMIT)
    assert again.predictions == whole.predictions
    # Nothing else is known of these: other words are better than none.
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    again = rescore("digits", tmp_path / "others.jsonl", limit=LIMIT)
    assert {row["prediction"] for row in again.predictions} == {"!"}


def test_scores_of_earlier_tasks_stay_if_they_are_of_the_same_model(model, tmp_path):
    digits = run_digits(model, tmp_path)
    (first, *others) = digits.scores
    more = dataclasses.replace(digits, scores={"more": digits.scores[first]}, predictions=[])
    data = json.loads(write_results(more, tmp_path).read_text())
    assert list(data["scores"]) == [first, *others, "more"]
    assert len(saved(tmp_path, "predictions.jsonl")) == len(digits.predictions)
    other = dataclasses.replace(more, model="another")
    data = json.loads(write_results(other, tmp_path).read_text())
    assert list(data["scores"]) == ["more"]


def test_scores_are_written_after_every_task(model, tmp_path, monkeypatch):
    generate, calls = MoresjaxLM.generate_until, []

    def until_killed(self, requests, **options):
        calls.append(requests)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, requests, **options)

    monkeypatch.setattr(MoresjaxLM, "generate_until", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run_digits(model, tmp_path)
    (name,) = saved(tmp_path, "results.json")["scores"]
    assert {row["task"] for row in saved(tmp_path, "predictions.jsonl")} == {name}


def test_saved_predictions_keep_their_model(model, tmp_path, asked):
    whole = run_digits(model, tmp_path / "out")
    file = tmp_path / "out" / "predictions.jsonl"
    rows, data = saved(tmp_path / "out", file.name), saved(tmp_path / "out", "results.json")
    again = rescore("digits", file, limit=LIMIT, out=tmp_path / "out")
    assert (again.scores, again.model) == (whole.scores, model.fingerprint)
    write_results(again, tmp_path / "out")
    assert saved(tmp_path / "out", file.name) == rows
    after = saved(tmp_path / "out", "results.json")
    assert {k: after[k] for k in ("fingerprint", "processor")} == {
        k: data[k] for k in ("fingerprint", "processor")
    }
    asked.clear()
    run_digits(model, tmp_path / "out")
    assert asked == []


def test_saved_predictions_do_not_go_among_those_of_another_model(model, tmp_path):
    run_digits(model, tmp_path)
    rows = saved(tmp_path, "predictions.jsonl")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("".join(json.dumps(row | {"model": "x"}) + "\n" for row in rows))
    with pytest.raises(UserError, match="holds predictions of another model"):
        rescore("digits", foreign, limit=LIMIT, out=tmp_path)
    assert rescore("digits", foreign, limit=LIMIT).model == "x"
    foreign.write_text("".join(json.dumps({**row, "model": row["id"]}) + "\n" for row in rows))
    assert rescore("digits", foreign, limit=LIMIT).model == ""


def test_answers_of_another_template_are_refused(model, tmp_path):
    run_digits(model, tmp_path)
    told = saved(tmp_path, "results.json")["processor"]
    assert (told["template"], told["image_size"], told["image_aspect"]) == ("bare", 12, "square")
    assert told["visual_tokens"] == 9
    other = Model(
        model.mllm, dataclasses.replace(model.processor, template=get_template("vicuna_v1"))
    )
    with pytest.raises(UserError, match="with another template, tokenizer or image size"):
        run_digits(other, tmp_path)


def test_processors_are_told_apart(model):
    processor = model.processor
    words = build_tokenizer()
    words.add_tokens(["another"])

    class Saved:
        def to_dict(self):
            return {"resample": 3}

        def __call__(self, images):
            return images

    others = [
        processor,
        dataclasses.replace(processor, template=get_template("plain")),
        dataclasses.replace(processor, template=dataclasses.replace(processor.template, gap="")),
        dataclasses.replace(processor, image=ImageProcessor(12, aspect="pad")),
        dataclasses.replace(processor, image=ImageProcessor(14)),
        dataclasses.replace(processor, image=ImageProcessor(12, mean=(0.0, 0.0, 0.0))),
        dataclasses.replace(processor, image=ImageProcessor(12, reference=Saved())),
        dataclasses.replace(processor, image=None),
        dataclasses.replace(processor, visual_tokens=4),
        dataclasses.replace(processor, tokenizer=words),
    ]
    assert len({processor_facts(each)["hash"] for each in others}) == len(others)
    same = dataclasses.replace(processor, tokenizer=build_tokenizer(), image=ImageProcessor(12))
    assert processor_facts(same) == processor_facts(processor)
    assert processor_facts(others[2])["template"] == "tokenizer"


def test_a_task_of_which_nothing_can_be_asked_leaves_the_others(model, tmp_path):
    (tmp_path / "gqa").mkdir()
    row = {"question": "is it ?", "answer": "two", "imageId": "n", "types": {"structural": "query"}}
    questions = {"1": row, "2": row}
    (tmp_path / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    options = {"data_root": tmp_path, "limit": 2, "batch_size": 4, "out": tmp_path / "out"}
    result = evaluate(model, ["gqa", "digits"], **options)
    entry = result.scores["gqa"]
    assert (entry["score"], entry["stderr"], entry["missing"]) == (None, None, 2)
    assert (entry["metric"], sorted(entry["errors"])) == ("accuracy", ["1", "2"])
    assert result.mean_accuracy is None
    assert all(e["score"] is not None for name, e in result.scores.items() if name != "gqa")
    assert set(saved(tmp_path / "out", "results.json")["scores"]) == set(result.scores)
    with pytest.raises(UserError, match=r"no question of task gqa could be asked.*n\.jpg"):
        evaluate(model, ["gqa"], **options)


def test_results_name_prompts_versions_and_seeds(model, tmp_path):
    run_digits(model, tmp_path)
    data = saved(tmp_path, "results.json")
    assert data["seed"] is None
    assert set(data["versions"]) == {"python", "jax", "lm_eval"}
    assert data["versions"]["jax"] == results.jax.__version__
    assert data["version"] == results.__version__
    hashes = {entry["prompt_hash"] for entry in data["scores"].values()}
    assert len(hashes) == len(data["scores"])
    assert all(entry["details"]["seed"] == 0 for entry in data["scores"].values())
    run_digits(model, tmp_path, limit=2)
    assert hashes.isdisjoint(
        e["prompt_hash"] for e in saved(tmp_path, "results.json")["scores"].values()
    )


def test_a_mean_is_of_shares_only(model):
    shares = evaluate(model, ["digits"], limit=2, batch_size=4)
    values = [entry["score"] for entry in shares.scores.values()]
    assert shares.mean_accuracy == pytest.approx(sum(values) / len(values))
    (task, *_) = load_benchmark("digits", limit=2)
    examples = [dataclasses.replace(example, answer=["a two"]) for example in task.examples]
    cider = BenchmarkTask("captions", examples, scorer=caption_scorer)
    found = score_task(cider, {example.id: "a two" for example in examples})
    assert found.scores["captions"]["stderr"] is not None
    assert shares.joined(found).mean_accuracy is None
    assert EvaluationResult({}, [], None, 0.0).mean_accuracy is None


KINDS = ("random", "popular", "adversarial")


@pytest.fixture
def pope(tmp_path):
    """Official files of POPE with two questions each, the second one of its kind."""
    (tmp_path / "pope").mkdir()
    for kind in KINDS:
        rows = [
            {"question_id": n, "image": "1.jpg", "label": label, "text": f"Is there a {it}?"}
            for n, (it, label) in enumerate([("dog", "yes"), (kind, "no")], 1)
        ]
        file = tmp_path / "pope" / f"coco_pope_{kind}.json"
        file.write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def answers(*rows) -> str:
    return "\n".join(json.dumps({"question": q, "answer": text}) for q, text in rows)


def test_answers_that_do_not_name_their_split_are_refused(pope):
    rows = answers(("Is there a dog?", "yes"), ("Is there a random?", "no"))
    options = {"data_root": pope, "limit": 2}
    bare = json.dumps([{"answer": "yes"}, {"answer": "no"}])
    for text in (rows, bare, json.dumps({"1": "yes", "2": "no"})):
        (pope / "one.json").write_text(text)
        with pytest.raises(
            UserError, match=r"which of 3 tasks .* pope_random\.jsonl, pope_popular"
        ):
            rescore("pope", pope / "one.json", **options)
    folder = pope / "answers"
    folder.mkdir()
    (folder / "pope_random.jsonl").write_text(rows)
    with pytest.raises(UserError, match=r"answers has no pope_popular\.jsonl"):
        rescore("pope", folder, **options)


def test_the_order_of_answers_is_that_of_their_questions(pope):
    folder = pope / "answers"
    folder.mkdir()
    for kind in KINDS:
        asked = ("is there a dog?", "yes"), (f"Is there  a {kind}?\nAnswer the question", "no")
        (folder / f"pope_{kind}.jsonl").write_text(answers(*asked))
    options = {"data_root": pope, "limit": 2}
    scores = rescore("pope", folder, **options).scores
    assert [entry["score"] for entry in scores.values()] == [1, 1, 1]
    (folder / "pope_popular.jsonl").write_text((folder / "pope_random.jsonl").read_text())
    with pytest.raises(
        UserError, match=r"row 1 of .*pope_popular\.jsonl answers 'Is there  a rand"
    ):
        rescore("pope", folder, **options)


def test_a_line_ends_at_a_newline_only(pope):
    text = "Is there a\u2028dog\u0085?"
    row = {"question_id": 1, "image": "1.jpg", "label": "yes", "text": text}
    for kind in KINDS:
        line = json.dumps(row, ensure_ascii=False)
        (pope / "pope" / f"coco_pope_{kind}.json").write_text(f"{line}\n\n", encoding="utf-8")
    task, *_ = load_benchmark("pope", data_root=pope, limit=2)
    assert text in task.examples[0].prompt


def test_predictions_of_mme_may_have_several_lines(tmp_path):
    from moresjax.evaluation.metrics.yes_no import COGNITION, PERCEPTION

    results = tmp_path / "results"
    results.mkdir()
    for subtask in PERCEPTION + COGNITION:
        folder = tmp_path / "mme" / subtask
        folder.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(folder / "7.jpg")
        (folder / "7.txt").write_text(
            "Is it\u2028a cat?\tYes\nIs it a dog?\tNo\n", encoding="utf-8"
        )
        rows = "7.jpg\tIs it\u2028a cat?\tYes\tYes,\n\nit is\n7.jpg\tIs it a dog?\tNo\tno\ta\n"
        (results / f"{subtask}.txt").write_text(rows, encoding="utf-8")
    found = rescore("mme", results, data_root=tmp_path, limit=100)
    assert [row["prediction"] for row in found.predictions[:2]] == ["Yes,\n\nit is", "no\ta"]
    assert found.scores["mme"]["score"] == 2800
    (results / "OCR.txt").write_text("first line without columns\n")
    with pytest.raises(UserError, match=r"line 1 of .*OCR\.txt has 1 columns instead of 4"):
        rescore("mme", results, data_root=tmp_path, limit=100)
