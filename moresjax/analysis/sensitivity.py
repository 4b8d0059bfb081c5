"""How an answer depends on concepts: concept activation vectors and their sensitivities (TCAV).

Source: Kim et al. 2018, "Interpretability Beyond Feature Attribution: Quantitative Testing with
Concept Activation Vectors". A linear classifier tells the states of a concept from others drawn at
random; the vector is the normal of its plane, towards the concept. The sensitivity of an answer is
the derivative of its logit by a state along that vector, and a concept's score the share of
questions where it is positive. Every run draws other states and has a random concept beside it: two
sets of states that both are drawn from the others.

Axis legend: N questions or states, M other states, R runs, L layers, B rows, D hidden size,
V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moresjax.analysis.states import Key, States
from moresjax.core.errors import UserError
from moresjax.core.layout import Batch
from moresjax.core.types import AnyArray
from moresjax.models.mllm import MLLM
from moresjax.tuning.base import Params
from moresjax.tuning.hooks import AttachedWrite
from moresjax.tuning.sites import num_layers

RUNS, LEVEL = 20, 0.05
TEST_SHARE = 1 / 3  # of a run's states, that its classifier is tested on
MIN_STATES = 4  # of a side


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How an answer depends on a concept, at one site and layer.

    Attributes:
      concept: The concept.
      site: The site.
      layer: The layer.
      score: The mean over runs of the share of questions whose logit rises along the concept.
      scores: This share in every run.
      random: The mean of `random_scores`, those of random concepts.
      random_scores: The share in every run for its random concept.
      accuracy: The accuracy of the classifiers on held-out states, mean over runs; .5 is chance.
      p: The p-value of a two-sided Welch t-test that concept and random concepts have the same mean
        score.
      p_questions: The p-value of a two-sided sign test over questions, each of which counts as most
        runs have it. Runs share their questions and the concept's states, so that `p` alone is soon
        small.
      significant: Whether both, times the number of concepts and layers (Bonferroni), are below
        .05.
      states: The states of each side in a run.
    """

    concept: str
    site: str
    layer: int
    score: float
    scores: list[float]
    random: float
    random_scores: list[float]
    accuracy: float
    p: float
    p_questions: float
    significant: bool
    states: int

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self)


def concept_sensitivity(
    states: States,
    labels: Sequence[str],
    gradients: Mapping[Key, Float[np.ndarray, "N D"]],
    *,
    concepts: Sequence[str] = (),
    runs: int = RUNS,
    seed: int = 0,
) -> list[Sensitivity]:
    """Scores of concepts at every site and layer, with their tests against random concepts.

    >>> rng = np.random.default_rng(0)
    >>> labels = ["up"] * 20 + ["rest"] * 60
    >>> apart = rng.standard_normal((80, 4)) + 9 * np.eye(4)[0] * (np.arange(80) < 20)[:, None]
    >>> index = [{"id": str(n)} for n in range(80)]
    >>> store = States.from_arrays({("llm.block.out", 3): apart}, index)
    >>> gradients = {("llm.block.out", 3): np.tile([1.0, 0.0, 0.0, 0.0], (9, 1))}
    >>> (found,) = concept_sensitivity(store, labels, gradients, concepts=["up"])
    >>> found.score, found.significant
    (1.0, True)

    Args:
      states: The states, all of which were found.
      labels: The concept of each of them; the others of a concept are all states without it.
      gradients: By site and layer the derivatives of an answer's logit by the states of questions.
      concepts: The concepts; default: all.
      runs: R.
      seed: Seeds the draws.

    Raises:
      UserError: A concept is unknown or has fewer than 4 states, or others fewer than 8; states
        are not finite or of another size; there are fewer than two runs.
    """
    if runs < 2:
        raise UserError(f"a test over runs needs at least two of them, got {runs}")
    names, of = list(concepts) or sorted({*labels}), np.asarray(labels)
    found = []
    for site, layer in states.keys:
        x, own = np.asarray(states.matrix(site, layer), np.float64), gradients[site, layer]
        if not np.isfinite(x).all():
            raise UserError(f"states of {site} {layer} are not all finite; leave such samples out")
        if x.shape[1] != own.shape[1]:
            raise UserError(
                f"states of {site} {layer} have {x.shape[1]} features, the model {own.shape[1]}"
            )
        for name in names:
            inside = of == name
            if not inside.any():
                raise UserError(f"no state has the concept {name!r}; there are {sorted({*labels})}")
            vectors, chance, accuracy, size = _vectors(x[inside], x[~inside], name, runs, seed)
            scores, random = shares(own, vectors), shares(own, chance)
            p, p_questions = significance(scores, random), sign_test(own, vectors)
            tests = len(states.keys) * len(names)
            found.append(
                Sensitivity(
                    name,
                    site,
                    layer,
                    float(scores.mean()),
                    scores.tolist(),
                    float(random.mean()),
                    random.tolist(),
                    accuracy,
                    p,
                    p_questions,
                    max(p, p_questions) * tests < LEVEL,
                    size,
                )
            )
    return found


def _vectors(
    concept: Float[np.ndarray, "N D"],
    others: Float[np.ndarray, "M D"],
    name: str,
    runs: int,
    seed: int,
) -> tuple[Float[np.ndarray, "R D"], Float[np.ndarray, "R D"], float, int]:
    """The vectors of a concept and of random ones, the accuracy, and the states of a side."""
    size = min(len(concept), len(others) // 2)
    if size < MIN_STATES:
        raise UserError(
            f"concept {name!r} has {len(concept)} states and {len(others)} others; a vector needs "
            f"{MIN_STATES} and {2 * MIN_STATES}"
        )
    rng = np.random.default_rng(seed)
    own, chance, accuracies = [], [], []
    for _ in range(runs):
        chosen = concept[rng.permutation(len(concept))[:size]]
        drawn = others[rng.permutation(len(others))[: 2 * size]]
        vector, accuracy = activation_vector(chosen, drawn[:size], seed)
        own.append(vector)
        accuracies.append(accuracy)
        chance.append(activation_vector(drawn[size:], drawn[:size], seed)[0])
    return np.stack(own), np.stack(chance), float(np.mean(accuracies)), size


def activation_vector(
    concept: Float[np.ndarray, "N D"], others: Float[np.ndarray, "M D"], seed: int = 0
) -> tuple[Float[np.ndarray, " D"], float]:
    """A concept activation vector of length 1, and its classifier's accuracy on held-out states.

    The classifier is a logistic regression on standardised features.

    >>> vector, accuracy = activation_vector(np.eye(8, 2) + [9.0, 0.0], np.eye(8, 2))
    >>> bool(vector[0] > 0.99), accuracy
    (True, 1.0)

    Args:
      concept: States with the concept.
      others: States without it.
      seed: Seeds which states are held out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x = np.concatenate([concept, others])
    y = np.arange(len(x)) < len(concept)
    train, test = train_test_split(
        np.arange(len(x)), test_size=TEST_SHARE, random_state=seed, stratify=y
    )
    scaler = StandardScaler().fit(x[train])
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(x[train]), y[train])
    normal = probe.coef_[0] / scaler.scale_
    accuracy = float(probe.score(scaler.transform(x[test]), y[test]))
    return normal / np.linalg.norm(normal), accuracy


def shares(
    gradients: Float[np.ndarray, "N D"], vectors: Float[np.ndarray, "R D"]
) -> Float[np.ndarray, " R"]:
    """The share of questions whose logit rises along each vector.

    >>> shares(np.array([[1.0, 0.0], [-1.0, 2.0]]), np.eye(2)).tolist()
    [0.5, 0.5]
    """
    return (gradients.astype(np.float64) @ vectors.T > 0).mean(0)


def significance(scores: Float[np.ndarray, " R"], random: Float[np.ndarray, " R"]) -> float:
    """The p of Welch's two-sided t-test between scores of a concept and of random ones.

    >>> significance(np.ones(4), np.ones(4)), significance(np.ones(4), np.zeros(4))
    (1.0, 0.0)

    Scores that do not vary at all, on both sides, are the same or surely not.
    """
    from scipy.stats import ttest_ind_from_stats

    if not np.ptp(scores) and not np.ptp(random):
        return float(scores[0] == random[0])
    sides = [x for own in (scores, random) for x in (own.mean(), own.std(ddof=1), len(own))]
    return float(ttest_ind_from_stats(*sides, equal_var=False).pvalue)


def sign_test(gradients: Float[np.ndarray, "N D"], vectors: Float[np.ndarray, "R D"]) -> float:
    """The p of a two-sided sign test: whether as many logits rise as fall, as most vectors have it.

    >>> sign_test(np.ones((4, 1)), np.ones((3, 1)))
    0.125
    """
    from scipy.stats import binomtest

    rises = (gradients.astype(np.float64) @ vectors.T > 0).mean(1) > 0.5
    return float(binomtest(int(rises.sum()), len(rises)).pvalue)


def state_gradients(
    mllm: MLLM,
    batch: Batch,
    site: str,
    places: Int[AnyArray, " B"],
    ids: Int[AnyArray, "B 2"] | None,
    signs: Sequence[float] = (1.0, 0.0),
) -> Float[np.ndarray, "L B D"]:
    """Derivatives of the next token's logit by the state of one token of each row.

    Args:
      mllm: The model.
      batch: The rows.
      site: A site of the LLM; one without layers counts as a single layer.
      places: The token of each row whose state is meant, and whose next token.
      ids: Two possible next tokens of each row; None: the likeliest one.
      signs: What their logits are multiplied by before they are added up.
    """
    graphdef, state = nnx.split(mllm)
    given = None if ids is None else jnp.asarray(ids)
    sign = jnp.asarray(signs, jnp.float32)
    return np.asarray(_gradients(graphdef, site, state, batch, jnp.asarray(places), given, sign))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    graphdef: nnx.GraphDef,
    site: str,
    state: nnx.State,
    batch: Batch,
    places: Int[Array, " B"],
    ids: Int[Array, "B 2"] | None,
    signs: Float[Array, " 2"],
) -> Float[Array, "L B D"]:
    model = nnx.merge(graphdef, state)
    extra, layers = model.tuning.num_extra_tokens, num_layers(site, model.config)
    rows = jnp.arange(len(places))

    def write(params: Params, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return h.at[rows, places + extra].add(params["added"].astype(h.dtype))

    def value(added: Float[Array, "*L B D"]) -> Float[Array, ""]:
        out = model(batch, writes=[(site, AttachedWrite(write, {"added": added}))])
        logits = model.llm.logits(out.hidden[rows, places][:, None])[:, 0]
        if ids is None:
            return logits.max(1).sum()
        return (jnp.take_along_axis(logits, ids, axis=1) * signs).sum()

    shape = (len(places), model.config.llm.hidden_size)
    gradient = jax.grad(value)(jnp.zeros((layers, *shape) if layers else shape, jnp.float32))
    return gradient if layers else gradient[None]
