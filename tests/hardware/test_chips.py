"""Names of slices, and the chips they consist of."""

import pytest

from moresjax.core.errors import UserError
from moresjax.hardware.chips import CHIPS, GIB, chip_of, find_slice


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [
        ("v5e-8", "v5e:2x4", 8),
        ("v5e-64", "v5e:8x8", 64),
        ("v6e-8", "v6e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),  # Google counts its cores
        ("v4-16", "v4:2x2x2", 8),
        ("v5e:4x4", "v5e:4x4", 16),
    ],
)
def test_slices_have_googles_names_or_their_shape(name, shape, chips):
    found = find_slice(name)
    assert (found.name, found.size) == (shape, chips)


@pytest.mark.parametrize("name", ["v5e-8", "v6e-8", "v5p-8", "v4-8"])
def test_the_compiler_knows_every_chip_by_its_name(name):
    devices = find_slice(name).devices()
    assert len(devices) == find_slice(name).size
    generation = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5", "v4": "TPU v4"}
    assert {device.device_kind for device in devices} == {generation[name.split("-")[0]]}
    assert chip_of(devices[0].device_kind) is find_slice(name).chip


def test_a_chip_needs_more_operations_per_byte_than_its_forerunner():
    """Operations per byte of HBM at which a product of matrices stops waiting for memory."""
    intensity = {name: round(chip.flops / chip.hbm_bandwidth) for name, chip in CHIPS.items()}
    assert intensity == {"v4": 224, "v5e": 241, "v5p": 166, "v6e": 560}
    assert {name: chip.hbm_bytes / GIB for name, chip in CHIPS.items()} == {
        "v4": 32,
        "v5e": 16,
        "v5p": 95,
        "v6e": 32,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", "unknown TPU 'v9'"),
        ("v5e-7", "unknown slice 'v5e-7'"),
        ("v5p:2x2", "looks like v5p:2x2x1"),
        ("v5e:2xa", "looks like v5e:2x4"),
    ],
)
def test_unknown_slices_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_slice(name)


def test_a_shape_that_cannot_be_built_is_refused_by_the_compiler():
    with pytest.raises(UserError, match="cannot compile for v5e:3x5"):
        find_slice("v5e:3x5").devices()
