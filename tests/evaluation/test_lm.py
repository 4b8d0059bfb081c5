"""The lm_eval model class and the benchmark runner, on a tiny random model of the digits world."""

import json

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.data.digits import FAMILIES, build_tokenizer, vocabulary
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import Processor
from moresjax.data.templates import get_template
from moresjax.evaluation.benchmarks.digits import majority_accuracy, make_examples
from moresjax.evaluation.lm import MoresjaxLM
from moresjax.evaluation.results import write_results
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.scoring import exact_match
from moresjax.inference.model import Model
from moresjax.inference.prompts import PromptEncoder
from moresjax.testing.models import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    return Model(tiny_model(vocab_size=len(vocabulary())), processor)


def requests(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def log_probabilities(model: Model, ids: list[int]) -> np.ndarray:
    logits = model.logits(input_ids=np.asarray([ids]))
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]


def test_loglikelihood_is_the_sum_over_the_continuation_in_any_batch(model):
    pairs = [
        ("is there a", " two ?"),
        ("what is at top-left ?", " seven"),
        ("how", " many times three"),
        ("what is the largest", " ? nine"),
        ("", "are top-left and"),
    ]
    lm = MoresjaxLM(model, batch_size=2)
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    tokenizer = model.processor.tokenizer
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        whole = tokenizer(context + continuation)["input_ids"]
        count = len(continuation.split())
        scores = log_probabilities(model, whole)
        at = range(len(whole) - count - 1, len(whole) - 1)
        expected = sum(scores[i, whole[i + 1]] for i in at)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == all(scores[i].argmax() == whole[i + 1] for i in at)


def test_rolling_loglikelihood_scores_every_token_after_the_first(model):
    text = "is top-left larger than top-right ?"
    lm = MoresjaxLM(model, batch_size=4)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    ids = model.processor.tokenizer(text)["input_ids"]
    scores = log_probabilities(model, ids)
    assert found == pytest.approx(sum(scores[i, ids[i + 1]] for i in range(len(ids) - 1)), abs=1e-4)


def test_long_texts_are_scored_in_the_windows_of_the_library():
    """Those of its own models: what does not fit with all before it sees what fits."""
    processor = Processor(build_tokenizer(), get_template("bare"), ImageProcessor(12), 9)
    short = Model(tiny_model(vocab_size=len(vocabulary()), max_positions=8), processor)
    texts = ["is top-left larger than top-right ? " * 4, "how many times two ?", ""]
    lm = MoresjaxLM(short, batch_size=2)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
    tokenizer = processor.tokenizer
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert len(ids) == 24
    start, expected = tokenizer.bos_token_id, 0
    for end in (8, 16, 24):
        read = [start, *ids[: end - 1]][-8:]
        scores = log_probabilities(short, read)
        expected += sum(scores[i, ids[end - 8 + i]] for i in range(8))
    assert found[0] == pytest.approx(expected, abs=1e-4)
    whole = tokenizer(texts[1])["input_ids"]
    scores = log_probabilities(short, whole)
    assert found[1] == pytest.approx(sum(scores[i, t] for i, t in enumerate(whole[1:])), abs=1e-4)
    assert found[2] == 0
    # A context that does not fit loses its beginning, down to its last token.
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", [(texts[0], "two ?")]))
    two = tokenizer("two ?", add_special_tokens=False)["input_ids"]
    scores = log_probabilities(short, [*ids[-7:], two[0]])
    assert score == pytest.approx(scores[6, two[0]] + scores[7, two[1]], abs=1e-4)


def test_generate_until_keeps_the_order_and_cuts_at_stop_strings(model):
    questions = make_examples("val", 4)["compare"]
    visual = [
        (q.prompt, {"max_gen_toks": 2 + i % 2}, {"visual": list(q.images)})
        for i, q in enumerate(questions)
    ]
    text = [("what is the largest ?", {"max_gen_toks": 3})]
    lm = MoresjaxLM(model, batch_size=3)
    found = lm.generate_until(requests("generate_until", [*visual, *text]), disable_tqdm=True)
    for (prompt, options, images), answer in zip(visual, found, strict=False):
        alone = model.generate([prompt], [images["visual"]], max_new_tokens=options["max_gen_toks"])
        assert answer == alone[0]
    assert len(found) == 5
    first = found[-1].split()[0]
    cut = [(text[0][0], {"max_gen_toks": 3, "until": [first]})]
    assert lm.generate_until(requests("generate_until", cut), disable_tqdm=True) == [""]


def test_requests_are_drawn_where_they_say_so(model):
    """Equal requests are draws of their own; others in between stay greedy."""
    prompt = "what is the largest ?"
    drawn = {"do_sample": True, "temperature": 2.0, "top_k": 20, "max_new_tokens": 5}
    ask = [(prompt, drawn)] * 4 + [
        (prompt, {"max_gen_toks": 5, "temperature": 1.0, "do_sample": False})
    ]
    lm = MoresjaxLM(model, batch_size=4)
    found = lm.generate_until(requests("generate_until", ask), disable_tqdm=True)
    assert found == lm.generate_until(requests("generate_until", ask), disable_tqdm=True)
    assert len(set(found[:4])) > 1
    row = Row.text(lm._ids(prompt))
    tokens = lm.model.service.generate_many([row], 5, batch_size=4)[0].tokens
    assert found[4] == model.prompts.spell(tokens)
    with pytest.raises(UserError, match="a request wants a beam search"):
        lm.generate_until(requests("generate_until", [(prompt, {"num_beams": 2})]))


def test_blanks_around_a_reply_belong_to_raw_text(model, monkeypatch):
    monkeypatch.setattr(PromptEncoder, "spell", lambda self, ids: "  two\n")
    image = np.zeros((12, 12, 3), np.uint8)
    ask = [("how", {"max_gen_toks": 1}), ("how", {"max_gen_toks": 1}, {"visual": [image]})]
    found = MoresjaxLM(model).generate_until(requests("generate_until", ask))
    assert found == ["  two\n", "two"]


def test_accuracy_per_family_is_what_the_predictions_say(model, tmp_path):
    result = evaluate(model, ["digits"], split="val", limit=6, attention=True, batch_size=5)
    assert list(result.scores) == [f"digits_{family}" for family in FAMILIES]
    assert len(result.predictions) == 6 * len(FAMILIES)
    for name, score in result.scores.items():
        own = [p for p in result.predictions if p["task"] == name]
        right = np.mean([p["prediction"].strip() == p["answer"] for p in own])
        assert score["score"] == pytest.approx(right)
        assert score["n"] == 6
        assert score["stderr"] == pytest.approx(np.sqrt(right * (1 - right) / 5))
    assert result.mean_accuracy == pytest.approx(
        np.mean([score["score"] for score in result.scores.values()])
    )
    assert result.attention.samples == 6 * len(FAMILIES)
    path = write_results(result, tmp_path, split="val")
    saved = json.loads(path.read_text())
    assert saved["split"] == "val"
    assert saved["scores"] == result.scores
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.predictions


def test_lm_eval_tasks_run_unchanged(model):
    """A text task of lm_eval itself, with its own metrics, on local data."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run

    docs = [
        {"q": "is there a two ?", "choices": ["yes", "no", "two"], "gold": 0},
        {"q": "what is the largest ?", "choices": ["nine", "two", "six"], "gold": 1},
    ]
    task = ConfigurableTask(
        config={
            "task": "words",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}],
        }
    )
    results = run(
        lm=MoresjaxLM(model, batch_size=2),
        task_dict={"tasks": {"words": task}, "groups": {}},
        bootstrap_iters=0,
        log_samples=False,
    )
    expected = []
    for doc in docs:
        scores = []
        for choice in doc["choices"]:
            ids = model.processor.tokenizer(f"{doc['q']} {choice}")["input_ids"]
            scores.append(log_probabilities(model, ids)[-2, ids[-1]])
        expected.append(int(np.argmax(scores)) == doc["gold"])
    assert results["results"]["words"]["acc,none"] == pytest.approx(np.mean(expected))


def test_scenes_of_an_evaluation_are_fixed_and_differ_by_split():
    a, b = make_examples("test", 3), make_examples("test", 3)
    assert [i.prompt for f in FAMILIES for i in a[f]] == [i.prompt for f in FAMILIES for i in b[f]]
    val = make_examples("val", 3)
    assert any(
        (x.images[0] != y.images[0]).any() for x, y in zip(a["same"], val["same"], strict=True)
    )


def test_majority_is_the_best_constant_answer():
    questions = make_examples("test", 50)["count"]
    answers = [q.answer for q in questions]
    assert majority_accuracy(questions) == max(answers.count(a) for a in set(answers)) / 50


def test_exact_match_ignores_case_and_blanks_only():
    assert exact_match(" Seven ", "seven") == 1
    assert exact_match("seven .", "seven") == 0


def test_wrong_requests_are_refused(model):
    with pytest.raises(UserError, match=r"task 'digit'.*digits"):
        evaluate(model, ["digit"])
    with pytest.raises(UserError, match="limit must be at least 1, got 0"):
        evaluate(model, ["digits"], limit=0)
    with pytest.raises(UserError, match=r"split 'dev'.*train, val, test"):
        evaluate(model, ["digits"], split="dev", limit=2)
