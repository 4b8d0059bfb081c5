"""The connector of LLaVA's first stage, `mm_projector.bin`, in.

LLaVA (haotian-liu/LLaVA) saves after connector pretraining what trained alone, under the names of
the whole model: `model.mm_projector.weight` and `.bias` of one linear (version 1), or
`model.mm_projector.0.weight`, `.2.weight` and so on where GELUs stand between several.
"""

import re
from pathlib import Path

import numpy as np

from moresjax.core.errors import UserError
from moresjax.weights.files import stored_in

_NAME = re.compile(r"(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_OURS = {"weight": "kernel", "bias": "bias"}


def read_projector(
    file: str | Path, *, allow_pickle: bool = False
) -> tuple[str, dict[str, np.ndarray]]:
    """The kind of connector that a file holds, and its parameters by their names in a model.

    Args:
      file: A file `*.bin` or `*.safetensors`.
      allow_pickle: Whether a `*.bin` may be read (by torch, weights only).

    Raises:
      UserError: It cannot be read, may not be, or holds something else than a connector.
    """
    file = Path(file)
    found: dict[int, dict[str, np.ndarray]] = {}
    numbered = False
    for name, tensor in stored_in(file, allow_pickle=allow_pickle)[0].items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{file} holds {name}, which is no part of a LLaVA connector")
        numbered |= match[1] is not None
        value = np.asarray(tensor[...], np.float32)
        own = found.setdefault(int(match[1] or 0), {})
        own[_OURS[match[2]]] = value.T if match[2] == "weight" else value
    if sorted(found) != [*range(0, 2 * len(found), 2)] or any(len(x) < 2 for x in found.values()):
        raise UserError(f"{file} holds no whole LLaVA connector: one linear, or some with GELUs")
    kind = f"mlp{len(found)}x_gelu" if numbered else "linear"
    names = {i: f"connector.layers.{i // 2}" for i in found}
    return kind, {f"{names[i]}.{leaf}": x for i, own in found.items() for leaf, x in own.items()}
