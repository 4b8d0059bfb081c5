"""Hidden states from the feature files of xl-vlms.

Source: mshukor/xl-vlms, `features/*.pth`: lists over samples of `hidden_states` (by module
[B, T, D], B being 1), `image` (paths), `model_predictions` and `token_of_interest_mask`. Its
decompositions read the mean over the T tokens that were stored, and so does this.

Axis legend: B samples, T stored tokens, D hidden size.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.analysis.states import Key, StatesWriter
from moresjax.core.errors import UserError
from moresjax.core.folders import new_folder

STATES, MASK = "hidden_states", "token_of_interest_mask"
BLOCK = re.compile(r"(?:.*\.)?(?:layers|blocks|h)\.(\d+)")
NORM = re.compile(r"(?:.*\.)?(?:norm|ln_f|final_layernorm|final_layer_norm)")
TAKE = "mean over the tokens that xl-vlms stored"


def save_features(
    content: Mapping[str, Any], file: Path, out: str | Path, site: str, layer: int | None
) -> dict[str, Any]:
    """Writes a store of states, with a row for each sample.

    A sample is named by its image's name, with `#2` and so on for further ones about one image. It
    is not found where the mask says so, or where its state is not finite, as the mean of no token.

    Args:
      content: The file's content.
      file: The file, for messages.
      out: A new or empty folder.
      site: The site of its module; empty: by the module's name.
      layer: Its layer.

    Returns:
      `sites`, `layers`, `n`, and how many were found.

    Raises:
      UserError: Modules are not known, or lists and tensors do not fit each other.
    """
    items = content[STATES]
    if not isinstance(items, Sequence) or not items or not isinstance(items[0], Mapping):
        raise UserError(f"{file}: {STATES} must be a list with tensors by module for each sample")
    keys = _keys([*items[0]], file, site, layer)
    rows = list(_rows(content, items, keys, file))
    size = {state.shape for _, states in rows for state in states.values()}
    if len(size) > 1:
        raise UserError(f"{file}: states have {' and '.join(str(s[0]) for s in size)} features")
    (width,) = size.pop()
    tensor = next(iter(items[0].values()))
    kind = str(tensor.dtype).removeprefix("torch.")
    dtype = kind if kind in ("float16", "bfloat16") else "float32"
    meta = {"origin": "xl-vlms", "file": file.name, "take": TAKE, "modules": [*keys]}
    own = list(keys.values())
    with (
        new_folder(out, "states") as new,
        StatesWriter(new, own, width, meta, dtype=dtype) as writer,
    ):
        for row, states in rows:
            writer.add(row, states)
    found = sum(row["found"] for row, _ in rows)
    return {"sites": [s for s, _ in own], "layers": [n for _, n in own]} | {
        "n": len(rows),
        "found": found,
    }


def _keys(modules: list[str], file: Path, site: str, layer: int | None) -> dict[str, Key]:
    """Site and layer of every module."""
    if site:
        if len(modules) > 1:
            raise UserError(
                f"{file} has states of {', '.join(modules)}; --site is for files of one module"
            )
        return {modules[0]: (site, layer or 0)}
    keys: dict[str, Key] = {}
    for module in modules:
        if block := BLOCK.fullmatch(module):
            keys[module] = "llm.block.out", int(block[1])
        elif NORM.fullmatch(module):
            keys[module] = "llm.norm.out", 0
        else:
            raise UserError(f"{file} has states of {module}; say which --site (and --layer) it is")
    if len({*keys.values()}) < len(keys):
        raise UserError(f"{file} has two modules of one site and layer: {', '.join(keys)}")
    return keys


SampleStates = tuple[dict[str, Any], dict[Key, np.ndarray]]


def _rows(
    content: Mapping[str, Any], items: Sequence[Any], keys: Mapping[str, Key], file: Path
) -> Iterator[SampleStates]:
    """The facts and states of every sample."""
    lists = {
        name: _flat(content[name])
        for name in ("image", "model_predictions", MASK)
        if len(content.get(name, ()))
    }
    count, seen = 0, Counter()
    for item in items:
        if {*item} != {*keys}:
            raise UserError(f"{file}: samples have states of different modules")
        arrays = {keys[module]: _array(tensor, module, file) for module, tensor in item.items()}
        samples = {len(array) for array in arrays.values()}
        if len(samples) > 1:
            raise UserError(f"{file}: modules have different numbers of samples")
        for place in range(samples.pop()):
            if any(count >= len(own) for own in lists.values()):
                raise UserError(f"{file} has more states than {', '.join(lists)}")
            own = {name: values[count] for name, values in lists.items()}
            tokens = next(iter(arrays.values())).shape[1]
            with np.errstate(invalid="ignore", divide="ignore"):
                sums = {key: array[place].sum(0) / array.shape[1] for key, array in arrays.items()}
            good = all(np.isfinite(state).all() for state in sums.values())
            image = str(own.get("image", ""))
            name = Path(image).stem or str(count)
            seen[name] += 1
            row = {
                "id": name if seen[name] == 1 else f"{name}#{seen[name]}",
                "images": [image] if image else [],
                "prediction": own.get("model_predictions"),
                "found": good and bool(own.get(MASK, True)),
                "count": tokens,
            }
            yield row, {key: x if good else np.zeros_like(x) for key, x in sums.items()}
            count += 1
    if longer := [name for name, own in lists.items() if len(own) > count]:
        raise UserError(f"{file} has fewer states than {longer[0]}")


def _array(tensor: Any, module: str, file: Path) -> np.ndarray:
    """A tensor [B, T, D] in fp32."""
    if np.ndim(tensor) != 3:
        raise UserError(f"{file}: states of {module} must have three axes, got {np.ndim(tensor)}")
    return np.asarray(tensor.float(), np.float32)


def _flat(values: Any) -> list[Any]:
    """A list over samples, whether they are stored one by one or in lists or tensors of batches."""
    flat = []
    for value in values:
        if hasattr(value, "tolist"):
            value = value.tolist()
        flat.extend(value if isinstance(value, list | tuple) else [value])
    return flat
