"""Reading: straight into shards, in the stored dtype, in eight bits, and never a wrong tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.models.count import count_parameters
from moresjax.models.initialize import initialize, quantize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.sharding.mesh import make_mesh, parameter_shardings
from moresjax.testing.batches import tiny_batch
from moresjax.testing.hf_encoders import (
    clip,
    dinov2,
    hidden_states,
    images,
    loaded,
    randomised,
    saved,
)
from moresjax.testing.hf_llms import TEXT, oracle_of
from moresjax.testing.models import tiny_model
from moresjax.training.step import split_model
from moresjax.tuning.merge import merged
from moresjax.weights import files
from moresjax.weights.hf import HFFolder, load_pretrained
from moresjax.weights.resize_pos_embed import resize_pos_embed

LLAMA = LlamaConfig(**(TEXT | {"vocab_size": 64}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    oracle_of(LLAMA).save_pretrained(path)
    return path


def values(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


# Shards


def test_parameters_are_read_into_their_shards(folder, monkeypatch):
    """Every device gets its part, and no part of a matrix is read that no device wants."""
    whole = load_pretrained(folder)
    largest = []
    read = files.StoredTensor.__getitem__

    def watched(self, index):
        array = read(self, index)
        largest.append(array.size / np.prod(self.shape) if len(self.shape) > 1 else 0)
        return array

    monkeypatch.setattr(files.StoredTensor, "__getitem__", watched)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    split = load_pretrained(folder, mesh=mesh)
    assert max(largest) <= 1 / 4
    flat = nnx.to_flat_state(nnx.state(split, nnx.Param))
    wanted = dict(nnx.to_flat_state(parameter_shardings(nnx.state(split, nnx.Param), mesh)))
    for path, variable in flat:
        assert variable.get_value().sharding == wanted[path].get_value()
    kernel = split.llm.blocks.mlp.up.kernel[...]
    assert kernel.addressable_shards[0].data.size == kernel.size / 8
    for name, value in values(whole).items():
        np.testing.assert_array_equal(values(split)[name], value)


def test_only_the_part_that_is_asked_for_is_read(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        files.StoredTensor, "__getitem__", lambda self, index: read.append(self.name)
    )
    parameters = HFFolder(folder).parameters("vision")
    assert list(parameters) == []
    parameters = HFFolder(folder).parameters()
    assert "llm.embed.table" in parameters
    assert read == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_keep_their_dtype(dtype, tmp_path):
    oracle_of(LLAMA).to(dtype).save_pretrained(tmp_path)
    found = values(load_pretrained(tmp_path))
    assert {str(x.dtype) for x in found.values()} == {str(dtype).removeprefix("torch.")}


# Wrong tensors


def changed(folder, tmp_path, change):
    """A copy of the folder whose tensors went through `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_unknown_tensors_are_refused(folder, tmp_path):
    copy = changed(folder, tmp_path, lambda t: t.update({"model.extra.weight": np.ones(3)}))
    with pytest.raises(UserError, match=r"has unknown 1 tensors: model\.extra\.weight"):
        load_pretrained(copy)


def test_every_fault_is_listed_at_once(folder, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["other"] = tensors["lm_head.weight"][:, :3].copy()
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].copy()

    with pytest.raises(UserError) as error:
        load_pretrained(changed(folder, tmp_path, change))
    for part in (
        "lacks 1",
        "model.norm.weight",
        "unknown 1",
        "other",
        "(5, 32) instead of (64, 32",
    ):
        assert part in str(error.value)


def test_buffers_of_old_files_are_passed_over(folder, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_pretrained(changed(folder, tmp_path, lambda t: t.update({name: np.ones(4, np.float32)})))


def test_half_a_file(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_pretrained(tmp_path)


# Eight bits


def test_int8_kernels_are_within_half_a_step():
    kernel = jax.random.normal(jax.random.key(0), (3, 16, 5)) * jnp.arange(5)
    whole, factor = quantize(kernel)
    assert (whole.dtype, whole.shape, factor.shape) == (jnp.int8, (3, 16, 5), (3, 5))
    error = np.abs(np.asarray(whole * factor[:, None] - kernel))
    assert (error <= np.asarray(factor)[:, None] / 2 + 1e-6).all()
    assert np.abs(np.asarray(whole)).max() == 127
    np.testing.assert_array_equal(whole[..., 0], 0)  # a feature without weights


def test_int8_logits_are_near_those_of_the_stored_weights(folder):
    stored, small = load_pretrained(folder), load_pretrained(folder, quantize="int8")
    kernel = small.llm.blocks.mlp.up.kernel
    assert kernel.dtype == jnp.int8
    tokens = np.random.default_rng(0).integers(6, 60, (2, 12))
    batch = Batch(tokens, tiny_batch(rows=2, images=0, answer=7).layout)
    exact, near = (np.asarray(m.llm.logits(m(batch).hidden)) for m in (stored, small))
    error = np.abs(near - exact).max()
    print(f"largest logit error {error:.4f} at a spread of {exact.std():.3f}")
    assert 0 < error <= 0.1 * exact.std()
    # The same as computing with the rounded weights: the factors are in the right place.
    for part, names in {"attn": "q k v o", "mlp": "gate up down"}.items():
        for name in names.split():
            ours = getattr(getattr(small.llm.blocks, part), name)
            theirs = getattr(getattr(stored.llm.blocks, part), name)
            theirs.kernel[...] = ours.kernel[...] * ours.scale[...][:, None]
    np.testing.assert_allclose(near, np.asarray(stored.llm.logits(stored(batch).hidden)), atol=1e-4)


def test_what_int8_refuses(folder):
    model = load_pretrained(folder, "lora:rank=2", quantize="int8")
    with pytest.raises(UserError, match="lora cannot be merged into int8 weights"):
        merged(model)
    with pytest.raises(UserError, match=r"llm\.blocks\.attn\.k\.kernel is int8 and cannot train"):
        split_model(model, ("llm.blocks.attn",))
    with pytest.raises(UserError, match="quantize 'int4'"):
        load_pretrained(folder, quantize="int4")


def test_int8_models_train_and_count_like_the_others():
    model = tiny_model("mores:rank=2", int8=True)
    _, trainable, frozen = split_model(model, ("connector",))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trainable))
    assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(frozen))
    assert count_parameters(model.config) == count_parameters(tiny_model().config)


def test_random_int8_models_start_from_the_same_numbers():
    whole, small = tiny_model(), tiny_model(int8=True)
    kernel = whole.llm.blocks.attn.q.kernel[...]
    near = small.llm.blocks.attn.q.dense()
    assert np.abs(np.asarray(near - kernel)).max() <= 0.02 * np.abs(np.asarray(kernel)).max()


# Positions


@pytest.mark.parametrize("size", [12, 20, 28])
def test_dinov2_at_another_image_size(size, tmp_path):
    """`transformers` interpolates at every call what we interpolate once."""
    model = randomised(dinov2(image_size=20))
    encoder = loaded(saved(model, tmp_path), image_size=size)
    theirs = hidden_states(model, images(size=size))[-2][:, 1:]
    ours = np.asarray(encoder(jnp.asarray(images(size=size))))
    assert np.abs(ours - theirs).max() <= 1e-4


def test_positions_keep_their_dtype_and_first_rows():
    table = np.random.default_rng(0).standard_normal((26, 3)).astype(np.float16)
    resized = resize_pos_embed(table, 4, 1)
    assert (resized.shape, resized.dtype) == ((17, 3), np.float16)
    np.testing.assert_array_equal(resized[0], table[0])
    np.testing.assert_array_equal(resize_pos_embed(table, 5, 1), table)


def test_other_encoders_have_one_image_size(tmp_path):
    with pytest.raises(UserError, match=r"position_embedding\.weight is \(10, 16\)"):
        loaded(saved(clip(), tmp_path), image_size=20)


def test_int8_initialises_without_a_checkpoint():
    config = MLLMConfig(llm=tiny_model(int8=True).config.llm)
    model = initialize(MLLM(config))
    assert model.llm.blocks.mlp.down.scale[...].shape == (3, 16)
