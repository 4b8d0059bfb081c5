"""Bytes that collectives move, against programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from moresjax.plans.collectives import Collective, collectives, totals

TURNS = 5
LOOP_WITHOUT_COUNT = """
body.1 (p: f32[4]) -> f32[4] {
  ROOT %sum = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

ENTRY main.1 (p: f32[4]) -> f32[4] {
  ROOT %loop = f32[4]{0} while(%p), condition=%c, body=%body.1
}
"""

# As compilers for TPUs write loops: without a note, two turns in one.
LOOP_BY_TWO = """
%cond.1 (p: (f32[4], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body.1 (p: (f32[4], s32[])) -> (f32[4], s32[]) {
  %two = s32[]{:T(128)} constant(2)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p), index=1
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %sum = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %next = s32[]{:T(128)} add(%i.1, %two)
  ROOT %out = (f32[4]{0}, s32[]{:T(128)}) tuple(%sum, %next)
}

ENTRY %main.1 (p: (f32[4], s32[])) -> (f32[4], s32[]) {
  ROOT %loop = (f32[4]{0}, s32[]) while(%p), condition=%cond.1, body=%body.1
}
"""

# As they write loops that also stop when something has happened, such as decoding.
LOOP_THAT_MAY_STOP = LOOP_BY_TWO.replace(
    "ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT",
    "%less = pred[]{:T(512)} compare(%i, %limit), direction=LT\n"
    "  ROOT %both = pred[]{:T(512)} and(%less, %go)",
)

# Kernels are written out in the middle of a computation.
BEHIND_A_KERNEL = """
ENTRY %main.1 (p: f32[4]) -> f32[4] {
  %kernel = f32[4]{0} custom-call(%p), custom_call_target="kernel", backend_config="module {
}
"
  ROOT %sum = f32[4]{0} all-reduce(%kernel), replica_groups={}, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def program() -> str:
    """Eight devices: a sum in a loop, then a gather over groups of four."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def run(x):
        def turn(x, _):
            return jax.lax.psum(x, ("a", "b")) * 0.5, None

        x, _ = jax.lax.scan(turn, x, length=TURNS)
        return jax.lax.all_gather(x, "b", tiled=True)

    spec = PartitionSpec(("a", "b"))
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("a"), check_vma=False
    )
    return jax.jit(mapped).lower(jnp.zeros(8 * 1024, jnp.float32)).compile().as_text()


def test_collectives_in_a_loop_count_once_per_turn(program):
    found = totals(collectives(program, 8))
    assert found["all-reduce"] == {"times": TURNS, "bytes": TURNS * 2 * 7 / 8 * 4096}


def test_a_gather_moves_what_the_other_chips_of_its_group_hold(program):
    assert totals(collectives(program, 8))["all-gather"] == {"times": 1, "bytes": 3 * 4096}


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (
            "bf16[2,64]{1,0:T(8,128)} collective-permute(%p), source_target_pairs={{0,1}}",
            Collective("collective-permute", "bf16[2,64]", 1, 256.0),
        ),
        (
            "(f32[8]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8]",
            Collective("all-gather", "f32[32]", 1, 96.0),
        ),
        (
            "f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
            Collective("reduce-scatter", "f32[8]", 1, 96.0),
        ),
        (
            "f32[8]{0} all-to-all(%p), replica_groups={}",
            Collective("all-to-all", "f32[8]", 1, 28.0),
        ),
    ],
)
def test_every_kind_has_the_traffic_of_its_ring(instruction, expected):
    hlo = f"ENTRY main.1 (p: f32[4]) -> f32[4] {{\n  %x = {instruction}\n}}\n"
    assert collectives(hlo, 8) == [expected]


def test_a_loop_that_does_not_say_how_often_it_runs_is_refused():
    with pytest.raises(ValueError, match="how often"):
        collectives(LOOP_WITHOUT_COUNT, 8)


def test_a_loop_that_may_stop_runs_as_often_as_one_says():
    assert [c.times for c in collectives(LOOP_THAT_MAY_STOP, 8, trip_count=1)] == [1]
    with pytest.raises(ValueError, match="how often"):
        collectives(LOOP_THAT_MAY_STOP, 8)
    assert [c.times for c in collectives(LOOP_BY_TWO, 8, trip_count=1)] == [3]


def test_a_loop_that_counts_by_two_runs_half_as_often():
    assert collectives(LOOP_BY_TWO, 8) == [Collective("all-reduce", "f32[4]", 3, 24.0)]


def test_pieces_of_one_channel_are_one_collective():
    piece = "bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]"
    hlo = f"ENTRY main.1 (p: f32[4]) -> f32[4] {{\n  %x = {piece}\n  %y = {piece}\n}}\n"
    assert [each.times for each in collectives(hlo, 8)] == [1]


def test_what_stands_behind_the_text_of_a_kernel_counts():
    assert totals(collectives(BEHIND_A_KERNEL, 4))["all-reduce"]["times"] == 1
