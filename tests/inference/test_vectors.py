"""Steering vectors: one for each layer, set while a model answers, chosen for every prompt."""

import numpy as np
import pytest

from moresjax.core.errors import UserError
from moresjax.generation import programs
from moresjax.inference.chat import Chat
from moresjax.inference.model import Model
from moresjax.testing.models import talking_model

SPEC, NEW = "steer:positions=last_prompt|generated", 4
PROMPTS = ["how many times two ?", "is there a seven ? no .", "what is the largest ?"]
VECTORS = 300_000 * np.random.default_rng(0).standard_normal((4, 2, 16)).astype(np.float32)


def steered(vector: np.ndarray, alpha: float = 1.0) -> Model:
    """A model whose tuning has this vector from the start."""
    model = talking_model(SPEC)
    own = model.mllm.tuning.params["steer"]["llm.block.out"]
    own["vector"][...], own["alpha"][...] = vector, alpha
    return model


def answers(model: Model, **options) -> list[str]:
    return model.generate(PROMPTS, max_new_tokens=NEW, batch_size=4, **options)


def test_a_file_may_have_a_row_for_each_layer(tmp_path):
    np.savez(tmp_path / "v.npz", rows=VECTORS[0], one=VECTORS[0, 1], three=VECTORS[:3, 0])
    for key, expected in (("rows", VECTORS[0]), ("one", VECTORS[0, [1, 1]])):
        model = talking_model(f"{SPEC},vector={tmp_path}/v.npz:{key},alpha=2")
        found = model.mllm.tuning.params["steer"]["llm.block.out"]
        np.testing.assert_array_equal(found["vector"][...], expected)
        np.testing.assert_array_equal(found["alpha"][...], [2, 2])
    with pytest.raises(UserError, match=r"got shape \(3, 16\); 2 x 16 would give every layer"):
        talking_model(f"steer:vector={tmp_path}/v.npz:three")
    with pytest.raises(UserError, match=r"must be 16 finite numbers, got shape \(2, 16\)"):
        talking_model(f"steer:vector={tmp_path}/v.npz:rows,site=llm.embed.out")


def test_what_is_set_acts_at_once_in_the_engine_that_is_there():
    model = talking_model(SPEC)
    seen, engine = {tuple(answers(model))}, model.service.engine()
    assert seen == {tuple(answers(talking_model("none")))}
    compiled = programs.prefill._cache_size(), programs.decode._cache_size()
    for vector, alpha in ((VECTORS[0], 1.0), (VECTORS[1, 0], -2.0), (VECTORS[1, 0], 2.0)):
        before = model.fingerprint
        model.set(vector=vector, alpha=alpha)
        assert model.fingerprint != before
        expected = steered(vector, alpha)
        found = answers(model)
        assert (programs.prefill._cache_size(), programs.decode._cache_size()) == compiled
        assert found == answers(expected)
        np.testing.assert_allclose(model.logits(PROMPTS), expected.logits(PROMPTS), atol=1e-5)
        compiled = programs.prefill._cache_size(), programs.decode._cache_size()
        seen.add(tuple(found))
    assert model.service.engine() is engine
    assert len(seen) == 4
    model.set(alpha=[0, 0])
    assert answers(model) == answers(talking_model("none"))


def test_a_vector_after_the_final_norm_acts_on_what_is_said_next():
    chosen = "steer:positions=last_prompt|generated,site=llm.norm.out"
    model = talking_model(f"prompt:length=2/{chosen}")
    kernel = np.asarray(model.mllm.llm.head.kernel[...])
    word = model.processor.tokenizer.convert_tokens_to_ids("seven")
    model.set(vector=kernel[:, word], alpha=1000.0)
    assert answers(model) == [" ".join(["seven"] * NEW)] * len(PROMPTS)
    logits = []
    for alpha in (0.0, 2.0):
        model.set(alpha=alpha)
        logits.append(np.asarray(model.logits(PROMPTS[0])[0]))
    moved = logits[1] - logits[0]
    np.testing.assert_allclose(moved[-1], 2 * kernel[:, word] @ kernel, rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(moved[:-1], 0)


def test_every_prompt_chooses_a_vector():
    model = talking_model("none")
    model.load_vectors({"a": VECTORS[0], "b": VECTORS[1, 0]}, SPEC)
    assert model.adapters == ("a", "b")
    found = answers(model, adapters=["a", None, "b"])
    models = steered(VECTORS[0]), talking_model("none"), steered(VECTORS[1, 0])
    assert found == [answers(each)[number] for number, each in enumerate(models)]
    with pytest.raises(UserError, match="setting a vector takes a single tuning"):
        model.set(alpha=1)


@pytest.mark.parametrize(
    ("tuning", "values", "message"),
    [
        ("none", {"alpha": 1}, "has no 'steer' whose values can be set"),
        ("mores:rank=1", {"alpha": 1}, "has no 'steer' whose values can be set"),
        (SPEC, {"beta": 1}, "value of steer 'beta'; choose from: "),
        (SPEC, {"vector": np.ones(3)}, r"of shape \(2, 16\) or \(16,\), got shape \(3,\)"),
        (SPEC, {"vector": np.full(16, np.nan)}, "must be finite numbers"),
        (f"{SPEC},site=llm.embed.out", {"vector": 1.0}, r"of shape \(16,\), got shape \(\)"),
    ],
)
def test_what_cannot_be_set_is_refused(tuning, values, message):
    with pytest.raises(UserError, match=message):
        talking_model(tuning).set(**values)


def test_vectors_of_no_steering_are_refused():
    with pytest.raises(UserError, match="has no 'steer' whose values can be set"):
        talking_model("none").load_vectors({"a": np.ones(16)}, "loreft:rank=1")


def test_a_chat_does_not_go_on_with_what_was_read_with_another_vector():
    model = talking_model("steer:positions=all")
    chat, told = Chat(model, max_new_tokens=NEW), []
    for vector in (VECTORS[0], VECTORS[1]):
        model.set(vector=vector)
        told.append("".join(chat.ask(PROMPTS[0])))
    fresh = Chat(model, max_new_tokens=NEW)
    fresh.turns = chat.turns[:1]
    assert told[1] == "".join(fresh.ask(PROMPTS[0]))
    assert chat.tokens_read == fresh.tokens_read
