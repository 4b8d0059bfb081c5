"""How far states of different classes lie apart, layer by layer: linear probes and planes.

Source: "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering", appendix B.6.

Axis legend: N states, D hidden size.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from moresjax.analysis.states import States
from moresjax.core.errors import UserError

TEST_SHARE = 0.3
MIN_STATES = 4  # of a class


@dataclasses.dataclass(frozen=True)
class Separability:
    """How far the classes of one site and layer lie apart.

    Attributes:
      site: The site.
      layer: The layer.
      train: The accuracy of a linear probe (logistic regression on standardised features) on the
        states that it was fitted to.
      test: Its accuracy on the others.
      majority: The share of the most frequent class among these.
      n: The numbers of training and of test states.
      plane: The states on their two first principal components `[N, 2]`.
      explained: The share of the variance along each of the two.
    """

    site: str
    layer: int
    train: float
    test: float
    majority: float
    n: tuple[int, int]
    plane: Float[np.ndarray, "N 2"]
    explained: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON, the plane included."""
        return dataclasses.asdict(self) | {"plane": self.plane.round(5).tolist()}


def separability(
    states: States, labels: Sequence[str], *, seed: int = 0, test_share: float = TEST_SHARE
) -> list[Separability]:
    """A linear probe and a plane for every site and layer of a store.

    Source states and test states are drawn once for all layers, class by class.

    >>> rng = np.random.default_rng(0)
    >>> labels = ["up", "down"] * 20
    >>> apart = rng.standard_normal((40, 8)) + 9 * np.array([[1.0], [-1.0]] * 20)
    >>> index = [{"id": str(n)} for n in range(40)]
    >>> store = States.from_arrays({("llm.block.out", 3): apart}, index)
    >>> (found,) = separability(store, labels)
    >>> found.test, found.plane.shape
    (1.0, (40, 2))

    Args:
      states: The states, all of which were found.
      labels: The class of each of them.
      seed: Seeds the split into training and test states.
      test_share: The share of test states.

    Raises:
      UserError: There is one class only, a class has fewer than 4 states, or a state is not finite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = Counter(labels)
    if len(counts) < 2:
        raise UserError(f"a probe tells classes apart, and there is only {', '.join(counts)}")
    if small := [name for name, count in counts.items() if count < MIN_STATES]:
        raise UserError(
            f"class {small[0]!r} has {counts[small[0]]} states, and a probe needs {MIN_STATES} of "
            "each class; leave it out"
        )
    classes = np.asarray(labels)
    rows = np.arange(len(classes))
    train, test = train_test_split(rows, test_size=test_share, random_state=seed, stratify=classes)
    found = []
    for site, layer in states.keys:
        x = np.asarray(states.matrix(site, layer), np.float64)
        if not np.isfinite(x).all():
            raise UserError(f"states of {site} {layer} are not all finite; leave such samples out")
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(x[train], classes[train])
        plane, explained = principal_plane(x)
        found.append(
            Separability(
                site=site,
                layer=layer,
                train=float(probe.score(x[train], classes[train])),
                test=float(probe.score(x[test], classes[test])),
                majority=max(Counter(classes[test].tolist()).values()) / len(test),
                n=(len(train), len(test)),
                plane=plane,
                explained=explained,
            )
        )
    return found


def principal_plane(
    x: Float[np.ndarray, "N D"],
) -> tuple[Float[np.ndarray, "N 2"], tuple[float, float]]:
    """States on their two first principal components, and the shares of variance along them.

    >>> points, explained = principal_plane(np.diag([3.0, 1.0, 0.0]))
    >>> points.shape, round(sum(explained), 6)
    ((3, 2), 1.0)

    Args:
      x: The states; at least two, of at least two features.
    """
    from sklearn.decomposition import PCA

    model = PCA(2, random_state=0)
    points = model.fit_transform(x)
    first, second = (float(share) for share in np.nan_to_num(model.explained_variance_ratio_))
    return points, (first, second)


def labelled(states: States, field: str) -> tuple[States, list[str]]:
    """The states that were found and have a value in a field, and these values in lower case.

    A field is one of a state's row (`prediction`), or of the row's `metadata` (`answer_type`).

    >>> index = [{"metadata": {"kind": "Number"}}, {}]
    >>> store = States.from_arrays({("llm.norm.out", 0): np.ones((2, 3))}, index)
    >>> found, labels = labelled(store, "kind")
    >>> len(found), labels
    (1, ['number'])

    Args:
      states: The states.
      field: The name of the field.

    Raises:
      UserError: No state that was found has it.
    """
    fields = [{**(row.get("metadata") or {}), **row} for row in states.index]
    labels = {
        number: str(row[field]).strip().lower()
        for number, row in enumerate(fields)
        if row.get(field) is not None and states.found[number]
    }
    if not labels:
        names = sorted({name for row in fields for name in row})
        raise UserError(f"no state has the field {field!r}; there are: {', '.join(names)}")
    return states.take([*labels]), [*labels.values()]
