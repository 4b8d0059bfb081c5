"""Control vectors for llama.cpp, against bytes that the package `gguf` 0.19 wrote."""

import numpy as np
import pytest

from moresjax.core.errors import UserError
from moresjax.weights.control_vector import save_control_vector

# `GGUFWriter(path, "controlvector")` with the same keys and tensors.
WRITTEN_BY_GGUF = (
    b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x14\0\0\0\0\0\0\0general.architec"
    b"ture\x08\0\0\0\x0d\0\0\0\0\0\0\0controlvector\x18\0\0\0\0\0\0\0controlvector.model_h"
    b"int\x08\0\0\0\x05\0\0\0\0\0\0\0llama\x19\0\0\0\0\0\0\0controlvector.layer_count\x04"
    b"\0\0\0\x02\0\0\0\x0b\0\0\0\0\0\0\0direction.1\x01\0\0\0\x06\0\0\0\0\0\0\0\0\0\0\0\0"
    b"\0\0\0\0\0\0\0\x0b\0\0\0\0\0\0\0direction.2\x01\0\0\0\x06\0\0\0\0\0\0\0\0\0\0\0 \0\0"
    b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x80?\0\0\0@\0\0@@\0\0\x80@\0\0\xa0@\0\0\0\0\0\0\0\0\0\0"
    b"\0\x80\0\0\x80\xbf\0\0\0\xc0\0\0@\xc0\0\0\x80\xc0\0\0\xa0\xc0\0\0\0\0\0\0\0\0"
)
RAMP = np.arange(6, dtype=np.float32)


def test_the_file_is_that_of_the_reference_writer(tmp_path):
    file = save_control_vector(tmp_path / "v.gguf", {2: -RAMP, 1: RAMP})
    assert file.read_bytes() == WRITTEN_BY_GGUF
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "needs a direction"),
        ({0: RAMP}, "no direction of block 0"),
        ({1: RAMP, 2: RAMP[:3]}, "finite numbers of one length"),
        ({1: RAMP * np.nan}, "finite numbers of one length"),
        ({1: np.eye(2)}, "finite numbers of one length"),
    ],
)
def test_what_llama_cpp_could_not_read_is_refused(tmp_path, directions, message):
    with pytest.raises(UserError, match=message):
        save_control_vector(tmp_path / "v.gguf", directions)
    assert not [*tmp_path.iterdir()]
