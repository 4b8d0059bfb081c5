"""Plans for TPU slices: what is compiled is the train step, sharded as the mesh rules say."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import pytest
from cuts import CUT_VISION, NARROW_LLM
from cuts import cut as cut_of

from moresjax.core.errors import UserError
from moresjax.core.layout import RowStructure
from moresjax.hardware.chips import GIB, find_slice
from moresjax.models.count import count_parameters
from moresjax.plans.program import Plan, _needed, describe
from moresjax.plans.train_plan import abstract_step, plan
from moresjax.plans.train_plan import search as search_plans
from moresjax.runs.architecture import model_config
from moresjax.runs.config import load_config
from moresjax.sharding.mesh import make_mesh, mesh_preset
from moresjax.training.objectives import OBJECTIVES, next_token

RUNS = Path(__file__).parents[2] / "configs" / "llava_steering.py"
KERNEL = NARROW_LLM["hidden_size"] * NARROW_LLM["intermediate_size"] * 2  # bytes of the largest
cut = functools.partial(cut_of, llm=NARROW_LLM)


def reduced(found: Plan) -> float:
    """Bytes that a chip moves to add up numbers of different chips."""
    kinds = ("all-reduce", "reduce-scatter")
    return sum(found.collectives.get(kind, {"bytes": 0})["bytes"] for kind in kinds)


@pytest.fixture(scope="module")
def steered() -> Plan:
    return plan(cut("mores:rank=1"), "v5e-8")


@pytest.mark.parametrize("tuning", ["mores-base", "lora", "full"])
@pytest.mark.parametrize("size", ["3b", "7b", "13b"])
def test_the_steps_of_the_papers_models_lower_for_tpus(size, tuning):
    sizes = ["max_seq_len=1024", "images_per_row=1", "batch_size=64"]
    config = load_config(f"{RUNS}:size={size},tuning={tuning}", sizes)
    mesh = make_mesh(**mesh_preset("fsdp", 8), devices=find_slice("v5e-8").devices())
    state, frozen, batch, step = abstract_step(config, mesh)
    text = step.lower(state, frozen, batch).as_text()
    assert "stablehlo.while" in text  # layers are scanned: compile time is flat in depth
    count = count_parameters(model_config(config), config.tuning, config.also_train)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(state.trainable)) == count.trainable


def test_a_frozen_models_step_adds_up_gradients_of_what_trains_only(steered):
    """No gradient of a frozen kernel exists, so nothing of its size is summed over chips."""
    connector = (
        4 * (CUT_VISION["hidden_size"] + NARROW_LLM["hidden_size"] + 2) * NARROW_LLM["hidden_size"]
    )
    assert 0 < reduced(steered) < 2.5 * connector
    assert steered.fits


def test_rows_stay_where_they_are_and_weights_come_to_them(steered):
    """Per layer forward, again for remat, and backward: what other chips hold of each kernel."""
    kernels = 2 * (4 * NARROW_LLM["hidden_size"] ** 2 + 3 * KERNEL // 2) * NARROW_LLM["num_layers"]
    moved = sum(each["bytes"] for each in steered.collectives.values()) - reduced(steered)
    assert 7 / 8 * 2 * kernels < moved < 7 / 8 * 4 * kernels


def test_a_quick_plan_is_about_the_same(steered):
    quick = plan(cut("mores:rank=1"), "v5e-8", quick=True)
    assert quick.setting == steered.setting | {"quick": True}
    assert quick.memory.arguments == steered.memory.arguments
    assert quick.seconds == pytest.approx(steered.seconds, rel=0.02)


def test_a_plan_is_json_and_text(steered):
    data = json.loads(json.dumps(steered.to_dict()))
    assert (data["fits"], data["chips"]) == (True, 8)
    assert data["bound"] == max(data["seconds"], key=data["seconds"].get)
    text = describe(steered)
    assert "v5e:2x4 (8 chips; mesh data 1, fsdp 8, tensor 1)" in text
    assert f"{steered.needed_bytes / GIB:.2f} of 16 GiB: fits" in text


def test_what_a_chip_holds_is_its_share_of_the_parameters(steered):
    """Frozen kernels and tables in bf16, split eight ways; the rest is small."""
    per_layer = 4 * NARROW_LLM["hidden_size"] ** 2 + 3 * KERNEL // 2
    tables = 2 * NARROW_LLM["vocab_size"] * NARROW_LLM["hidden_size"]
    share = 2 * (2 * per_layer + tables) / 8
    batch = 2 * 4 * (6 * 128 + 56 * 56 * 3)
    assert share + batch < steered.memory.arguments < 2.5 * (share + batch)


@pytest.mark.parametrize(
    ("turns", "structure"), [("dialogue", RowStructure.SINGLE), ("independent", RowStructure.ANY)]
)
def test_rows_with_independent_questions_are_planned_as_such(turns, structure):
    config = cut("none")  # a source of files that need not be there
    config = dataclasses.replace(config, data={"name": "llava", "files": "a.json", "turns": turns})
    mesh = make_mesh(devices=jax.devices()[:1])
    assert abstract_step(config, mesh)[2].structure == structure


def test_objectives_without_a_language_model_have_no_plan():
    config = cut("none", objective="patch_classes")
    with pytest.raises(UserError, match="language models, not for objective patch_classes"):
        plan(config, "v5e-8")


def test_an_objective_of_a_plug_in_has_a_plan(monkeypatch):
    traced = []

    def objective(model, batch, key=None):
        traced.append(batch.tokens.shape)
        return next_token(model, batch, key)

    monkeypatch.setitem(OBJECTIVES, "mine", objective)
    mesh = make_mesh(data=1, fsdp=8)
    state, frozen, batch, step = abstract_step(cut("none", objective="mine"), mesh)
    assert step.lower(state, frozen, batch).as_text()
    assert set(traced) == {(16, 128)}


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="batch_size 12 does not divide into 8 parts"):
        plan(cut("none", batch_size=12), "v5e-8")
    with pytest.raises(UserError, match=r"none of the batch sizes \[12\]"):
        search_plans(cut("none"), "v5e-8", batches=[12], presets=["fsdp"])


def test_a_search_tries_what_divides_and_puts_the_fastest_first():
    first, second = search_plans(
        cut("none"), "v5e-8", batches=[12, 8], presets=["fsdp"], quick=True
    )
    assert [each.setting["batch_size"] for each in (first, second)] == [8, 8]
    assert (first.setting["remat"], second.setting["remat"]) == (False, True)
    assert first.tokens_per_second > second.tokens_per_second


def test_what_a_step_that_does_not_fit_would_need_is_in_both_complaints():
    whole = RuntimeError("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.")
    assert _needed(whole, arguments=GIB) == 20 * GIB
    part = "the total memory required for HLO temporaries (17.50G) exceeds available HBM (15.75G)."
    assert _needed(RuntimeError(part), arguments=GIB) == 18.5 * GIB
    with pytest.raises(RuntimeError, match="another"):
        _needed(RuntimeError("another"), arguments=GIB)
