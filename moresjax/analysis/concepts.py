"""Concept dictionaries: states `Z` [N, D] as activations `V` [N, K] of K concepts `U` [K, D].

| method | concepts | activations |
|---|---|---|
| `kmeans` | means of clusters | `1 / (1 + distance)` |
| `pca` | principal components | `(z - mean) U^T` |
| `snmf` | factors of least `||Z - V U||^2 / 2 + sum V` with `V >= 0`, `||u|| <= 1` | `V` |
| `simple` | the K states of the largest norm | as `kmeans` |
| `sae` | decoder of a TopK sparse autoencoder | the k largest codes, others 0 |

Source: "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering", section 3, and
the dictionaries of CoX-LMM (Parekh et al. 2024); `sae` is that of Gao et al. 2024.

Axis legend: N states, D hidden size, K concepts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moresjax._version import __version__
from moresjax.analysis.lloyd import MAX_ITERATIONS, first_centers, lloyd
from moresjax.analysis.sparse_autoencoder import SAEOptions, codes, train_autoencoder
from moresjax.analysis.state_rows import StateRows
from moresjax.analysis.states import States
from moresjax.core.errors import UserError, choice_error
from moresjax.core.folders import new_file, new_folder
from moresjax.core.json_files import read_object, write_json
from moresjax.core.types import AnyArray

ARRAYS, FACTS = "concepts.npz", "concepts.json"
SKLEARN_ROWS = 50_000  # with more states k-means and PCA read them in pieces
ALPHA = 1  # weight of the activations in `snmf`
WAYS = ("activation", "cosine", "l2")
NEAREST = ("kmeans", "simple")  # methods whose concepts are points, with nearness as activation


@dataclasses.dataclass(frozen=True)
class Concepts:
    """A dictionary of concepts, the one with the most states first.

    Attributes:
      method: The method that `learn` was asked for.
      vectors: The concepts `[K, D]`.
      sizes: How many of the states that were learned from each concept activates most `[K]`.
      extra: Other arrays that activations need, such as the mean of `pca`.
      facts: How the dictionary was learned: `seed`, `n`, `explained` (share of the states' variance
        that is explained), `site` and `layer` where they are known, and what the states were.
    """

    method: str
    vectors: Float[np.ndarray, "K D"]
    sizes: Int[np.ndarray, " K"]
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    def project(self, states: States | AnyArray) -> Float[np.ndarray, "N K"]:
        """The activations of states.

        Args:
          states: An array `[N, D]`, or a store, of which the states that were found count.

        Raises:
          UserError: The states have another size, site or layer.
        """
        rows = self.rows(states)
        activate = functools.partial(_ACTIVATIONS[self.method], self)
        return np.concatenate([activate(chunk) for chunk in rows.chunks()]).astype(np.float32)

    def assign(self, states: States | AnyArray, by: str = "activation") -> Int[np.ndarray, " N"]:
        """The concept of each state.

        Args:
          states: An array `[N, D]`, or a store, of which the states that were found count.
          by: `activation` (the largest), `cosine` (the most similar) or `l2` (the nearest).

        Raises:
          UserError: The states do not fit, or there is no such way.
        """
        if by not in WAYS:
            raise choice_error("way to assign states", by, WAYS)
        if by == "activation":
            return self.project(states).argmax(1)
        near = cosines if by == "cosine" else _closeness
        found = [near(chunk, self.vectors).argmax(1) for chunk in self.rows(states).chunks()]
        return np.concatenate(found)

    def rows(self, states: States | AnyArray) -> StateRows:
        """States of this dictionary's site and layer, to be read in pieces.

        Raises:
          UserError: The states have another size, site or layer.
        """
        rows = StateRows(states, self.facts.get("site"), self.facts.get("layer"))
        if rows.size != self.vectors.shape[1]:
            raise UserError(
                f"these concepts have {self.vectors.shape[1]} features, the states {rows.size}"
            )
        return rows

    def moved(self, by: Float[np.ndarray, "K D"]) -> "Concepts":
        """The same concepts, each moved by a vector."""
        return dataclasses.replace(self, vectors=self.vectors + by.astype(np.float32))

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Writes `concepts.npz` and `concepts.json` into a new folder.

        Args:
          folder: A new or empty folder.
          facts: What else to write into `concepts.json`.

        Raises:
          UserError: The folder has something in it.
        """
        with new_folder(folder, "concepts") as partial:
            self.write(partial, facts)

    def write(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """The files of `save` in a folder that is there."""
        arrays: dict[str, Any] = {"vectors": self.vectors, "sizes": self.sizes}
        arrays |= {f"extra.{name}": array for name, array in self.extra.items()}
        with new_file(folder / ARRAYS) as file, file.open("wb") as content:
            np.savez(content, **arrays)
        content = {"method": self.method, "version": __version__} | self.facts
        content |= {"sizes": self.sizes.tolist()} | dict(facts or {})
        write_json(folder / FACTS, content)

    @classmethod
    def load(cls, folder: str | Path) -> "Concepts":
        """A dictionary that `save` wrote.

        Raises:
          UserError: The folder holds none, or is damaged.
        """
        folder = Path(folder)
        if not (folder / ARRAYS).is_file() or not (folder / FACTS).is_file():
            raise UserError(f"{folder} holds no concepts: it has no {ARRAYS} and {FACTS}")
        facts = read_object(folder / FACTS)
        try:
            with np.load(folder / ARRAYS, allow_pickle=False) as file:
                arrays = dict(file)
            vectors, sizes = arrays.pop("vectors"), arrays.pop("sizes")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder / ARRAYS} cannot be used: {error}") from None
        extra = {name.removeprefix("extra."): array for name, array in arrays.items()}
        method = facts.pop("method", None)
        if method not in METHODS:
            raise choice_error(f"method in {folder / FACTS}", method, METHODS)
        return cls(method, vectors, sizes, extra, facts)


def learn(
    states: States | AnyArray,
    method: str = "kmeans",
    concepts: int = 20,
    *,
    seed: int = 0,
    site: str | None = None,
    layer: int | None = None,
    sae: SAEOptions | None = None,
) -> Concepts:
    """A dictionary of the concepts in states.

    The concept that most states activate most comes first; those of `pca` are in order of the
    variance along them. The same seed gives the same dictionary.

    >>> rng = np.random.default_rng(0)
    >>> states = np.repeat(np.eye(3, 8), [10, 20, 30], axis=0) + 0.01 * rng.normal(size=(60, 8))
    >>> d = learn(states, "kmeans", 3)
    >>> d.sizes.tolist(), d.assign(np.eye(3, 8)).tolist()
    ([30, 20, 10], [2, 1, 0])
    >>> d.project(np.eye(3, 8)).shape
    (3, 3)

    Args:
      states: An array `[N, D]`, or a store, of which the states that were found count.
      method: `kmeans`, `pca`, `snmf`, `simple` or `sae`.
      concepts: K.
      seed: The seed of every draw.
      site: The site in a store; it may be left out where there is only one.
      layer: The layer of the site; likewise.
      sae: The settings of `sae`.

    Raises:
      UserError: The method is unknown, there are fewer states than concepts, or too many states for
        `snmf`, or a state is not finite.
    """
    if method not in METHODS:
        raise choice_error("method of concepts", method, METHODS)
    rows = StateRows(states, site, layer)
    most = min(len(rows), rows.size) if method == "pca" else len(rows)
    if not 1 <= concepts <= most:
        raise UserError(
            f"{concepts} concepts of {len(rows)} states of {rows.size} features: {method} finds "
            f"from 1 to {most}"
        )
    mean, variance = rows.moments()
    vectors, extra = METHODS[method](rows, concepts, seed, sae or SAEOptions())
    facts: dict[str, Any] = {"seed": seed, "n": len(rows)}
    if isinstance(states, States):
        site = site or states.sites[0]
        layer = layer if layer is not None else states.meta["layers"][site][0]
        facts |= {"site": site, "layer": layer, "states": states.meta}
    if method == "sae":
        facts["sae"] = dataclasses.asdict(sae or SAEOptions())
    found = Concepts(method, vectors.astype(np.float32), np.zeros(concepts, int), extra, facts)
    return _measured(found, rows, mean, float(variance.sum()))


def _measured(found: Concepts, rows: StateRows, mean: np.ndarray, variance: float) -> Concepts:
    """The dictionary in order of its sizes, with the share of variance that it explains."""
    sizes, errors = np.zeros(len(found), int), 0.0
    for chunk in rows.chunks():
        active = _ACTIVATIONS[found.method](found, chunk)
        labels = active.argmax(1)
        sizes += np.bincount(labels, minlength=len(found))
        if found.method in NEAREST:
            guess = found.vectors[labels]
        else:
            guess = active @ found.vectors + found.extra.get("center", np.zeros(1))
        errors += float(np.square(chunk - guess, dtype=np.float64).sum())
    order = np.arange(len(found))
    if found.method != "pca":
        order = np.argsort(-sizes, kind="stable")
    by_concept = {"encoder", "bias"}
    extra = {k: v[..., order] if k in by_concept else v for k, v in found.extra.items()}
    total = variance * len(rows)
    facts = found.facts | {"explained": 1 - errors / total if total > 0 else None}
    return Concepts(found.method, found.vectors[order], sizes[order], extra, facts)


def cosines(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "N K"]:
    """Cosine similarities, 0 for a vector of zeros."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return np.divide(a @ b.T, norms, out=np.zeros((len(a), len(b))), where=norms > 0)


def _closeness(z: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    from sklearn.metrics import euclidean_distances

    return 1 / (1 + euclidean_distances(z, vectors))


def _nearest(d: Concepts, z: np.ndarray) -> np.ndarray:
    return _closeness(z, d.vectors)


def _components(d: Concepts, z: np.ndarray) -> np.ndarray:
    return (z - d.extra["center"]) @ d.vectors.T


def _positive_codes(d: Concepts, z: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import sparse_encode

    options = {"algorithm": "lasso_cd", "alpha": ALPHA, "positive": True}
    return sparse_encode(z.astype(np.float64), d.vectors.astype(np.float64), **options)


def _sparse_codes(d: Concepts, z: np.ndarray) -> np.ndarray:
    active = int(d.extra["active"])
    return codes(z, d.extra["center"], d.extra["encoder"], d.extra["bias"], active)


_ACTIVATIONS: dict[str, Callable[[Concepts, np.ndarray], np.ndarray]] = {
    "kmeans": _nearest,
    "pca": _components,
    "snmf": _positive_codes,
    "simple": _nearest,
    "sae": _sparse_codes,
}

Learned = tuple[np.ndarray, dict[str, np.ndarray]]


def _kmeans(rows: StateRows, concepts: int, seed: int, sae: SAEOptions) -> Learned:
    if len(rows) > SKLEARN_ROWS:
        return lloyd(rows, first_centers(rows, concepts, seed)).centers, {}
    from sklearn.cluster import KMeans

    model = KMeans(concepts, random_state=seed, max_iter=MAX_ITERATIONS)
    return model.fit(rows.all()).cluster_centers_, {}


def _pca(rows: StateRows, concepts: int, seed: int, sae: SAEOptions) -> Learned:
    if len(rows) <= SKLEARN_ROWS:
        from sklearn.decomposition import PCA

        model = PCA(concepts, random_state=seed).fit(rows.all())
        center = np.asarray(model.mean_, np.float32)
        return np.asarray(model.components_), {"center": center}
    mean, _ = rows.moments()
    products = np.zeros((rows.size, rows.size))
    for chunk in rows.chunks():
        moved = chunk - mean
        products += moved.T @ moved
    _, vectors = np.linalg.eigh(products)
    components = vectors[:, ::-1][:, :concepts].T
    largest = np.abs(components).argmax(1)  # whose sign is plus, as scikit-learn has it
    signs = np.sign(components[np.arange(concepts), largest])
    return components * signs[:, None], {"center": mean}


def _snmf(rows: StateRows, concepts: int, seed: int, sae: SAEOptions) -> Learned:
    if len(rows) > SKLEARN_ROWS:
        raise UserError(
            f"snmf holds all states in memory: at most {SKLEARN_ROWS:,d}, got {len(rows):,d}; take "
            "a sample of them, or another method"
        )
    from sklearn.decomposition import DictionaryLearning

    model = DictionaryLearning(
        concepts,
        alpha=ALPHA,
        positive_code=True,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        max_iter=MAX_ITERATIONS,
        random_state=seed,
    )
    return model.fit(rows.all().astype(np.float64)).components_, {}


def _simple(rows: StateRows, concepts: int, seed: int, sae: SAEOptions) -> Learned:
    norms = np.concatenate([np.linalg.norm(chunk, axis=1) for chunk in rows.chunks()])
    return rows.take(np.argsort(-norms, kind="stable")[:concepts]), {}


def _sae(rows: StateRows, concepts: int, seed: int, sae: SAEOptions) -> Learned:
    return train_autoencoder(rows, concepts, seed, sae)


METHODS: dict[str, Callable[[StateRows, int, int, SAEOptions], Learned]] = {
    "kmeans": _kmeans,
    "pca": _pca,
    "snmf": _snmf,
    "simple": _simple,
    "sae": _sae,
}


def stability(
    states: States | AnyArray,
    method: str = "kmeans",
    concepts: int = 20,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    **options: Any,
) -> dict[str, Any]:
    """How much of a dictionary another seed finds again.

    Concepts of two dictionaries are matched one to one by their cosine similarity.

    >>> states = np.repeat(np.eye(3, 8), 10, axis=0)
    >>> stability(states, concepts=3, seeds=[0, 1])["cosine"]
    1.0

    Args:
      states: An array `[N, D]`, or a store, of which the states that were found count.
      method: As in `learn`.
      concepts: K.
      seeds: At least two.
      options: Other arguments of `learn`.

    Returns:
      `cosine`, the mean over pairs of seeds and concepts; `centred_cosine`, the same of concepts
      minus the dictionary's mean (states share a large part); `found_again`, the share of concepts
      with a match of cosine .7 or more; `by_concept`, for each concept of the first seed its mean
      cosine; and `adjusted_rand`, the mean agreement of two assignments of the states (1: the same,
      0: chance).

    Raises:
      UserError: As `learn`, and for fewer than two seeds.
    """
    from sklearn.metrics import adjusted_rand_score

    if len(set(seeds)) < 2:
        raise UserError("stability compares dictionaries of at least two seeds")
    found = [learn(states, method, concepts, seed=seed, **options) for seed in seeds]
    labels = [d.assign(states) for d in found]
    plain, centred, rand = {}, [], []
    for a, b in itertools.combinations(range(len(found)), 2):
        u, w = found[a].vectors, found[b].vectors
        plain[a, b] = matched_cosines(u, w)
        centred.append(matched_cosines(u - u.mean(0), w - w.mean(0)))
        rand.append(adjusted_rand_score(labels[a], labels[b]))
    every = np.stack(list(plain.values()))
    return {
        "seeds": list(seeds),
        "cosine": float(every.mean()),
        "centred_cosine": float(np.mean(centred)),
        "found_again": float((every >= 0.7).mean()),
        "by_concept": np.mean([x for (a, _), x in plain.items() if a == 0], axis=0).tolist(),
        "adjusted_rand": float(np.mean(rand)),
    }


def match_bijective(
    a: Float[np.ndarray, "K D"], b: Float[np.ndarray, "K D"]
) -> Int[np.ndarray, " K"]:
    """For each concept of `a` its own one of `b`, with the largest sum of cosines."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(-cosines(a, b))[1])


def matched_cosines(
    a: Float[np.ndarray, "K D"], b: Float[np.ndarray, "K D"]
) -> Float[np.ndarray, " K"]:
    """The cosine of each concept of `a` with its match in `b`."""
    return cosines(a, b)[np.arange(len(a)), match_bijective(a, b)]
