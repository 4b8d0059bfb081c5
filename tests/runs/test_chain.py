"""Runs that start from runs: every part as the earlier one had it, frozen or trained."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from run_helpers import TEXT_ONLY, TINY, config_of

from moresjax.core.errors import UserError
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.models.mllm import MLLM
from moresjax.runs.build import build_model
from moresjax.runs.checkpoint import Checkpoints, named
from moresjax.runs.config import save_config
from moresjax.runs.init_tuning import save_shared
from moresjax.runs.init_weights import trained_parameters
from moresjax.runs.paths import with_absolute_paths
from moresjax.runs.state import TrainState
from moresjax.runs.workdir import load_workdir
from moresjax.sharding.mesh import make_mesh
from moresjax.training.step import split_model
from moresjax.weights.adapter import save_adapter
from moresjax.weights.peft import export_peft
from moresjax.weights.pyreft import export_pyreft

SETTINGS = TINY | {"steps": 1, "log_every": 1, "optimizer.warmup": 0.0}
METHODS = {"mores": "mores:rank=1,positions=all", "full": "full"}


def parts_from(run: str, **others: str) -> dict[str, str]:
    sources = dict.fromkeys(("llm", "vision", "connector"), run) | others
    return {f"init.{part}": source for part, source in sources.items()}


def tuned(method: str, sources: dict, **settings):
    spec = METHODS.get(method, method)
    return config_of(f"stage=finetune,tuning={spec}", SETTINGS | sources | settings)


def write_run(config, workdir: Path) -> None:
    """The directory of a run that has changed everything that it trains; without its steps."""
    model = build_model(config, root=workdir)
    trainable = split_model(model, config.also_train)[1]
    rng = np.random.default_rng(0)
    changed = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), trainable
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(TrainState(jnp.asarray(1, jnp.int32), changed, ()), {})
    checkpoints.close()
    save_config(with_absolute_paths(config), workdir / "config.json")
    if isinstance(model, MLLM):
        save_shared(model.tuning, workdir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Stages llm, pretrain and finetune, each from the workdir before."""
    root = tmp_path_factory.mktemp("runs")
    write_run(config_of("stage=llm", TEXT_ONLY | {"seed": 3}), root / "llm")
    first = {"init.llm": "../llm", "init.vision": "random", "init.connector": "random"}
    write_run(config_of("stage=pretrain", TINY | first | {"seed": 4}), root / "pretrain")
    for method in METHODS:
        write_run(tuned(method, parts_from("../pretrain")), root / method)
    return root


def parameters(model) -> dict:
    return named(nnx.state(model, nnx.Param))


def assert_same(one: dict, other: dict, start: str = "") -> None:
    names = {name for name in one if name.startswith(start)}
    assert names
    assert names == {name for name in other if name.startswith(start)}
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_stage_starts_from_what_the_one_before_was(runs):
    for run, before in (("pretrain", "llm"), ("mores", "pretrain"), ("full", "pretrain")):
        started = parameters(
            build_model(tuned("none", parts_from(f"../{run}")), root=runs / "next")
        )
        assert_same(started, parameters(load_workdir(runs / run, tuning="none")[0]))
        own = trained_parameters(runs / run)
        assert own
        for name, x in (trained_parameters(runs / before) | own).items():
            if not name.startswith("tuning."):
                np.testing.assert_array_equal(started[name], x, err_msg=name)
    # The vision encoder was frozen all the way: it is what the seed of the second run made.
    tower = named(nnx.state(build_model(tuned("none", parts_from("random"), seed=4)), nnx.Param))
    assert_same(tower, started, "vision.")


@pytest.mark.parametrize("method", METHODS)
def test_a_task_goes_on_where_the_finetuning_ended(runs, method):
    sources = parts_from(f"../{method}", tuning=f"../{method}")
    config = tuned(method, sources)
    workdir = runs / f"task-{method}"
    start = parameters(build_model(config, root=workdir))
    assert_same(start, parameters(load_workdir(runs / method)[0]))
    write_run(config, workdir)
    end = parameters(load_workdir(workdir)[0])
    trained = trained_parameters(workdir)
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    assert moved
    assert moved <= set(trained)
    assert any(name.startswith("tuning." if method == "mores" else "llm.") for name in moved)
    assert load(workdir).generate("what is this ?", max_new_tokens=1) is not None


def test_a_tuning_that_is_left_out_is_told(runs, caplog):
    config = tuned("lora:rank=2", parts_from("../mores"))
    with caplog.at_level(logging.WARNING):
        build_model(config, root=runs / "next")
    [record] = caplog.records
    assert "../mores trained mores:rank=1,positions=all" in record.getMessage()
    assert "init.tuning=../mores goes on with it" in record.getMessage()
    caplog.clear()
    for sources in (parts_from("../full"), parts_from("../mores", tuning="../mores")):
        build_model(
            tuned("full" if "../full" in sources.values() else "mores", sources), root=runs / "next"
        )
    assert not caplog.records


# ---- Adapter folders.


def drawn(runs: Path, spec: str) -> MLLM:
    """The pretrained model with a tuning whose every value is drawn."""
    model, _ = load_workdir(runs / "pretrain", tuning=spec)
    rng = np.random.default_rng(0)
    for site in model.tuning.params[model.tuning.methods[0][0]].values():
        for variable in site.values():
            variable[...] = np.asarray(rng.standard_normal(variable.shape), np.float32)
    return model


@pytest.mark.parametrize(
    ("spec", "export", "options"),
    [
        ("mores:rank=2", save_adapter, {}),
        ("lora:rank=2,alpha=4,targets=q;v", export_peft, {}),
        ("mores:rank=2,positions=image", export_pyreft, {"allow_pickle": True}),
    ],
)
def test_a_tuning_goes_on_from_an_adapter_folder(runs, tmp_path, spec, export, options):
    model = drawn(runs, spec)
    folder = export(model, tmp_path / "adapter")
    config = tuned(f"{spec},dropout=0.2", parts_from("../pretrain", tuning=str(folder)))
    started = build_model(config, root=runs / "next", **options)
    assert isinstance(started, MLLM)
    assert dict(started.tuning.methods)[model.tuning.methods[0][0]].dropout == 0.2
    batch = {"input_ids": [[1, 5, 6, 7]]}
    ours, theirs = (np.asarray(Model(each, None).logits(**batch)) for each in (started, model))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    own = {n: x for n, x in parameters(model).items() if n.startswith("tuning.")}
    if export is not export_pyreft:  # which holds Q of the QR decomposition
        assert_same(own, parameters(started), "tuning.")
    if options:
        with pytest.raises(UserError, match="--allow-pickle"):
            build_model(config, root=runs / "next")


def test_frozen_arrays_that_came_with_an_adapter_stay_with_the_run(runs, tmp_path):
    model = drawn(runs, "vera:rank=2,targets=v")
    shared = model.tuning.shared["vera"]
    for array in shared.values():
        array[...] = array[...] + 1  # as another library's generator makes them
    folder = save_adapter(model, tmp_path / "adapter")
    config = tuned(model.tuning.spec, parts_from("../pretrain", tuning=str(folder)))
    write_run(config, runs / "vera")
    shutil.rmtree(folder)
    again = tuned(model.tuning.spec, parts_from("../vera", tuning="../vera"))
    for loaded in (load_workdir(runs / "vera")[0], build_model(again, root=runs / "next")):
        assert isinstance(loaded, MLLM)
        for leaf, array in shared.items():
            np.testing.assert_array_equal(loaded.tuning.shared["vera"][leaf][...], array[...])


# ---- What does not fit.


@pytest.mark.parametrize(
    ("method", "sources", "message"),
    [
        (
            "mores:rank=2",
            {"tuning": "../mores"},
            r"holds mores:positions=all, this run's .*rank=2",
        ),
        ("lora", {"tuning": "../nowhere"}, "nowhere is not an adapter folder"),
        ("none", {"vision": "../llm"}, "llm holds no weights for vision: its model has none"),
    ],
)
def test_sources_that_do_not_fit_are_told(runs, method, sources, message):
    method = f"{method},positions=all" if method.startswith("mores") else method
    with pytest.raises(UserError, match=message):
        build_model(tuned(method, parts_from("../mores", **sources)), root=runs / "next")


@pytest.mark.parametrize("settings", [{"tuning": "mores"}, {"init.tuning": "../mores"}])
def test_an_objective_without_an_llm_has_no_tuning(runs, settings):
    with pytest.raises(UserError, match="objective patch_classes has no tuning; leave it and init"):
        build_model(config_of("stage=vit", settings), root=runs / "next")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.llm.rope_theta": 7.0},
            "init.llm: .*mores has another LLM: its rope_theta is 100.0",
        ),
        ({"model.vision.num_heads": 1}, "mores has num_heads=2, the model's vision encoder has"),
        (
            {"model.connector": "linear"},
            "init.connector: .*mores has a mlp2x_gelu, the model a lin",
        ),
    ],
)
def test_parts_of_another_architecture_are_told(runs, settings, message):
    with pytest.raises(UserError, match=message):
        build_model(tuned("none", parts_from("../mores"), **settings), root=runs / "next")


def test_releases_of_an_llm_may_differ_in_the_term_of_its_norms(runs, caplog):
    settings = {"model.llm.norm_eps": 1e-3, "model.llm.max_positions": 64}
    build_model(
        tuned("mores", parts_from("../mores", tuning="../mores"), **settings), root=runs / "x"
    )
    assert "mores has another LLM: its norm_eps is 1e-06, the model's 0.001" in caplog.text


def test_vision_blocks_that_trained_alone_go_back_into_their_stack(runs):
    wide = {"model.vision.num_layers": 3}
    last = wide | {"also_train": "('vision:last1','connector')"}
    random = parts_from("random")
    write_run(tuned("none", random, **last), runs / "last")
    whole, parted = (
        parameters(build_model(tuned("none", parts_from("../last"), **more), root=runs / "next"))
        for more in (wide, wide | {"also_train": "('vision:last2',)"})
    )
    trained = trained_parameters(runs / "last")
    for name, x in trained.items():
        if name.startswith("vision.last."):
            everywhere = whole[name.replace("last", "blocks", 1)]
            np.testing.assert_array_equal(everywhere[-1:], x)
            np.testing.assert_array_equal(parted[name], everywhere[-2:])


def test_base_parts_of_a_run_are_read_onto_the_mesh(runs, monkeypatch):
    from moresjax.runs import init_weights

    seen = []
    read = init_weights._load_parts
    monkeypatch.setattr(
        init_weights, "_load_parts", lambda *args: (seen.append(args[-1].mesh), read(*args))[1]
    )
    mesh = make_mesh()
    load(runs / "mores", mesh=mesh)
    assert seen
    assert set(seen) == {mesh}
