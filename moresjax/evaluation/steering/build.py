"""From stores of states, or a dictionary of concepts, to the vectors and trials of a steering run.

Axis legend: D hidden size.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moresjax.analysis.concepts import Concepts
from moresjax.analysis.states import States
from moresjax.analysis.steering import (
    Selection,
    coarse,
    controls,
    count_changes,
    fine,
    random_like,
    selection,
    subsampled,
)
from moresjax.analysis.vectors import PROVENANCE, check_same_source, data_hash
from moresjax.core.errors import UserError
from moresjax.evaluation.steering.answers import AnswerTask
from moresjax.evaluation.steering.ask import POSITIONS, Trial
from moresjax.evaluation.steering.tasks import SteeringTask
from moresjax.inference.model import Model
from moresjax.inference.steering import first_tokens

ZERO = "zero"
DRAWS = 5  # vectors of each size


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a steering run tries.

    Attributes:
      vectors: The vectors by name.
      facts: What each is made of.
      trials: Vectors with strengths, layers and positions, the controls too.
      cosines: By number of states, cosines of vectors of so few with that of all.
    """

    vectors: dict[str, np.ndarray]
    facts: dict[str, dict[str, Any]]
    trials: list[Trial]
    cosines: dict[int, list[float]] = dataclasses.field(default_factory=dict)


def coarse_plan(
    source: States,
    target: States,
    name: str,
    *,
    site: str = "llm.block.out",
    layers: Sequence[int] = (),
    alphas: Sequence[float] = (1.0,),
    positions: Sequence[str] = (POSITIONS,),
    sizes: Sequence[int] = (),
    seed: int = 0,
) -> Plan:
    """Coarse vectors of some layers, with their controls and with vectors of fewer states.

    The controls (a random vector of equal norm, shuffled labels, the vector reversed and strength
    0) are tried at the last of the layers, with strength 1 where it is among those of the vector,
    else with the largest of these.

    >>> index = [{"id": str(n)} for n in range(4)]
    >>> store = States.from_arrays({("llm.block.out", 1): np.eye(4, 8)}, index)
    >>> plan = coarse_plan(store.take([0, 1]), store.take([2, 3]), "yes>no", alphas=[0.5, 1])
    >>> [trial.name for trial in plan.trials]
    ['yes>no', 'yes>no', 'random', 'shuffled', 'reversed', 'zero']

    Args:
      source: The states to steer away from.
      target: The states to steer to.
      name: The vector's name; with several layers the layer is added. A slash, which separates the
        methods of a spec, becomes a hyphen.
      site: The site.
      layers: The layers; default: all that both stores have.
      alphas: The strengths.
      positions: Selectors of the steered tokens.
      sizes: How many states of each side further vectors are made of, five draws each.
      seed: Seeds the controls and the draws.

    Raises:
      UserError: The stores are of different models or have no such site or layer, or a side has no
        states or too few.
    """
    layers = list(layers) or [
        layer for own, layer in source.keys if own == site and (own, layer) in target.keys
    ]
    if not layers or not alphas:
        raise UserError(f"source and target states have no layer of {site} in common")
    vectors, facts, trials, name = {}, {}, [], name.replace("/", "-")
    made: dict[str, Any] = {}
    sides: list[np.ndarray] = []
    for layer in layers:
        provenance = check_same_source(source, target, site, layer)
        sides = [_found(states, site, layer) for states in (source, target)]
        own = name if len(layers) == 1 else f"{name}@{layer}"
        made = {"site": site, "layer": layer, "n": [len(side) for side in sides], **provenance}
        made["data"] = [data_hash(source), data_hash(target)]
        vectors[own], facts[own] = coarse(sides[0], sides[1]), made
        for alpha, chosen in itertools.product(alphas, positions):
            trials.append(Trial(own, vectors[own], layer, alpha, site, chosen))
    alpha = _control_strength(alphas)
    rest = {"layer": layers[-1], "site": site, "positions": positions[0]}
    whole = vectors[trials[-1].name]
    for control, vector in controls(sides[0], sides[1], seed).items():
        vectors[control], facts[control] = vector, made | {"control": control, "seed": seed}
        trials.append(Trial(control, vector, alpha=alpha, **rest))
    trials.append(Trial(ZERO, whole, alpha=0.0, **rest))
    cosines = {}
    for size, drawn in subsampled(sides[0], sides[1], sizes, draws=DRAWS, seed=seed).items():
        norms = np.linalg.norm(drawn, axis=1) * np.linalg.norm(whole)
        cosines[size] = (drawn @ whole / np.where(norms > 0, norms, 1)).tolist()
        for number, vector in enumerate(drawn):
            few = f"n{size}.{number}"
            vectors[few] = vector
            facts[few] = made | {"n": [size, size], "draw": number, "seed": seed}
            trials.append(Trial(few, vector, alpha=alpha, **rest))
    return Plan(vectors, facts, trials, cosines)


def fine_plan(
    concepts: Concepts, *, alphas: Sequence[float] = (1.0,), positions: Sequence[str] = (POSITIONS,)
) -> Plan:
    """The vectors between all pairs of concepts of source states, `I>J` leading to concept J.

    `with_controls` adds what those that are kept have to be better than.

    >>> concepts = Concepts("kmeans", np.eye(2, 4), np.ones(2, int), facts={"layer": 3})
    >>> [trial.name for trial in fine_plan(concepts).trials]
    ['0>1', '1>0']

    Args:
      concepts: A dictionary of the states to steer away from.
      alphas: The strengths.
      positions: Selectors of the steered tokens.

    Raises:
      UserError: The dictionary has one concept, or does not tell its site and layer.
    """
    if len(concepts) < 2:
        raise UserError("fine vectors lead from one concept to another, and there is only one")
    site, layer = concepts.facts.get("site", "llm.block.out"), concepts.facts.get("layer")
    if layer is None:
        raise UserError("the concepts do not say which layer they are of")
    source = concepts.facts.get("states") or {}
    made = {"site": site, "layer": layer, "concepts": concepts.method}
    made |= {name: source[name] for name in (*PROVENANCE, "data") if name in source}
    whole = fine(concepts.vectors)
    pairs = itertools.permutations(range(len(concepts)), 2)
    vectors = {f"{i}>{j}": whole[i, j] for i, j in pairs}
    facts = {name: dict(made) for name in vectors}
    trials = [
        Trial(name, vector, layer, alpha, site, chosen)
        for name, vector in vectors.items()
        for alpha, chosen in itertools.product(alphas, positions)
    ]
    return Plan(vectors, facts, trials)


def with_controls(plan: Plan, names: Sequence[str], seed: int = 0) -> Plan:
    """Some fine vectors of a plan, each with its controls.

    These are a random vector of equal norm (`I>J random`), the vector reversed (`I>J reversed`) and
    strength 0 (`zero`, once, whose answers must be those without steering). There are no labels
    that could be shuffled: a fine vector is made of concepts. Controls have strength 1 where it is
    among those of the vectors, else the largest of these.

    >>> concepts = Concepts("kmeans", np.eye(2, 4), np.ones(2, int), facts={"layer": 3})
    >>> [trial.name for trial in with_controls(fine_plan(concepts), ["0>1"]).trials]
    ['0>1', '0>1 random', '0>1 reversed', 'zero']

    Args:
      plan: The vectors.
      names: Those that are kept.
      seed: Seeds the random vectors.
    """
    trials = [trial for name in names for trial in plan.trials if trial.name == name]
    vectors = {name: plan.vectors[name] for name in names}
    facts = {name: plan.facts[name] for name in names}
    for number, name in enumerate(names):
        own = next(trial for trial in trials if trial.name == name)
        alpha = _control_strength([trial.alpha for trial in trials])
        drawn = random_like(own.vector, seed + number)
        for control, vector in {"random": drawn, "reversed": -own.vector}.items():
            key = f"{name} {control}"
            vectors[key] = vector
            facts[key] = plan.facts[name] | {"control": control, "seed": seed + number}
            trials.append(dataclasses.replace(own, name=key, vector=vector, alpha=alpha))
    trials.append(dataclasses.replace(trials[0], name=ZERO, alpha=0.0))
    return Plan(vectors, facts, trials)


def _control_strength(alphas: Sequence[float]) -> float:
    """1 where it is among the strengths, else the largest of them."""
    return 1.0 if 1.0 in alphas else max(alphas, key=abs)


def first_token_selections(
    model: Model,
    states: States,
    plan: Plan,
    normalize: Callable[[str], str],
    *,
    alpha: float = 1.0,
) -> dict[str, Selection]:
    """The selection of every vector of a plan by first new tokens, without asking a question again.

    Args:
      model: The model.
      states: Its states at the query of the first new token (`take=prompt`), of its last block.
      plan: The vectors, all of one site and layer.
      normalize: How answers are compared.
      alpha: The strength.

    Raises:
      UserError: The states or the vectors are not those of the last block.
    """
    site, layer = plan.trials[0].site, plan.trials[0].layer
    last = model.config.llm.num_layers - 1
    if site == "llm.block.out" and layer != last:
        raise UserError(
            f"first tokens follow from states of the last block, which is {last}; these vectors "
            f"are of {layer}"
        )
    if states.meta.get("take", "prompt") != "prompt":
        raise UserError(
            f"first tokens follow from states of take=prompt, these are of {states.meta['take']}"
        )
    matrix = _found(states, site, layer)
    names = [*plan.vectors]
    vectors = np.stack([np.zeros_like(plan.vectors[names[0]]), *plan.vectors.values()])
    tokens = first_tokens(model, matrix, vectors, alpha=alpha, site=site)
    texts = {
        int(token): normalize(model.prompts.spell([int(token)])) for token in np.unique(tokens)
    }
    answers = [[texts[int(token)] for token in row] for row in tokens]
    return {
        name: selection(count_changes(answers[0], own))
        for name, own in zip(names, answers[1:], strict=True)
    }


def task_of_states(source: States, target: States) -> SteeringTask:
    """The steering task from the answers behind some states to those behind others.

    >>> sides = [States.from_arrays({("s", 0): np.ones((1, 2))}, [{"prediction": x}])
    ...          for x in ("Yes", "No.")]
    >>> task_of_states(*sides).name
    'yes>no'

    Raises:
      UserError: The states do not tell what was answered, or a source's answer is the target's too.
    """
    answers = [
        sorted({str(row.get("prediction") or "") for row in states.take(states.found).index})
        for states in (source, target)
    ]
    return AnswerTask(*answers)


def check_model(facts: Mapping[str, Mapping[str, Any]], model: Model) -> str:
    """A note on the model behind vectors: empty where it is the steered one, exactly.

    Args:
      facts: What is known of each vector.
      model: The steered model.

    Raises:
      UserError: The states are of another model or tokenizer.
    """
    whole = model.provenance
    now = {name: whole[name] for name in ("model", "weights", "processor")}
    for name, own in facts.items():
        same = {key: own.get(key, value) == value for key, value in now.items()}
        precisions = own.get("precision"), whole["precision"]
        if same["processor"] and own.get("twin") == whole["twin"] and len({*precisions}) > 1:
            return "the states are of a twin of this model: {}, this one {}".format(*precisions)
        if not same["processor"]:
            raise UserError(
                f"vector {name} is made of states with another template, tokenizer or image size "
                "than the steered model's; --other-model steers all the same"
            )
        if not same["model"] and not (same["weights"] and "weights" in own):
            raise UserError(
                f"vector {name} is made of states of another model or tuning ({own['model']}) than "
                f"the steered one ({now['model']}); --other-model steers all the same"
            )
        if not all(same.values()):
            return "the states are of a twin of this model: another precision or step"
    return ""


def _found(states: States, site: str, layer: int) -> np.ndarray:
    """The states that were found, in fp32."""
    return np.asarray(states.take(states.found).matrix(site, layer), np.float32)
