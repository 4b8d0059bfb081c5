"""Steering vectors as a control vector that llama.cpp reads (`--control-vector FILE`).

Axis legend: L layers, D features.

The file is GGUF, version 3: a header, three keys and one fp32 tensor `direction.N` for each steered
block N, which llama.cpp adds to the output of that block at every token. It counts blocks from 0 as
`steer:layers=` does, and knows no direction of block 0. Sources: the specification of GGUF in
ggml-org/ggml, and `llama_adapter_cvec` of llama.cpp.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moresjax.core.errors import UserError
from moresjax.core.folders import replace_file
from moresjax.core.types import Numbers

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _STRING, _FLOAT32 = 4, 8, 0  # the types of two values and of a tensor


def save_control_vector(
    path: str | Path, directions: Mapping[int, Numbers], *, model_hint: str = "llama"
) -> Path:
    """Writes directions of blocks as a control vector of llama.cpp.

    >>> import tempfile
    >>> file = save_control_vector(Path(tempfile.mkdtemp(), "calm.gguf"), {1: [0.5, -0.5]})
    >>> file.read_bytes()[:4]
    b'GGUF'

    Args:
      path: The file.
      directions: By block, counted from 0, what is added to its output `[D]`: `alpha v` of
        `steer:site=llm.block.out`.
      model_hint: The architecture as llama.cpp names it, which it does not check.

    Returns:
      The file.

    Raises:
      UserError: There are no directions, one is of block 0, or they are not finite numbers of one
        length.
    """
    arrays = {layer: np.asarray(x, np.float32) for layer, x in sorted(directions.items())}
    if not arrays:
        raise UserError("a control vector needs a direction")
    if min(arrays) < 1:
        raise UserError(
            f"llama.cpp has no direction of block {min(arrays)}: it steers the outputs of the "
            "blocks from 1 on; take another layer"
        )
    shape = next(iter(arrays.values())).shape
    if any(x.shape != shape or x.ndim != 1 or not np.isfinite(x).all() for x in arrays.values()):
        raise UserError("the directions of a control vector must be finite numbers of one length")
    keys = [
        _text("general.architecture") + _number(_STRING) + _text("controlvector"),
        _text("controlvector.model_hint") + _number(_STRING) + _text(model_hint),
        _text("controlvector.layer_count") + _number(_UINT32) + _number(len(arrays)),
    ]
    size = len(_padded(np.zeros(shape, np.float32).tobytes()))
    infos = [
        _text(f"direction.{layer}") + struct.pack("<IQIQ", 1, shape[0], _FLOAT32, place * size)
        for place, layer in enumerate(arrays)
    ]
    header = b"GGUF" + struct.pack("<IQQ", _VERSION, len(arrays), len(keys))
    data = [_padded(x.astype("<f4").tobytes()) for x in arrays.values()]
    replace_file(Path(path), _padded(b"".join([header, *keys, *infos])) + b"".join(data))
    return Path(path)


def _number(value: int) -> bytes:
    return struct.pack("<I", value)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)
