"""Edits beside a folder of `transformers`: plain torch hooks give our logits and our answers."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moresjax.core.errors import UserError
from moresjax.data.digits import vocabulary
from moresjax.generation.engine import Engine
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.models.mllm import MLLM
from moresjax.testing.hf_encoders import dinov2
from moresjax.testing.hf_llavas import IMAGE_ID, NEW, PAD, VOCAB, Case, case_of
from moresjax.testing.hf_llms import TEXT, opt, randomised
from moresjax.testing.hf_llms import oracle_of as llm_of
from moresjax.testing.models import digits_processor, tiny_model
from moresjax.weights.export import export_hf
from moresjax.weights.hf import load_pretrained

# Every arithmetic, site, region and slice that the loader has, on three families.
SPECS = {
    "llama + clip": "mores:rank=2,positions=image:f1+l2",
    "gemma 2 + clip": (
        "noreft:rank=2,positions=image:uniform(3)/direft:rank=2,positions=prompt:25%/"
        "consreft:rank=1,positions=last_prompt|generated,layers=1/lobireft:rank=1,positions=all:f3/"
        "mores:parity=llava-steering,positions=image:at(0;3)/red/houlsby:bottleneck=4/"
        "steer:positions=generated/red:site=llm.block.attn.out,positions=question:uniform(50%)"
    ),
    "phi + siglip": (
        "mrt:rank=2,visual_rank=2,skip=1;1/red:site=vision.block.mlp.out,positions=image:l2/"
        "red:site=vision.block.attn.out/loreft:rank=1,site=connector.out,positions=image:f1/"
        "loreft:rank=1,site=llm.embed.out/red:site=llm.block.attn.out/"
        "loreft:rank=1,site=llm.norm.out,positions=last_prompt|generated"
    ),
}


def tuned(model: MLLM, spec: str) -> MLLM:
    """A copy with the tuning attached and drawn: as they start, some methods do nothing."""
    model = nnx.clone(model)
    model.attach(spec)
    rng = np.random.default_rng(3)
    for sites in model.tuning.params.values():
        for leaves in sites.values():
            for variable in leaves.values():
                drawn = 0.5 * rng.standard_normal(variable.shape)
                variable.set_value(jnp.asarray(drawn, jnp.float32))
    return model


def loader(folder):
    """The module that lies in a folder, as those import it who do not have moresjax."""
    spec = importlib.util.spec_from_file_location("load_edits", folder / "load_edits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(model, case: Case, left: bool) -> np.ndarray:
    ids, mask, pixels = (torch.tensor(x) for x in case.arrays(left=left))
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    return out.logits.numpy()[mask.numpy().astype(bool)]


def ours(mllm: MLLM, case: Case, left: bool = True) -> np.ndarray:
    ids, mask, pixels = case.arrays(left=left)
    out = Model(mllm, None).logits(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, image_token_id=IMAGE_ID
    )
    return np.asarray(out)[mask.astype(bool)]


@pytest.mark.parametrize("family", SPECS)
def test_hooks_in_transformers_give_our_logits_and_our_greedy_answers(family, tmp_path):
    case = case_of(family)
    mllm = tuned(case.model, SPECS[family])
    folder = export_hf(mllm, tmp_path / "out")
    source = (folder / "load_edits.py").read_text()
    assert "import moresjax" not in source
    assert "from moresjax" not in source
    model = loader(folder).load(folder)
    model.generation_config.eos_token_id = None
    expected = ours(mllm, case)
    bare = theirs(case.oracle, case, True)
    assert np.abs(expected - bare).max() > 0.1  # the edits do something
    scale = max(1.0, np.abs(expected).max())
    for left in (True, False):
        assert np.abs(theirs(model, case, left) - expected).max() <= 1e-5 * scale
    engine = Engine(mllm, eos_ids=(VOCAB + 1,), pad_id=PAD)
    said = np.asarray(engine.generate(case.batch(), NEW).tokens)
    without, case.oracle = case.expected(), model
    np.testing.assert_array_equal(case.expected(), said)
    assert not np.array_equal(without, said)

    # Read back here, the same model.
    back = load(folder)
    assert back.tuning == mllm.tuning.spec
    np.testing.assert_allclose(ours(back._mllm, case), expected, atol=1e-5 * scale)
    assert load(folder, tuning="none").tuning == "none"


@pytest.mark.parametrize("kind", ["opt", "dinov2"])
def test_modules_of_other_families(kind, tmp_path):
    """An LLM without images, whose MLP is no module; an encoder with layer scales."""
    if kind == "opt":
        oracle, spec, visual = llm_of(opt()), "red:positions=prompt:l3/houlsby:bottleneck=4", 0
    else:
        config = LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=dinov2().config,
            image_token_index=IMAGE_ID,
        )
        oracle, visual = randomised(LlavaForConditionalGeneration(config)), 9
        spec = "red:site=vision.block.attn.out/red:site=vision.block.mlp.out,positions=image:f3"
    oracle.save_pretrained(tmp_path / "in")
    mllm = tuned(load_pretrained(tmp_path / "in"), spec)
    folder = export_hf(mllm, tmp_path / "out")
    ids = np.asarray([[IMAGE_ID] * visual + [7, 9, 11, 8]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 12, 12), np.float32)
    images = {"pixel_values": pixels} if visual else {}
    there = loader(folder).load(folder, attn_implementation="eager")
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids)} | {n: torch.tensor(x) for n, x in images.items()}
        found, bare = there(**inputs).logits.numpy(), oracle(**inputs).logits.numpy()
    expected = np.asarray(
        Model(mllm, None).logits(input_ids=ids, image_token_id=IMAGE_ID, **images)
    )
    assert np.abs(expected - bare).max() > 0.1
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


def test_edits_come_off_again_and_say_what_they_cannot_read(tmp_path):
    case = case_of("llama + clip")
    folder = export_hf(tuned(case.model, "mores:positions=image:f2"), tmp_path / "out")
    module = loader(folder)
    before = theirs(case.oracle, case, True)
    detach = module.attach(case.oracle, folder)
    after = theirs(case.oracle, case, True)
    assert np.abs(after - before).max() > 0.1
    ids = torch.tensor([[7, 8, 9]])
    embedded = case.oracle.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="need input_ids"):
        case.oracle(inputs_embeds=embedded)
    with torch.no_grad():
        cache = case.oracle(input_ids=ids, use_cache=True).cache
    with pytest.raises(ValueError, match="a prompt to be read in one pass"):
        case.oracle(input_ids=ids, cache=cache)
    detach()
    np.testing.assert_array_equal(theirs(case.oracle, case, True), before)


def test_the_tokens_before_a_users_first_word_are_the_templates(tmp_path):
    """A selector of questions means the same tokens in both, the beginning token left out."""
    mllm = tuned(tiny_model(vocab_size=len(vocabulary()) + 1), "red:positions=question:f1")
    model = Model(mllm, digits_processor())
    folder = export_hf(mllm, tmp_path / "out", model.processor)
    text = "what is the largest ?"
    row = model.prompts.rows([text], [()])[0]
    assert row.kind.tolist() == [1] + [3] * (len(row.tokens) - 1)
    ids = torch.tensor(row.tokens[None])
    there = loader(folder).load(folder)
    with torch.no_grad():
        out, bare = there(input_ids=ids).logits.numpy(), None
        there.get_submodule("model.language_model.layers.0.mlp.down_proj")._forward_hooks.clear()
        bare = there(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(out, model.logits(text), atol=1e-5)
    assert np.abs(out - bare).max() > 1e-3
    np.testing.assert_array_equal(out[0, 0], bare[0, 0])


def test_damaged_edits_are_refused(tmp_path):
    folder = export_hf(tuned(tiny_model(), "mores:layers=1"), tmp_path / "out")
    tensors = load_file(folder / "edits" / "edits.safetensors")
    assert {name: x.shape for name, x in tensors.items()} == {
        "0.rotate": (1, 16, 1),
        "0.weight": (1, 1, 16),
        "0.bias": (1, 1),
    }
    description = json.loads((folder / "edits" / "edits.json").read_text())
    for changed, message in (
        ({"0.bias": tensors["0.bias"]}, "lacks rotate of mores"),
        (tensors | {"0.rotate": tensors["0.rotate"][:, :8]}, r"has shape \(3, 8, 1\)"),
    ):
        save_file(changed, folder / "edits" / "edits.safetensors")
        with pytest.raises(UserError, match=message):
            load(folder)
    for changed in ({"edits": []}, {"spec": "red"}):
        (folder / "edits" / "edits.json").write_text(json.dumps(description | changed))
        with pytest.raises(UserError, match="does not list the edits of its spec"):
            load(folder)
    (folder / "edits" / "edits.json").write_text("{")
    with pytest.raises(UserError, match=r"edits\.json cannot be used"):
        load(folder)
