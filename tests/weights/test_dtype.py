"""The dtype of activations: as asked for; half precision as near to fp32 as `transformers` is."""

# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import PhiConfig

import moresjax as mj
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
from moresjax.inference.model import Model
from moresjax.models.attention import attention
from moresjax.testing.hf_llms import FAMILIES, TEXT, oracle_of, padded, text_rows
from moresjax.testing.references import other_token, reference_tokens
from moresjax.weights.dtypes import compute_dtype
from moresjax.weights.hf import load_pretrained

LLMS = {name: FAMILIES[name] for name in FAMILIES if "," not in name}
LLMS["phi"] = PhiConfig(**TEXT, partial_rotary_factor=0.5)
MAX_RATIO = 1.2


def logits_of(oracle, ids, mask) -> np.ndarray:
    with torch.no_grad():
        out = oracle(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    return out.logits.float().numpy()


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors, dtype=np.float64))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LLMS)
def test_half_precision_drifts_no_more_than_that_of_transformers(name, dtype, tmp_path):
    """Root mean square errors of the logits against those of the same weights in fp32."""
    oracle = oracle_of(LLMS[name]).to(getattr(torch, dtype))
    oracle.save_pretrained(tmp_path)
    ids, mask = padded(text_rows(24, 17, 24, 9, 24, 24), left=False)
    real = mask.astype(bool)
    near = load_pretrained(tmp_path, dtype="stored")
    assert near.config.llm.dtype == dtype
    ours = np.asarray(Model(near, None).logits(input_ids=ids, attention_mask=mask))
    theirs = logits_of(oracle, ids, mask)
    exact = logits_of(oracle.float(), ids, mask)
    ratio = rms((ours - exact)[real]) / rms((theirs - exact)[real])
    print(f"{name}, {dtype}: rms error {rms((ours - exact)[real]):.4f}, ratio {ratio:.3f}")
    assert 0 < rms((ours - exact)[real]) <= 0.1 * exact[real].std()
    assert ratio <= MAX_RATIO


def test_a_float16_folder_generates_what_transformers_does(tmp_path):
    oracle = oracle_of(FAMILIES["qwen 2"]).to(torch.float16)
    oracle.save_pretrained(tmp_path)
    ids, mask = padded(text_rows(9, 5, 12), left=True)
    tokens, logits = reference_tokens(oracle, {"input_ids": ids, "attention_mask": mask}, 5)
    model = mj.load(tmp_path, dtype="float16")
    assert {str(x[...].dtype) for x in jax.tree.leaves(nnx.state(model.mllm.llm.blocks))} == {
        "float16"
    }
    ours = np.asarray(Engine(model.mllm, eos_ids=()).generate(hf_batch(ids, mask), 5).tokens)
    for row in range(3):
        assert other_token(ours[row], tokens[row], logits[row], 1e-3) is None


def test_attention_in_float16_does_not_overflow():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 2, 3, 64)), jnp.float16) for _ in range(3))
    q, k = 100 * q + 60, 100 * k + 60  # products beyond 65504
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)), None)
    found = attention(q, k, v, None)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, exact, atol=2e-3)


@pytest.mark.parametrize(
    ("device", "choice", "stored", "expected"),
    [
        ("cpu", "auto", "bfloat16", "float32"),
        ("gpu", "auto", "bfloat16", "bfloat16"),
        ("tpu", "auto", "float32", "float32"),
        ("gpu", "auto", "float16", "float16"),
        ("tpu", "auto", "float16", "bfloat16"),
        ("cpu", "stored", "bfloat16", "bfloat16"),
        ("tpu", "float32", "bfloat16", "float32"),
    ],
)
def test_what_is_computed_in(device, choice, stored, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    assert compute_dtype(choice, stored) == expected


def test_the_dtype_of_a_folder_and_of_a_command(tmp_path, capsys):
    oracle_of(FAMILIES["qwen 2"]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert mj.load(tmp_path).config.llm.dtype == "float32"  # on a CPU
    model = mj.load(tmp_path, dtype="stored")
    assert model.mllm.llm.blocks.mlp.up.kernel[...].dtype == jnp.bfloat16
    assert model.config.llm.dtype == "bfloat16"
    assert mj.load(tmp_path).fingerprint != model.fingerprint
    with pytest.raises(UserError, match="unknown dtype 'fp8'; choose from: auto, stored, float32"):
        mj.load(tmp_path, dtype="fp8")
    command = ["generate", "--model", str(tmp_path), "--prompt", "x", "--dtype", "half"]
    assert main(command) == 2
    assert "unknown dtype 'half'" in capsys.readouterr().err
