"""Files of steering vectors: `vectors.npz`, which `steer:vector=FILE.npz:KEY` reads, and facts.

`vectors.json` beside it tells of every vector the site and layer that its states are of, how many
states it was made of, and what made them.

Axis legend: D hidden size.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax._version import __version__
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.core.folders import replace_file
from moresjax.core.json_files import read_object, write_json

ARRAYS, FACTS = "vectors.npz", "vectors.json"
# What `states.json` says of the model behind the states.
PROVENANCE = ("model", "weights", "twin", "precision", "tuning", "processor")


def save_vectors(
    folder: str | Path,
    vectors: Mapping[str, Float[np.ndarray, " D"]],
    facts: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Writes steering vectors with their facts.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> file = save_vectors(folder, {"no": np.ones(4)}, {"no": {"layer": 3}})
    >>> np.load(file)["no"].tolist(), read_vector_facts(folder)["no"]["layer"]
    ([1.0, 1.0, 1.0, 1.0], 3)

    Args:
      folder: The folder, which is made if need be.
      vectors: The vectors by name.
      facts: What is known of each, such as `site`, `layer` and `n`.

    Returns:
      The file of the vectors.

    Raises:
      UserError: There are no vectors.
    """
    if not vectors:
        raise UserError("there are no vectors to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(vector, np.float32) for name, vector in vectors.items()}
    content = {
        name: {**facts.get(name, {}), "hash": vector_hash(vector), "version": __version__}
        for name, vector in arrays.items()
    }
    buffer = io.BytesIO()
    save: Any = np.savez  # whose type has names of its own
    save(buffer, **arrays)
    write_json(folder / FACTS, content)
    replace_file(folder / ARRAYS, buffer.getvalue())
    return folder / ARRAYS


def read_vector_facts(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What `vectors.json` of a folder says of every vector.

    Raises:
      UserError: There is no such file, or it is damaged.
    """
    if not (Path(folder) / FACTS).is_file():
        raise UserError(f"{folder} holds no facts of steering vectors: it has no {FACTS}")
    return read_object(Path(folder) / FACTS)


def vector_hash(vector: Float[np.ndarray, " D"]) -> str:
    """Twelve hexadecimal digits that tell vectors apart."""
    return hashlib.sha256(np.asarray(vector, np.float32).tobytes()).hexdigest()[:12]


def data_hash(states: States) -> str:
    """Twelve hexadecimal digits that tell apart what states are of.

    Those of `states.json` where it has some, else of the index.

    >>> data_hash(States.from_arrays({("llm.norm.out", 0): np.ones((1, 2))}, [{}], {"data": "a"}))
    'a'
    """
    if "data" in states.meta:
        return str(states.meta["data"])
    asked = [[row.get("id"), row.get("prompt")] for row in states.index]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:12]


def check_same_source(one: States, other: States, site: str, layer: int) -> dict[str, Any]:
    """What two stores of states say of the model behind them, which must be the same.

    >>> store = States.from_arrays({("llm.norm.out", 0): np.ones((1, 2))}, [{}], {"model": "a"})
    >>> check_same_source(store, store, "llm.norm.out", 0)
    {'model': 'a'}

    Args:
      one: A store.
      other: Another one, or the same.
      site: The site that is to be in both.
      layer: The layer that is to be in both.

    Raises:
      UserError: A store has no such site or layer, or they are of different models.
    """
    sizes = [states.width(site, layer) for states in (one, other)]
    twins = one.meta.get("weights", one) == other.meta.get("weights", other)
    for name in PROVENANCE:
        found = [states.meta.get(name) for states in (one, other)]
        # A fingerprint changes with the precision that a model computes in, too.
        if None not in found and found[0] != found[1] and not (twins and name == "model"):
            raise UserError(
                f"source and target states are of different models: {name} is {found[0]!r} and "
                f"{found[1]!r}"
            )
    if sizes[0] != sizes[1]:
        raise UserError(f"source states have {sizes[0]} features, target states {sizes[1]}")
    return {name: one.meta[name] for name in PROVENANCE if one.meta.get(name) is not None}
