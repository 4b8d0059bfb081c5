"""States, lens, patching and steering in LLMs of every kind, and on several devices."""

from typing import Any

import jax
import numpy as np
import pytest

from moresjax.evaluation.examples import Example
from moresjax.evaluation.steering.ask import Trial
from moresjax.evaluation.steering.run import steer
from moresjax.evaluation.steering.tasks import parse_steering_task
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.inference.analyze import (
    answer_gradients,
    attribute_tokens,
    logit_lens,
    patching,
)
from moresjax.inference.model import Model
from moresjax.inference.steering import first_tokens, with_steering
from moresjax.sharding.mesh import make_mesh
from moresjax.testing.models import talking_model

PROMPTS = "is there a two ?", "is there a six ?"
SITE, NORM, LAST = "llm.block.out", "llm.norm.out", 1
IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
ASKED = BenchmarkTask("asked", [Example(x, x, "two") for x in PROMPTS], max_new_tokens=2)
STEERING = parse_steering_task("answers:yes>two")
VECTOR = 50 * np.random.default_rng(1).standard_normal(16).astype(np.float32)
# What families of LLMs have beside LLaMA's blocks, which the other test has.
PHI = {"norm": "layer", "parallel": True, "rotary_fraction": 0.5, "head_bias": True}
KINDS: dict[str, dict[str, Any]] = {
    "phi, stablelm": PHI | {"gated_mlp": False, "activation": "gelu"},
    "gemma, mistral": {
        "post_norms": True,
        "norm_offset": 1.0,
        "scale_embeddings": True,
        "tie_embeddings": True,
        "window": 3,
        "attention_pattern": "lg",
        "logit_softcap": 300.0,
    },
    "qwen, opt": {"qk_norm": True, "qkv_bias": True, "positions": "learned", "position_offset": 2},
}


def numbers(model: Model) -> dict[str, np.ndarray]:
    """What every kind of analysis finds about two questions."""
    states = model.states(PROMPTS, site=[SITE, NORM])
    lens = logit_lens(model, PROMPTS[0], words=["two"], top=2)
    return {
        "states": np.stack([np.asarray(states.matrix(SITE, layer)) for layer in (0, LAST)]),
        "normed": np.asarray(states.matrix(NORM, 0)),
        "words": lens.word_logprobs[..., 0],
        "top": lens.logprobs,
        "effect": patching(model, *PROMPTS, ("two", "three")).effect,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_analyses_agree_with_the_models_own_pass(kind):
    model = talking_model(**KINDS[kind])
    found = numbers(model)
    run = model.run(PROMPTS, read=[SITE, NORM], edits={NORM: lambda h: h + VECTOR})
    size = np.abs(run.states[SITE]).max()
    np.testing.assert_allclose(found["states"], run.states[SITE][:, :, -1], atol=1e-5 * size)
    np.testing.assert_allclose(found["normed"], run.states[NORM][:, -1] - VECTOR, atol=1e-4)
    logits = model.mllm.llm.logits(run.states[NORM][:1] - VECTOR)[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    two, scale = model.prompts.tokenizer.convert_tokens_to_ids("two"), np.abs(logprobs).max()
    np.testing.assert_allclose(found["words"][-1], logprobs[:, two], atol=1e-4 * scale)
    np.testing.assert_allclose(found["top"][-1], -np.sort(-logprobs)[:, :2], atol=1e-4 * scale)
    # After the last block nothing but the last token counts.
    assert found["effect"][-1, -1] == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found["effect"][-1, :-1], 0, atol=1e-3)
    steered = first_tokens(model, found["normed"], VECTOR[None], site=NORM)[0]
    np.testing.assert_array_equal(steered, run.logits[:, -1].argmax(-1))


def test_on_eight_devices_all_numbers_are_the_same():
    model, answers = talking_model(), []

    def steered() -> dict[str, np.ndarray]:
        found, trial = numbers(model), Trial("v", VECTOR, LAST)
        with with_steering(model, trial.spec) as method:
            model.set(method, vector=trial.rows(2))
            rows = [model.prompts.row(text) for text in PROMPTS]
            done = model.service.generate_many(rows, 2, batch_size=8)
        tokens = np.stack([completion.tokens[:1] for completion in done])
        first = first_tokens(model, found["states"][LAST], VECTOR[None])[0]
        np.testing.assert_array_equal(first, tokens[:, 0])
        # Rows of one batch with vectors of their own.
        strong = Trial("v", 6000 * VECTOR, LAST), Trial("w", -6000 * VECTOR[::-1], 0)
        steering = steer(model, [ASKED], strong, STEERING, batch_size=8)
        answers.append(steering.answers["asked"])
        assert len({*map(tuple, answers[-1].values())}) > 1
        attributed = attribute_tokens(model, PROMPTS[0], IMAGE, answer="two")
        return found | {
            "tokens": tokens,
            "derivatives": answer_gradients(model, PROMPTS, [IMAGE, IMAGE], SITE, answer="two"),
            "attributed": attributed.scores,
        }

    alone = steered()
    model.shard(make_mesh())
    for name, value in steered().items():
        size = max(float(np.abs(alone[name]).max()), 1.0)
        np.testing.assert_allclose(value, alone[name], atol=1e-5 * size, err_msg=name)
    assert answers[0] == answers[1]
