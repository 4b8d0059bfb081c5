"""Where a logit and an answer come from: the sums, and what torch finds with its hooks."""

import numpy as np
import pytest
import torch

from moresjax.analysis.attribution import embedding_gradients, logit_parts
from moresjax.core.errors import UserError
from moresjax.generation.hf_inputs import hf_batch
from moresjax.inference.attribution import attribute_logit, attribute_tokens
from moresjax.testing.hf_llavas import IMAGE_ID, Case, case_of
from moresjax.testing.models import talking_model

IMAGE = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
ASKED = "is there a two ?"
PHI = {
    "norm": "layer",
    "parallel": True,
    "head_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "gated_mlp": False,
    "activation": "gelu",
}
GEMMA = {"post_norms": True, "norm_offset": 1.0, "tie_embeddings": True, "scale_embeddings": True}


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("llama + clip")


@pytest.mark.parametrize(
    ("tuning", "llm"),
    [
        ("none", {}),
        ("none", PHI),
        ("none", GEMMA),
        ("none", {"positions": "learned", "position_offset": 2}),
        ("lora:rank=2/prompt:length=2", {}),
    ],
    ids=["llama", "phi", "gemma", "opt", "tuned"],
)
def test_heads_mlps_and_embedding_make_up_the_logit(tuning, llm):
    """Nothing is left over where there are neither biases nor edits."""
    model = talking_model(tuning, **llm)
    parts = attribute_logit(model, ASKED, IMAGE, answer="two", against="one")
    vocabulary = model.prompts.tokenizer.get_vocab()
    logits = model.logits(ASKED, IMAGE)[0, -1]
    wanted = float(logits[vocabulary["two"]] - logits[vocabulary["one"]])
    size = max(abs(wanted), np.abs(parts.heads).max(), np.abs(parts.mlps).max())
    assert parts.logit == pytest.approx(wanted, abs=1e-4 * size)
    assert parts.total == pytest.approx(parts.logit, abs=1e-4 * size)
    assert np.abs(parts.heads).min() > 0
    np.testing.assert_allclose(parts.edits, 0, atol=1e-4 * size)
    if llm is not PHI:
        np.testing.assert_allclose(parts.attention_rest, 0, atol=1e-4 * size)
        assert parts.bias == pytest.approx(0, abs=1e-4 * size)


def test_edits_are_summands_of_their_own():
    model = talking_model("steer:alpha=0,layers=1,positions=all")
    plain = attribute_logit(model, ASKED, IMAGE, answer="two")
    (steer,) = (v for v in model.mllm.tuning.params.values())
    (values,) = steer.values()
    vector = np.random.default_rng(1).standard_normal(values["vector"].shape)
    values["vector"][...] = vector.astype(np.float32)
    values["alpha"][...] = values["alpha"][...] + 1000
    steered = attribute_logit(model, ASKED, IMAGE, answer="two")
    assert steered.edits[0] == pytest.approx(0, abs=1e-3)
    assert abs(steered.edits[1]) > 0.1
    assert plain.edits == pytest.approx([0, 0], abs=1e-4)


def test_heads_and_mlps_are_those_of_torch(case):
    """Outputs of heads and MLPs from hooks, through the final norm with its scale held."""
    oracle = case.oracle.model.language_model
    caught: dict[str, tuple] = {}

    def keep(name: str):
        return lambda module, args, out: caught.__setitem__(name, (args[0], out))

    for number, layer in enumerate(oracle.layers):
        layer.self_attn.o_proj.register_forward_hook(keep(f"o{number}"))
        layer.mlp.register_forward_hook(keep(f"mlp{number}"))
    handle = oracle.norm.register_forward_hook(keep("norm"))
    row, token, other = 2, 7, 9
    ids, pixels = torch.tensor([case.rows[row]]), torch.tensor(case.pixels[row])
    with torch.no_grad():
        logits = case.oracle(input_ids=ids, pixel_values=pixels).logits[0, -1]
        final = caught["norm"][0][0, -1]
        scale = oracle.norm.weight / (final.square().mean() + oracle.norm.variance_epsilon).sqrt()
        head = case.oracle.lm_head.weight
        direction = (head[token] - head[other]) * scale
        heads, mlps = [], []
        for number, layer in enumerate(oracle.layers):
            inputs = caught[f"o{number}"][0][0, -1].reshape(4, -1)
            kernel = layer.self_attn.o_proj.weight.reshape(32, 4, -1)
            heads.append(torch.einsum("nh,dnh,d->n", inputs, kernel, direction))
            mlps.append(caught[f"mlp{number}"][1][0, -1] @ direction)
    handle.remove()
    batch = case.batch(chosen=[row], left=False)
    parts = logit_parts(case.model, batch, len(case.rows[row]) - 1, token, other)
    assert parts.logit == pytest.approx(float(logits[token] - logits[other]), abs=1e-4)
    np.testing.assert_allclose(parts.heads, torch.stack(heads), atol=1e-4)
    np.testing.assert_allclose(parts.mlps, torch.stack(mlps), atol=1e-4)


def test_derivatives_are_those_of_torch(case):
    caught = []

    def keep(module, args, kwargs):
        embedded = kwargs["inputs_embeds"].detach().requires_grad_()
        caught.append(embedded)
        return args, kwargs | {"inputs_embeds": embedded}

    handle = case.oracle.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    row, answer = 0, [7, 9]
    ids = [*case.rows[row], *answer]
    logits = case.oracle(
        input_ids=torch.tensor([ids]), pixel_values=torch.tensor(case.pixels[row])
    ).logits[0]
    handle.remove()
    places = [len(ids) - 3, len(ids) - 2]
    value = logits[places].log_softmax(-1)[[0, 1], answer].sum()
    value.backward()
    batch = hf_batch([ids], None, case.pixels[row], IMAGE_ID, case.model.config.visual_tokens)
    values, embedded, gradient = embedding_gradients(
        case.model, batch, np.asarray([places]), np.asarray([answer]), np.ones((1, 2), np.float32)
    )
    assert values[0] == pytest.approx(value.item(), abs=1e-4)
    np.testing.assert_allclose(embedded[0], caught[0].detach()[0], atol=1e-5)
    np.testing.assert_allclose(gradient[0], caught[0].grad[0], atol=1e-4)


def test_tokens_and_patches_of_an_answer():
    model = talking_model("mores:rank=1/prompt:length=2")
    images = [IMAGE, 255 - IMAGE]
    options = {"answer": "two .", "images": images}
    found = attribute_tokens(model, ASKED, **options)
    (scored,) = model.score([ASKED], [["two ."]], [images])
    assert found.value == pytest.approx(scored[0].logprob, abs=1e-4)
    assert found.tokens.count("<image>") == 18
    assert found.tokens[-5:] == ASKED.split()
    visual = found.scores[found.kinds == 2]
    np.testing.assert_array_equal(found.grids.reshape(-1), visual)
    # The same question against the same answer leaves nothing; both have the same beginning.
    pair = attribute_tokens(model, ASKED, against="two .", **options)
    assert pair.value == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(pair.scores, 0, atol=1e-4)
    norms = attribute_tokens(model, ASKED, method="gradient_norm", **options)
    assert norms.scores.min() >= 0 < norms.scores.max()
    without = attribute_tokens(model, ASKED, answer="two .")
    assert without.grids.size == 0


def test_what_cannot_be_attributed_is_told():
    model = talking_model()
    with pytest.raises(UserError, match="unknown method of attribution 'magic'"):
        attribute_tokens(model, ASKED, answer="two", method="magic")
    with pytest.raises(UserError, match="and two one begin with the same token"):
        attribute_logit(model, ASKED, answer="two .", against="two one")
