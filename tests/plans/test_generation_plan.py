"""Plans of generation: what is compiled are the engine's programs; their numbers by hand."""

import json

import pytest
from cuts import CUT_LLM, cut

from moresjax.core.errors import UserError
from moresjax.core.layout import RowStructure
from moresjax.hardware.chips import CHIPS, find_slice
from moresjax.plans.generation_plan import abstract_engine, plan_generation
from moresjax.plans.program import Plan, describe
from moresjax.plans.train_plan import abstract_batch
from moresjax.sharding.mesh import make_mesh, mesh_preset, use_mesh

ROWS, PROMPT, NEW = 16, 128, 32
WIDTH, LAYERS = CUT_LLM["hidden_size"], CUT_LLM["num_layers"]
# Matrices that a token is multiplied with while decoding; the head is as large as the embedding.
HEAD = CUT_LLM["vocab_size"] * WIDTH
MATRICES = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * CUT_LLM["intermediate_size"]) + HEAD
NORMS = (2 * LAYERS + 1) * WIDTH
# Keys and values of a chip's two rows, in bf16.
CACHE = 2 * LAYERS * (ROWS // 8) * (PROMPT + NEW) * WIDTH * 2


def generation(tuning: str, preset: str, **changes) -> list[Plan]:
    config = cut(tuning, preset, batch_size=ROWS, **changes)
    return plan_generation(config, "v5e-8", NEW, PROMPT)


@pytest.fixture(scope="module")
def split() -> list[Plan]:
    return generation("mores:rank=1", "fsdp")


@pytest.fixture(scope="module")
def whole() -> list[Plan]:
    return generation("none", "replicated", images_per_row=0)


def moved(found: Plan) -> int:
    return sum(each["bytes"] for each in found.collectives.values())


@pytest.mark.parametrize(("preset", "chips"), [("split", 8), ("whole", 1)])
def test_a_decode_step_is_given_a_chips_share_of_weights_and_cache(preset, chips, request):
    _, decode = request.getfixturevalue(preset)
    weights = 2 * (MATRICES + HEAD + NORMS) / chips
    assert decode.cache_bytes == CACHE
    assert decode.memory.arguments == pytest.approx(weights + CACHE, rel=0.01)
    # The cache is written where it is.
    assert decode.memory.aliased == pytest.approx(CACHE, rel=0.02)


def test_split_weights_come_together_once_a_step_and_whole_ones_stay(split, whole):
    assert moved(split[1]) == pytest.approx(7 / 8 * 2 * MATRICES, rel=0.02)
    assert moved(whole[1]) < 1000  # whether all rows have ended


def test_a_decode_step_reads_weights_and_cache_and_makes_a_token_per_row(whole):
    decode = whole[1]
    attention = 4 * LAYERS * (PROMPT + NEW) * WIDTH
    assert decode.flops.model == ROWS * (2 * MATRICES + attention)
    read = 2 * (MATRICES + NORMS) + CACHE
    assert decode.seconds["hbm"] == pytest.approx(read / CHIPS["v5e"].hbm_bandwidth)
    assert decode.bound == "hbm"
    assert decode.tokens_per_second == pytest.approx(ROWS / decode.seconds["hbm"])


def test_a_prefill_reads_the_prompts_and_leaves_the_cache(split):
    prefill = split[0]
    assert prefill.tokens == ROWS * PROMPT
    assert CACHE < prefill.memory.outputs < 1.02 * CACHE
    blocks = ROWS * PROMPT * (2 * (MATRICES - HEAD) + 4 * LAYERS * PROMPT * WIDTH)
    assert blocks + 2 * ROWS * HEAD < prefill.flops.model < 1.1 * blocks  # and a small encoder


def test_visual_steering_leaves_the_decode_program_as_it_is():
    def program(tuning):
        config = cut(tuning, batch_size=ROWS)
        mesh = make_mesh(**mesh_preset("fsdp", 8), devices=find_slice("v5e-8").devices())
        batch = abstract_batch(config, mesh, PROMPT, RowStructure.SINGLE)
        with use_mesh(mesh):
            return abstract_engine(config, mesh).lower_decode(batch, NEW).as_text()

    base = program("none")
    assert "fsdp" in base
    assert program("mores:rank=1") == base
    assert program("lora:rank=2") != base


def test_a_plan_of_generation_is_json_and_text(split):
    data = json.loads(json.dumps([each.to_dict() for each in split]))
    assert [each["program"] for each in data] == ["prefill", "decode step"]
    assert data[1]["setting"]["new_tokens"] == NEW
    text = describe(split[1])
    assert "decode step on v5e:2x4 (8 chips; mesh data 1, fsdp 8, tensor 1)" in text
    assert f"{moved(split[1]) / 2**30:.3f}"[:4] in text
    assert "bound by ici" in text


def test_what_does_not_fit_in_the_prefill_is_not_decoded():
    changes = {"max_seq_len": 2048, "images_per_row": 0, "attention": "xla"}
    config = cut("none", batch_size=1 << 14, **changes)
    (prefill,) = plan_generation(config, "v5e-8", NEW)
    assert (prefill.program, prefill.fits, prefill.setting["prompt"]) == ("prefill", False, 2016)
    # One row's keys and values are 8 MiB, a chip's 16 GiB.
    assert prefill.needed_bytes > 2**34


@pytest.mark.parametrize(
    ("new", "prompt", "changes", "message"),
    [
        (0, 8, {}, "a prompt of 8 tokens and 0 new ones: both must be at least 1"),
        (128, None, {}, "a prompt of 0 tokens and 128 new ones: both must be at least 1"),
        (64, 2048, {}, "2048 tokens and 64 new ones need 2112 positions, the model has 2048"),
        (
            8,
            100,
            {"images_per_row": 7},
            "7 images make 112 tokens, which do not fit a prompt of 100",
        ),
        (8, 100, {"batch_size": 12}, "batch_size 12 does not divide into 8 parts of the mesh"),
        (8, 8, {"objective": "patch_classes"}, "language models, not for objective patch_classes"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(new, prompt, changes, message):
    with pytest.raises(UserError, match=message):
        plan_generation(cut("none", **changes), "v5e-8", new, prompt)
