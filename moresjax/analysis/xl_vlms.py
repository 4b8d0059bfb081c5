"""Concepts, steering vectors and hidden states from the `.pth` files of xl-vlms.

Source: mshukor/xl-vlms, as its analyses save them: dictionaries with `concepts` [K, D],
`activations` [N, K], `decomposition_method`, `text_grounding`, `image_grounding_paths` and the
fitted scikit-learn object `analysis_model`, of which only the numbers are read; steering vectors
`steering_vector*` [D]; and features, which `xl_vlms_features` reads. No file of theirs was at hand.

Their `steering_vector_concept_i_to_j` is `u_i - u_j`, which steers from j to i; it is turned round,
and called `i>j`, as vectors between concepts are here. Their `mean_of_directions` is the mean of
vectors that cancel each other, and left out.

Axis legend: N states, D hidden size, K concepts.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moresjax.analysis.concepts import METHODS, Concepts
from moresjax.analysis.vectors import save_vectors
from moresjax.analysis.xl_vlms_features import STATES, save_features
from moresjax.core.errors import UserError, choice_error
from moresjax.core.folders import new_folder
from moresjax.weights.files import pickle_error, unpickled

ORIGIN = "xl-vlms"
# Their names of methods -> ours.
RENAMED = {"nndl": "snmf", **{name: name for name in METHODS if name != "sae"}}
# The classes of `analysis_model`.
FITTED = (
    "sklearn.cluster._kmeans.KMeans",
    "sklearn.decomposition._dict_learning.DictionaryLearning",
    "sklearn.decomposition._pca.PCA",
)
FINE = re.compile(r"steering_vector_concept_(\d+)_to_(\d+)")
CANCELS = "mean_of_directions"


def import_xl_vlms(
    file: str | Path,
    out: str | Path,
    *,
    site: str = "",
    layer: int | None = None,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Writes concepts, steering vectors or a store of hidden states, each as ours are written.

    Args:
      file: A `.pth` file of xl-vlms, whose tensors torch reads without running what is in it.
      out: A new or empty folder.
      site: The site that the states were read at, such as `llm.norm.out`; the file does not say.
      layer: Their layer. Of features, which name a module, both choose it where ours is not known.
      allow_pickle: Whether a pickle may be read.

    Returns:
      What was written: `kind` (`concepts`, `vectors` or `states`), and the facts.

    Raises:
      UserError: The file may not be read, cannot be, or holds none of them; nothing is written
        then.
    """
    file = Path(file)
    content = _content(file, allow_pickle)
    facts: dict[str, Any] = {"origin": ORIGIN, "file": file.name}
    facts |= {"site": site} if site else {}
    facts |= {} if layer is None else {"layer": layer}
    if STATES in content:
        return {"kind": "states", **save_features(content, file, out, site, layer)}
    if "concepts" in content:
        found = _concepts(content, file, facts)
        found.save(out)
        return {"kind": "concepts", "method": found.method, "concepts": len(found), **facts}
    vectors = _vectors(content, file)
    with new_folder(out, "import") as new:
        save_vectors(new, vectors, dict.fromkeys(vectors, facts))
    return {"kind": "vectors", "vectors": [*vectors], **facts}


def _content(file: Path, allow_pickle: bool) -> Mapping[str, Any]:
    if not file.is_file():
        raise UserError(f"{file} is not a file")
    if not allow_pickle:
        raise pickle_error(f"{file} is pickled")
    try:
        content = unpickled(file, FITTED)
    except UserError as error:
        raise UserError(
            f"{error}; if it has another object than scikit-learn's KMeans, PCA or "
            "DictionaryLearning, save it without that"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file} is none of xl-vlms: it holds a {type(content).__name__}")
    return content


def _array(content: Mapping[str, Any], name: str, axes: int, file: Path) -> np.ndarray:
    """A tensor of the file in fp32."""
    array = np.asarray(content.get(name, ()), np.float32)
    if array.ndim != axes or not array.size or not np.isfinite(array).all():
        raise UserError(f"{file}: {name} must be finite numbers of {axes} axes, got {array.shape}")
    return array


def _concepts(content: Mapping[str, Any], file: Path, facts: Mapping[str, Any]) -> Concepts:
    """The dictionary, its concepts in the order of the file."""
    method = content.get("decomposition_method")
    if method not in RENAMED:
        raise choice_error(f"decomposition_method in {file}", str(method), RENAMED)
    vectors = _array(content, "concepts", 2, file)
    activations = _array(content, "activations", 2, file)
    if activations.shape[1] != len(vectors):
        raise UserError(
            f"{file} has {len(vectors)} concepts, but activations of {activations.shape[1]}"
        )
    extra = {}
    if method == "pca":
        fitted = content.get("analysis_model")
        mean = np.asarray(getattr(fitted, "mean_", ()), np.float32)
        if mean.shape != vectors[0].shape or getattr(fitted, "whiten", False):
            raise UserError(
                f"{file}: concepts of pca are about a mean, which analysis_model, a PCA that does "
                "not whiten, must tell"
            )
        extra["center"] = mean
    sizes = np.bincount(activations.argmax(1), minlength=len(vectors))
    more: dict[str, Any] = {"n": len(activations)}
    if words := content.get("text_grounding"):
        more["words"] = [[str(word) for word in own] for own in words]
    return Concepts(RENAMED[method], vectors, sizes, extra, {**facts, **more})


def _vectors(content: Mapping[str, Any], file: Path) -> dict[str, np.ndarray]:
    """The steering vectors of the file by name."""
    found = {}
    for name in content:
        if not str(name).startswith("steering_vector") or name.endswith(CANCELS):
            continue
        if fine := FINE.fullmatch(name):
            found[f"{fine[1]}>{fine[2]}"] = -_array(content, name, 1, file)
        elif np.ndim(content[name]) == 1:  # of three axes it is all of the above together
            found[name.removeprefix("steering_vector_")] = _array(content, name, 1, file)
    if not found:
        held = ", ".join(map(str, [*content][:6]))
        raise UserError(
            f"{file} holds neither concepts nor steering vectors nor hidden states, only: {held}"
        )
    return found
