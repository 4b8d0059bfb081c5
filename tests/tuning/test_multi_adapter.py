"""Several adapters in one batch: every row as if its adapter were alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.generation.engine import Engine
from moresjax.inference.model import Model
from moresjax.models.connector import Connector
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.testing.batches import tiny_batch
from moresjax.testing.models import tiny_config
from moresjax.tuning.attach import Tuning
from moresjax.tuning.merge import merged
from moresjax.tuning.multi_adapter import adapter_ids, stack_adapters
from moresjax.weights.adapter import attach_adapter, load_adapter, load_adapters, save_adapter
from moresjax.weights.peft import export_peft
from moresjax.weights.pyreft import export_pyreft

# Every way a method acts: on visual tokens, on all, outside the blocks, in the vision encoder, on
# linears (several on one, with prepared parameters, with frozen ones), and as a given vector.
SPEC = (
    "mores:layers={0}/noreft:rank=1,site=connector.out,positions=image:f2/red:layers={0}/steer/"
    "red:site=vision.block.out/oft:block_size=4,targets=k,layers={0}/vera:rank=2,targets=v/"
    "dora:rank=2,targets=o/lora:rank=2,targets=k;up,layers={0}/lora:rank=2,targets=vision.q"
)
WHILE_DECODING = "mores:layers={0}/red/lora:rank=2,targets=q,layers={0}"


def random_tuning(spec: str, seed: int) -> Tuning:
    tuning, rng = Tuning(spec, tiny_config()), np.random.default_rng(seed)
    for variable in jax.tree.leaves(tuning.params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable.set_value(jnp.asarray(0.2 * rng.standard_normal(variable.shape), jnp.float32))
    return tuning


def with_tuning(tuning: Tuning | None) -> MLLM:
    model = initialize(MLLM(tiny_config()))
    if tuning is not None:
        model.tuning = tuning
    return model


def two_tunings(spec: str) -> dict[str, Tuning]:
    return {"a": random_tuning(spec.format("0;2"), 1), "b": random_tuning(spec.format("1-"), 2)}


@pytest.fixture(scope="module")
def batch():
    return tiny_batch(rows=4, images=2, answer=0)


def choosing(batch, *adapters):
    return dataclasses.replace(batch, adapter=np.asarray(adapters, np.int32))


def compiled(traced=None):
    def forward(graphdef, state, batch):
        if traced is not None:
            traced.append(1)
        model = nnx.merge(graphdef, state)
        return model.llm.logits(model(batch).hidden)

    return jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module")
def base_logits(batch):
    return np.asarray(compiled()(*nnx.split(with_tuning(None)), batch))


def test_every_row_is_as_with_its_adapter_alone_and_one_program_serves_all_choices(
    base_logits, batch
):
    tunings, traced = two_tunings(SPEC), []
    single, forward = compiled(), compiled(traced)
    alone = [np.asarray(single(*nnx.split(with_tuning(t)), batch)) for t in tunings.values()]
    alone.append(base_logits)  # of number -1
    together = with_tuning(stack_adapters(tunings))
    for choice in ([0, 1, -1, 0], [-1, -1, 1, 1], [1, 0, 0, -1]):
        got = np.asarray(forward(*nnx.split(together), choosing(batch, *choice)))
        for row, number in enumerate(choice):
            np.testing.assert_allclose(got[row], alone[number][row], atol=1e-5)
    assert len(traced) == 1
    for other in alone[1:]:
        assert np.abs(alone[0] - other).max(axis=(1, 2)).min() > 1e-2


def test_rows_of_the_base_model_are_untouched(base_logits, batch):
    model, forward = with_tuning(stack_adapters(two_tunings(WHILE_DECODING))), compiled()
    chosen = np.asarray(forward(*nnx.split(model), choosing(batch, -1, 0, 1, -1)))
    np.testing.assert_allclose(chosen[[0, 3]], base_logits[[0, 3]], atol=1e-6)
    assert np.abs(chosen[1:3] - base_logits[1:3]).max(axis=(1, 2)).min() > 1e-2
    # A batch that chooses nothing is the base model's.
    everywhere = np.asarray(forward(*nnx.split(model), choosing(batch, -1, -1, -1, -1)))
    np.testing.assert_array_equal(everywhere[[0, 3]], chosen[[0, 3]])
    unchosen = model.tuning.hooks(batch).tower("llm").at("out")
    assert all((np.asarray(item.rows) == 2).all() for _, item in unchosen)  # what does nothing


def test_generated_tokens_are_those_of_each_adapter_alone(batch):
    def generate(model, batch):
        return np.asarray(Engine(model, eos_ids=(99,)).generate(batch, 6).tokens)

    tunings = two_tunings(WHILE_DECODING)
    got = generate(with_tuning(stack_adapters(tunings)), choosing(batch, 1, 0, -1, 1))
    a, b, base = (generate(with_tuning(t), batch) for t in (*tunings.values(), None))
    np.testing.assert_array_equal(got, np.stack([b[0], a[1], base[2], b[3]]))
    assert (a[1] != base[1]).any()
    assert (b[0] != a[0]).any()


def test_visual_steering_leaves_the_decode_program_alone():
    """Also with connectors of their own, and edits of a question."""
    specs = {"a": "mores:rank=2", "b": "mrt:rank=2,visual_rank=1", "c": "mores"}
    tunings = {name: random_tuning(spec, 1) for name, spec in specs.items()}
    connector = nnx.to_flat_state(nnx.state(with_tuning(None).connector, nnx.Param))
    own = {".".join(map(str, path)): x.get_value() for path, x in connector}
    several = stack_adapters(tunings, {"a": own}, base_connector=own)
    steered, batch = with_tuning(several), tiny_batch(answer=0)
    program = [
        Engine(model, eos_ids=(2,)).lower_decode(batch, 4).as_text()
        for model in (steered, with_tuning(None))
    ]
    assert program[0] == program[1]


def test_folders_are_loaded_by_name_and_chosen_by_name(tmp_path, batch):
    tunings = {
        "cats": random_tuning("mores:rank=1,layers=0", 1),
        "dogs": random_tuning("mores:rank=1,layers=1-", 2),
    }
    folders = {n: save_adapter(with_tuning(t), tmp_path / n) for n, t in tunings.items()}
    model = Model(with_tuning(None), None)
    model.load_adapters(folders)
    ids = np.where(np.asarray(batch.layout.image) >= 0, 99, np.asarray(batch.tokens))[:3]
    pixels = np.asarray(batch.pixels)[:3].reshape(6, 12, 12, 3).transpose(0, 3, 1, 2)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_token_id": 99}
    got = model.logits(**inputs, adapters=["dogs", None, "cats"])
    for row, name in enumerate(("dogs", None, "cats")):
        single = with_tuning(None)
        if name:
            load_adapter(single, folders[name])
        expected = Model(single, None).logits(**inputs)
        np.testing.assert_allclose(got[row], expected[row], atol=1e-5)
    with pytest.raises(UserError, match=r"unknown adapter 'birds'; choose from: cats, dogs, base"):
        model.logits(**inputs, adapters=["birds", None, None])
    with pytest.raises(UserError, match="3 prompts but 1 adapters"):
        model.logits(**inputs, adapters=["cats"])


@pytest.mark.parametrize(
    ("spec", "export", "options"),
    [
        ("lora:rank=2,alpha=3,dropout=0.1", export_peft, {}),
        ("mores:rank=2", export_pyreft, {"edits": "mores", "allow_pickle": True}),
    ],
)
def test_folders_of_other_libraries_go_beside_our_own(tmp_path, spec, export, options):
    tunings = {name: random_tuning(spec, seed) for seed, name in enumerate(("ours", "theirs"))}
    save_adapter(with_tuning(tunings["ours"]), tmp_path / "ours")
    export(with_tuning(tunings["theirs"]), tmp_path / "theirs")
    model, single = Model(with_tuning(None), None), with_tuning(None)
    model.load_adapters({name: tmp_path / name for name in tunings}, **options)
    assert model.adapters == ("ours", "theirs")
    attach_adapter(single, tmp_path / "theirs", **options)
    inputs = {"input_ids": [[1, 5, 6, 7]] * 3}
    if spec.startswith("mores"):
        rng = np.random.default_rng(0)
        pixels = rng.standard_normal((3, 3, 12, 12)).astype(np.float32)
        ids = [[1, *[28] * 9, 5, 6]] * 3
        inputs = {"input_ids": ids, "pixel_values": pixels, "image_token_id": 28}
    got = np.asarray(model.logits(**inputs, adapters=["theirs", None, "ours"]))
    for row, own in ((0, single), (1, with_tuning(None)), (2, with_tuning(tunings["ours"]))):
        expected = np.asarray(Model(own, None).logits(**inputs))[row]
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 1e-2


def test_a_folder_that_fails_leaves_model_and_tuning_as_they_were(tmp_path):
    model = Model(with_tuning(random_tuning("lora:rank=2", 0)), None)
    save_adapter(model.mllm, tmp_path / "ours")
    export_peft(with_tuning(random_tuning("ia3", 1)), tmp_path / "theirs")
    norms = with_tuning(random_tuning("red", 1))
    norms.llm.norm.scale[...] = norms.llm.norm.scale[...] + 1
    save_adapter(norms, tmp_path / "norms", also_train=("llm.norm",))
    for folders, options, message in (
        (("ours", "theirs", "norms"), {}, r"'norms' has its own llm\.norm\.scale"),
        (("ours", "nowhere"), {}, "nowhere is not an adapter folder"),
        (("ours",), {"edits": "mores"}, "none of .*ours is a folder of pyreft"),
    ):
        with pytest.raises(UserError, match=message):
            model.load_adapters({name: tmp_path / name for name in folders}, **options)
        assert (model.tuning, model.adapters) == ("lora:rank=2", ())


def test_what_cannot_be_chosen_per_row_is_refused(tmp_path):
    def stacked(*specs):
        return stack_adapters({f"t{n}": random_tuning(s, n) for n, s in enumerate(specs)})

    with pytest.raises(UserError, match="mixlora chooses factors by all tokens of a row"):
        stacked("lora", "mixlora")
    with pytest.raises(UserError, match="vpt puts tokens into the vision encoder"):
        stacked("vpt")
    other = random_tuning("vera", 1)
    other.shared["vera"]["a"][...] += 1
    with pytest.raises(UserError, match="different frozen arrays 'a' of vera"):
        stack_adapters({"a": random_tuning("vera", 0), "b": other})
    with pytest.raises(UserError, match="names other than 'base'"):
        stack_adapters({"base": Tuning("red", tiny_config())})
    with pytest.raises(UserError, match="call `load_adapters` to choose"):
        adapter_ids(Tuning("red", tiny_config()), ["a"], 1)
    with pytest.raises(UserError, match="has a single tuning"):
        Tuning("red", tiny_config()).hooks(choosing(tiny_batch(), 0, 0))

    several = with_tuning(stacked("lora", "lora"))
    with pytest.raises(UserError, match="merging takes a single tuning, the model holds t0, t1"):
        merged(several)
    with pytest.raises(UserError, match="an adapter folder takes a single tuning"):
        save_adapter(several, tmp_path)


# Adapters that agree in nothing: methods, ranks, linears, layers, order, tokens before the text.
MIXTURE = {
    "steering": "mores:rank=1,positions=image:f2/reft:kind=loreft,rank=2",
    "wider": "mores:rank=3,layers=0;2,positions=image:f2/lora:rank=2,targets=q;v",
    "scaled": "ia3/lora:rank=4,alpha=3,rslora=true,targets=v;up,layers=1-/houlsby:bottleneck=3",
    "turned": "dora:rank=2,targets=o/lora:rank=2,targets=up/adapter:bottleneck=5",
    "prompted": "prompt:length=2/lora:rank=1,targets=v/mrt:rank=2,visual_rank=3,length=2",
    "tokens": "prompt:length=4/prefix:length=1/red/ptum:length=2",
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Folders of adapters, some of which have connectors of their own."""
    root, folders = tmp_path_factory.mktemp("mixture"), {}
    for number, (name, spec) in enumerate(MIXTURE.items()):
        model = with_tuning(random_tuning(spec, number))
        if own := number % 2 == 0:
            assert isinstance(model.connector, Connector)
            for layer in model.connector.layers:
                layer.kernel[...] = layer.kernel[...] + 0.1 * (number + 1)
        folders[name] = save_adapter(model, root / name, also_train=("connector",) * own)
    return folders


def test_rows_choose_from_adapters_of_any_method_rank_and_connector(mixture, batch, base_logits):
    together, forward = with_tuning(None), compiled()
    load_adapters(together, mixture)
    steer = random_tuning("steer:positions=all", 50)
    together.tuning = stack_adapters({"steer": steer}, beside=together.tuning)
    found: dict[str | None, np.ndarray] = {None: base_logits}
    for name in (names := [*MIXTURE, "steer"]):
        single = with_tuning(steer)
        if name != "steer":
            load_adapter(single, mixture[name])
        found[name] = np.asarray(forward(*nnx.split(single), batch))
    for start in range(0, len(names), 3):
        rows = [*names[start : start + 3], None][:4]
        rows += [None] * (4 - len(rows))
        chosen = dataclasses.replace(batch, adapter=adapter_ids(together.tuning, rows, 4))
        got = np.asarray(forward(*nnx.split(together), chosen))
        for row, name in enumerate(rows):
            np.testing.assert_allclose(got[row], found[name][row], atol=1e-5, err_msg=str(name))
