"""Our adapter folder: what is saved comes back, on the base it was made for only."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moresjax.core.errors import UserError
from moresjax.models.count import count_parameters
from moresjax.models.zoo import mllm_config
from moresjax.testing.models import tiny_model
from moresjax.weights.adapter import load_adapter, save_adapter


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


@pytest.fixture(scope="module")
def tuned():
    """A model whose tuning, norms and connector are not those that a fresh one has."""
    model = tiny_model("vera:rank=2,targets=q,layers=0;2/ln")
    for variable in (
        model.tuning.params["vera"]["llm.block.q"]["lambda_b"],
        model.llm.blocks.attn_norm.scale,
        model.connector.layers[1].bias,
    ):
        variable[...] = variable[...] + jnp.arange(variable[...].size).reshape(variable.shape)
    model.tuning.shared["vera"]["a"][...] = jnp.full((16, 2), 0.5)  # as from another program
    return model


@pytest.fixture
def saved(tuned, tmp_path):
    return save_adapter(tuned, tmp_path / "adapter", also_train=("connector",))


def test_an_adapter_comes_back_as_it_was_saved(tuned, saved):
    loaded = tiny_model()
    load_adapter(loaded, saved)
    assert loaded.tuning.spec == tuned.tuning.spec
    found, expected = parameters(loaded), parameters(tuned)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        rows = [0, 2] if "tuning." in name else ...  # a switched-off layer's values are not kept
        np.testing.assert_array_equal(found[name][rows], x[rows], err_msg=name)
    np.testing.assert_array_equal(loaded.tuning.common("vera")["a"], np.full((16, 2), 0.5))


def test_the_folder_says_what_it_is_and_holds_the_layers_that_act(saved):
    description = json.loads((saved / "tuning.json").read_text())
    assert description["spec"] == "vera:layers=0;2,rank=2,targets=q/ln"
    assert description["sites"] == {"vera": ["llm.block.q"]}
    assert len(description["base"]["checksums"]) > 3
    arrays = load_file(saved / "tuning.safetensors")
    assert arrays["tuning.params.vera.llm.block.q.lambda_b"].shape == (2, 16)
    own = {name: x for name, x in arrays.items() if "shared" not in name}
    assert description["parameters"] == sum(x.size for x in own.values())
    assert [name for name in arrays if name not in own] == ["tuning.shared.vera.a"]


def test_another_base_is_refused_and_the_model_stays_as_it_was(saved):
    model = tiny_model(seed=1)
    with pytest.raises(UserError, match=r"belongs to another base: its \S+ has other values"):
        load_adapter(model, saved)
    with pytest.raises(
        UserError, match=r"another base: its llm\.intermediate_size is 24, here .* 32"
    ):
        load_adapter(tiny_model(intermediate_size=32), saved)
    assert model.tuning.spec == "none"
    load_adapter(tiny_model(remat=True, unroll=True), saved)  # how it runs is no other base


def test_a_damaged_folder_is_named(saved):
    file = saved / "tuning.safetensors"
    arrays, name = load_file(file), "llm.norm.scale"
    save_file({n: x for n, x in arrays.items() if n != name}, file)
    with pytest.raises(UserError, match=r"lacks or should not hold: llm\.norm\.scale"):
        load_adapter(tiny_model(), saved)
    save_file(arrays | {name: arrays[name][:3]}, file)
    with pytest.raises(
        UserError, match=r"llm\.norm\.scale has shape \(3,\), the model needs \(16,\)"
    ):
        load_adapter(tiny_model(), saved)
    with pytest.raises(UserError, match=r"has no tuning\.json"):
        load_adapter(tiny_model(), saved.parent)
    with pytest.raises(UserError, match="'none' has no parameters to save"):
        save_adapter(tiny_model(), saved.parent / "nothing")


def test_mores_of_vicuna_7b_takes_at_most_eleven_hundred_kilobytes():
    report = count_parameters(mllm_config("vicuna-7b"), "mores:rank=1", ())
    header = 3 * 200  # three tensors with their names, types, shapes and places
    assert report.checkpoint_bytes + header <= 1_100_000


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_an_adapter_that_diverged_is_refused(saved, number):
    arrays = load_file(saved / "tuning.safetensors")
    name = min(arrays)
    arrays[name].flat[0] = number
    save_file(arrays, saved / "tuning.safetensors")
    model = tiny_model()
    with pytest.raises(UserError, match=rf"{name} has numbers that are not finite"):
        load_adapter(model, saved)
    assert model.tuning.spec == "none"
