"""Adapters of different kinds in one batch: generation, scores and statistics of each alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.analysis.attention import AttentionProbe
from moresjax.core.errors import UserError
from moresjax.generation.beam import Beams
from moresjax.generation.config import EngineConfig
from moresjax.generation.engine import Engine
from moresjax.inference.chat import Chat
from moresjax.inference.model import Model
from moresjax.models.connector import Connector
from moresjax.sharding.mesh import make_mesh
from moresjax.testing.models import talking_model
from moresjax.tuning.attach import Tuning
from moresjax.tuning.multi_adapter import stack_adapters
from moresjax.weights.adapter import load_adapter, save_adapter

NEW = 4
IMAGES = list(np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3)).astype(np.uint8))
ALWAYS = EngineConfig(min_saved_tokens=1, min_prompts_per_image=1)
SPECS = {
    "steering": "mores:rank=2,positions=image",
    "prompted": "prompt:length=3/lora:rank=2,targets=q;v",
    # Of the same kinds, and smaller.
    "layer": "mores:rank=1,layers=1,positions=image",
    "short": "prompt:length=1/lora:rank=1,alpha=3,targets=v",
}
OWN_CONNECTOR = ("steering", "layer")
NAMES = ["steering", None, "prompted", "steering", "prompted", "prompted", None, "steering"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapter folders, two of them with connectors of their own."""
    root, folders, model = tmp_path_factory.mktemp("adapters"), {}, talking_model()
    mllm = model.mllm
    assert isinstance(mllm.connector, Connector)
    kernels = [layer.kernel[...] for layer in mllm.connector.layers]
    for number, (name, spec) in enumerate(SPECS.items()):
        mllm.tuning, rng = Tuning(spec, model.config), np.random.default_rng(number)
        for variable in jax.tree.leaves(
            mllm.tuning.params, is_leaf=lambda x: isinstance(x, nnx.Variable)
        ):
            noise = rng.standard_normal(variable.shape).astype(np.float32)
            variable.set_value(jnp.asarray(noise))
        own = name in OWN_CONNECTOR
        for layer, kernel in zip(mllm.connector.layers, kernels, strict=True):
            layer.kernel[...] = kernel * (1 + 0.5 * own * (number + 1))
        folders[name] = save_adapter(mllm, root / name, also_train=("connector",) * own)
    return folders


@pytest.fixture(scope="module")
def together(folders) -> Model:
    model = talking_model()
    model.load_adapters({name: folders[name] for name in ("steering", "prompted")}, reserve=3)
    model.service.config = ALWAYS
    return model


@pytest.fixture(scope="module")
def alone(folders) -> dict[str | None, Model]:
    models: dict[str | None, Model] = {None: talking_model()}
    for name in ("steering", "prompted"):
        models[name] = talking_model()
        load_adapter(models[name].mllm, folders[name])
    for model in models.values():
        model.service.config = ALWAYS
    return models


def rows_of(model: Model) -> list:
    known = {}
    texts = ["is there a two ?", "three ?"]
    return [
        model.prompts.row(texts[n % 3 % 2], [IMAGES[n // 4]], known=known)
        for n in range(len(NAMES))
    ]


def own_rows(name: str | None) -> list[int]:
    return [n for n, other in enumerate(NAMES) if other == name]


def test_refilled_batches_share_prefixes_by_adapter_and_keep_tokens_and_statistics(
    together, alone, monkeypatch
):
    read, run = [], Engine.read_prefix
    monkeypatch.setattr(Engine, "read_prefix", lambda self, *a: read.append(a[0]) or run(self, *a))
    options = {"batch_size": 4, "probes": (AttentionProbe(),), "logprobs": True}
    limits = [NEW - n % 2 for n in range(len(NAMES))]
    rows = rows_of(together)
    done = together.service.generate_many(rows, limits, adapters=NAMES, **options)
    assert sum(len(batch.tokens) for batch in read) >= 6  # two images, three adapters
    said = set()
    for name, model in alone.items():
        own = own_rows(name)
        expected = model.service.generate_many(
            [rows_of(model)[n] for n in own], [limits[n] for n in own], **options
        )
        for n, other in zip(own, expected, strict=True):
            np.testing.assert_array_equal(done[n].tokens, other.tokens)
            np.testing.assert_allclose(done[n].logprobs, other.logprobs, atol=1e-4)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
                done[n].stats,
                other.stats,
            )
            said.add((name, tuple(other.tokens.tolist())))
    assert len({tokens for _, tokens in said}) >= 3


def test_beams_and_scores_are_those_of_each_adapter_alone(together, alone):
    names = ["steering", "prompted"]
    rows = rows_of(together)[:2]
    beams = Beams(num_beams=2)
    found = together.service.generate_rows(rows, NEW, adapters=names, beams=beams)
    pairs = [(row, np.asarray(ids)) for row in rows for ids in ([5, 6, 7], [8])]
    each = [name for name in names for _ in range(2)]
    scores = together.service.score_rows(pairs, batch_size=4, adapters=each)
    for n, name in enumerate(names):
        row = rows_of(alone[name])[n]
        other = alone[name].service.generate_rows([row], NEW, beams=beams)
        np.testing.assert_array_equal(found.tokens[n], other.tokens[0])
        own = alone[name].service.score_rows([(row, pair[1]) for pair in pairs[:2]])
        for one, expected in zip(scores[2 * n : 2 * n + 2], own, strict=True):
            assert one.logprob == pytest.approx(expected.logprob, rel=1e-5)


def test_a_chat_of_an_adapter_with_a_prompt_goes_on_with_its_cache(together, alone):
    chats = [
        Chat(together, max_new_tokens=3, adapter="prompted"),
        Chat(alone["prompted"], max_new_tokens=3),
    ]
    for chat in chats:
        for question, images in (("is there a two ?", [IMAGES[0]]), ("how ?", [])):
            list(chat.ask(question, images))
    assert chats[0].turns == chats[1].turns


def test_adapters_come_and_go_in_their_room_and_nothing_is_compiled(folders, together, caplog):
    def ask(*names: str | None) -> np.ndarray:
        rows = rows_of(together)[: len(names)]
        return np.asarray(together.service.generate_rows(rows, NEW, adapters=names).tokens)

    compiled, before = [], ask("steering", "prompted", None)

    def count(name: str, duration: float, **info: str) -> None:
        # A staged array is a copy of it to the device.
        if "backend_compile" in name and info.get("fun_name") != "jit(stage)":
            compiled.append(info)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        together.load_adapters({"layer": folders["layer"]})
        found = ask("steering", "layer", None)
        np.testing.assert_array_equal(found[[0, 2]], before[[0, 2]])
        together.unload_adapter("prompted")
        together.load_adapters({"short": folders["short"]})
        others = ask("short", "layer", "steering")
        np.testing.assert_array_equal(others[1], found[1])
        assert (others[0] != found[0]).any()
        with pytest.raises(UserError, match="unknown adapter 'prompted'; choose from: steering, l"):
            ask("prompted")
        together.unload_adapter("short")
        together.load_adapters({"prompted": folders["prompted"]})
        np.testing.assert_array_equal(ask("steering", "prompted", None), before)
        together.unload_adapter("layer")
        assert compiled == []
        assert not caplog.records
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    single = talking_model()
    load_adapter(single.mllm, folders["layer"])
    expected = single.service.generate_rows(rows_of(single)[1:2], NEW).tokens
    np.testing.assert_array_equal(found[1], expected[0])


def test_beyond_the_room_a_sentence_says_that_the_next_answer_compiles(folders, caplog):
    model = talking_model()
    model.load_adapters({}, reserve={"lora:rank=2,targets=q;v": 2, "connector": 1})
    engine = model.service.engine()
    folder = {name: folders[name] for name in ("layer", "short")}
    model.load_adapters({"layer": folder["layer"]})
    assert "do not fit the room" in caplog.records[0].getMessage()
    assert model.service.engine() is not engine
    with pytest.raises(UserError, match="reserve takes numbers of adapters, from 0 on, got -1"):
        model.load_adapters(folder, reserve=-1)
    assert model.adapters == ("layer",)
    assert "layer: mores:positions=image,layers=1" in repr(model)


def test_a_mesh_changes_no_token(together):
    rows, model = rows_of(together), talking_model()
    expected = together.service.generate_rows(rows, NEW, adapters=NAMES).tokens
    model.mllm.tuning = nnx.clone(together.mllm.tuning)
    model.shard(make_mesh(2, 2, 2))
    got = model.service.generate_rows(rows, NEW, adapters=NAMES).tokens
    np.testing.assert_array_equal(got, expected)


def test_images_are_shared_by_adapters_that_do_nothing_to_them_and_have_one_connector():
    model = talking_model()
    model.service.config = ALWAYS
    tuning = Tuning("loreft:rank=1,positions=last_prompt", model.config)
    tuning.initialize()
    rows = [model.prompts.row("two ?", IMAGES[:1], known={})] * 2
    base = connector_of(model)
    for own, prefixes in (({}, 1), ({"a": {n: 2 * x for n, x in base.items()}}, 2)):
        model.mllm.tuning = stack_adapters({"a": tuning, "b": tuning}, own, base_connector=base)
        assert len(model.service._shared_prefixes(rows, ["a", "b"]).rows) == prefixes


def connector_of(model: Model) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model.mllm.connector, nnx.Param))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in state}
