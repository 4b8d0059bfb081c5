"""The models of lm_eval that ask a server score as `moresjax evaluate` does."""

import numpy as np
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from moresjax.data.digits import FAMILIES, ask, make_scene
from moresjax.evaluation.lm import MoresjaxLM


@pytest.fixture(scope="module")
def docs():
    rng = np.random.default_rng(0)
    turns = [
        ask(FAMILIES[n % len(FAMILIES)], make_scene(rng, "test").digits, rng) for n in range(6)
    ]
    choices = ["yes .", "no .", "two .", "six ."]
    return [{"q": turn.question, "a": turn.answer, "choices": choices} for turn in turns]


def make_task(docs, **more):
    from datasets import Dataset

    return ConfigurableTask(
        config={
            "task": "words",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "doc_to_text": "{{q}}",
            **more,
        }
    )


def run(lm, task, **options):
    tasks = {"tasks": {"words": task}, "groups": {}}
    found = evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0, log_samples=True, **options)
    answers = [sample["filtered_resps"] for sample in found["samples"]["words"]]
    return found["results"]["words"], answers


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    model.prompts.tokenizer.save_pretrained(path)
    return str(path)


def completions(url, folder, batch_size):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="talker",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        add_bos_token=True,
        batch_size=batch_size,
    )


def test_local_completions_score_choices_alike(url, model, docs, folder):
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    task = make_task(
        docs,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target=1,
        metric_list=metrics,
    )
    lm = completions(url, folder, batch_size=5)
    scores, found = run(lm, task)
    own_scores, expected = run(MoresjaxLM(model, batch_size=8), task)
    assert scores == own_scores
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose([x[0] for x in theirs], [x[0] for x in ours], rtol=1e-4)
        assert [x[1] for x in theirs] == [x[1] for x in ours]


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_texts_are_generated_alike(url, model, docs, folder, kind):
    from lm_eval.models.openai_completions import LocalChatCompletion

    task = make_task(
        docs,
        output_type="generate_until",
        doc_to_target="{{a}}",
        generation_kwargs={"until": ["two"], "max_gen_toks": 6, "temperature": 0.0},
        metric_list=[{"metric": "exact_match"}],
    )
    if kind == "completions":
        lm = completions(url, folder, batch_size=4)
        scores, found = run(lm, task)
        own_scores, expected = run(MoresjaxLM(model, batch_size=8), task)
        assert scores == own_scores
        assert found == expected
        return
    lm = LocalChatCompletion(
        base_url=f"{url}/v1/chat/completions", model="talker", num_concurrent=3, eos_string="</s>"
    )
    _, found = run(lm, task, apply_chat_template=True)
    questions = [doc["q"] for doc in docs]
    expected = model.generate(questions, max_new_tokens=6, stop=["two", "</s>"])
    assert [answer for (answer,) in found] == expected
