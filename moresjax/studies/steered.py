"""What MoReS does inside: LLaVA Steering's Figure 8, its appendix A.4 and the runtimes of A.7.

Axis legend: L layers, B questions, S tokens, D features, V visual tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moresjax.analysis.attention import AttentionMaps
from moresjax.core.layout import TokenKind
from moresjax.evaluation.benchmarks.digits import make_examples
from moresjax.evaluation.examples import Example
from moresjax.inference.analyze import attention
from moresjax.inference.model import Model
from moresjax.inference.overhead import measure_overhead
from moresjax.reports.attention_matrices import attention_matrices
from moresjax.reports.plots import answers_on_image
from moresjax.studies.findings import compare_with
from moresjax.studies.llava_steering import MORES, PLAIN, THREE_LAYERS, runs_of
from moresjax.studies.pipeline import ZERO_SHOT, Pipeline
from moresjax.studies.study import (
    Outcome,
    Study,
    Table,
    Values,
    agreement,
    claim,
    values_table,
    with_interval,
)

SITE = "llm.block.out"
SCENES = 12  # asked about in every family
HALF = 0.5


def _questions(pipeline: Pipeline, scenes: int = SCENES) -> list[Example]:
    """Questions of all families about the first scenes."""
    by_family = make_examples(pipeline.split, min(scenes, pipeline.limit))
    return [example for own in by_family.values() for example in own]


# Figure 8: whole maps ---------------------------------------------------------------------------


def whole_map(model: Model, question: Example) -> tuple[np.ndarray, list[str]]:
    """Attention of every token of a question and its answer on every token `[L, S, S]`.

    Returns:
      The map, mean over heads, and the group of every token.
    """
    row = model.prompts.row(question.prompt, question.images)
    generation = model.service.generate_rows([row], 1)
    whole = row.append(np.asarray(generation.tokens)[0, :1])
    batch = model.service.batch([whole], len(whole))
    every = jnp.arange(len(whole))[None]
    found = model.mllm(batch, probes=(AttentionMaps(),), queries=every).stats["maps"]
    own = np.asarray(found)[:, 0]
    groups = ["virtual"] * (own.shape[-1] - len(whole))
    return own, groups + [TokenKind(kind).name.lower() for kind in np.asarray(whole.kind)]


def visual_attention(model: Model, questions: list[Example]) -> Float[np.ndarray, "L B V"]:
    """Attention of the first new token of answers on every visual token, mean over heads."""
    rows = [model.prompts.row(question.prompt, question.images) for question in questions]
    batch = model.service.batch(rows, max(map(len, rows)))
    last = jnp.asarray([[len(row) - 1] for row in rows])
    found = model.mllm(batch, probes=(AttentionMaps(),), queries=last).stats["maps"]
    maps, virtual = np.asarray(found)[:, :, 0], model.mllm.tuning.num_virtual_tokens
    places = np.stack([np.flatnonzero(np.asarray(row.image) >= 0) for row in rows]) + virtual
    return np.take_along_axis(maps, places[None], axis=-1)


def carriers(masses: Float[np.ndarray, "L B V"]) -> Float[np.ndarray, " L"]:
    """The fewest visual tokens that carry half of the attention on the image, mean over questions.

    >>> carriers(np.asarray([[[0.5, 0.1, 0.1, 0.1]], [[0.2, 0.2, 0.2, 0.2]]])).tolist()
    [1.0, 2.0]
    """
    shares = -np.sort(-masses, axis=-1) / masses.sum(-1, keepdims=True)
    return ((shares.cumsum(-1) < HALF - 1e-9).sum(-1) + 1).mean(-1)


def _fig8(pipeline: Pipeline, study: Study) -> Outcome:
    questions = _questions(pipeline)
    found: dict[str, list[np.ndarray]] = {run.name: [] for run in study.runs}
    figures, grids = {}, {}
    place = 2 * len(questions) // 7  # of the third family, `position`
    shown = questions[place]
    for seed in pipeline.seeds:
        for run in study.runs:
            model = pipeline.model(seed, run.name)
            masses = visual_attention(model, questions)
            found[run.name].append(carriers(masses))
            if seed == pipeline.seeds[0]:
                own, groups = whole_map(model, shown)
                text = shown.prompt.split("\n")[-1]
                title = f"{run.name}, seed {seed}: {text}"
                alt = f"attention of {run.name}, queries by keys, with the borders of groups"
                figures[alt] = attention_matrices(own, groups, title)
                side = round(masses.shape[-1] ** 0.5)
                grids[run.name] = masses[:, place].reshape(-1, side, side)
    figures["attention of the first new token on the image"] = answers_on_image(
        shown.images[0], grids
    )
    tokens = next(iter(grids.values())).shape[-1] ** 2
    title = f"Visual tokens, of {tokens}, that carry half of the attention on the image"
    return Outcome(
        [_by_layer(title, found, 1)],
        [_sparse(name, own, tokens) for name, own in _means(found).items()],
        {name: [one.tolist() for one in own] for name, own in found.items()},
        figures,
    )


def _by_layer(title: str, found: Mapping[str, list[np.ndarray]], digits: int) -> Table:
    """By method and layer the mean over seeds of `[L]` numbers, with its interval."""
    layers = range(len(next(iter(found.values()))[0]))
    rows = [
        [name, *(with_interval([float(one[layer]) for one in own], digits) for layer in layers)]
        for name, own in found.items()
    ]
    return Table(title, ["tuned with", *(f"layer {layer}" for layer in layers)], rows)


def _means(found: Mapping[str, list[np.ndarray]]) -> dict[str, list[float]]:
    """By method the mean over layers of every seed."""
    return {name: [float(one.mean()) for one in own] for name, own in found.items()}


def _sparse(name: str, values: list[float], tokens: int) -> str:
    """A sentence on how few tokens carry half of the attention."""
    even = tokens * HALF
    # In hundredths of what even attention needs, like all differences.
    against = {"even": [1.0] * len(values), name: [value / even for value in values]}
    said = compare_with("even", "Tokens that carry half, relative to even attention,", against)
    return f"{said} They are {with_interval(values, 1)} of {tokens}, mean over layers."


# A.4: norms and attention -----------------------------------------------------------------------


@contextmanager
def steered_below(model: Model, layer: int) -> Iterator[None]:
    """The model while nothing is edited from a layer on; the masks are data of its programs."""
    masks = [
        mask for by_site in model.mllm.tuning.layer_masks.values() for mask in by_site.values()
    ]
    before = [mask[...] for mask in masks]
    for mask, own in zip(masks, before, strict=True):
        mask.set_value(own & (jnp.arange(len(own)) < layer))
    model.service.reset()
    try:
        yield
    finally:
        for mask, own in zip(masks, before, strict=True):
            mask.set_value(own)
        model.service.reset()


def norm_ratios(model: Model, questions: list[Example]) -> Float[np.ndarray, " L"]:
    """By layer the norm of visual tokens after the edit over that before it, mean over tokens."""
    prompts = [question.prompt for question in questions]
    images = [question.images for question in questions]
    rows = [model.prompts.row(question.prompt, question.images) for question in questions]
    places = np.stack([np.flatnonzero(np.asarray(row.image) >= 0) for row in rows])

    def norms() -> Float[np.ndarray, "L B V"]:
        states = model.run(prompts, images, read=SITE).states[SITE]
        return np.take_along_axis(np.linalg.norm(states, axis=-1), places[None], axis=-1)

    after, ratios = norms(), []
    for layer, own in enumerate(after):
        with steered_below(model, layer):
            ratios.append(float((own / norms()[layer]).mean()))
    return np.asarray(ratios)


def _share(model: Model, questions: list[Example]) -> float:
    prompts = [question.prompt for question in questions]
    images = [question.images for question in questions]
    found = attention(model, prompts, images, max_new_tokens=1, batch_size=64)
    return found.average_visual_share


def _a4(pipeline: Pipeline, study: Study) -> Outcome:
    questions = _questions(pipeline)
    steered = [run.name for run in study.runs if run.name != PLAIN]
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in steered}
    shares: dict[str, list[float]] = {run.name: [] for run in study.runs}
    shares |= {f"{name}, its edits off": [] for name in steered}
    for seed in pipeline.seeds:
        for run in study.runs:
            model = pipeline.model(seed, run.name)
            shares[run.name].append(_share(model, questions))
            if run.name in steered:
                ratios[run.name].append(norm_ratios(model, questions))
                with steered_below(model, 0):
                    shares[f"{run.name}, its edits off"].append(_share(model, questions))
    norms = {"before": [1.0] * len(pipeline.seeds)} | _means(ratios)
    return Outcome(
        [
            _by_layer("Norm of steered tokens after the edit, relative to before it", ratios, 3),
            values_table("Share of attention on the image", {"share": shares}, PLAIN),
        ],
        [
            agreement("Norm", "before", {"before": 0.0, **dict.fromkeys(steered, 1.0)}, norms),
            compare_with("before", "Norm of steered tokens, mean over layers,", norms),
            compare_with(PLAIN, "Share of the image", {n: shares[n] for n in (PLAIN, *steered)}),
            *(_switched(name, shares) for name in steered),
        ],
        {
            "norm_ratio": {n: [o.tolist() for o in own] for n, own in ratios.items()},
            "share": shares,
        },
    )


def _switched(name: str, shares: Values) -> str:
    """A sentence on a model with and without its own edits."""
    off = f"{name}, its edits off"
    pair = {off: shares[off], name: shares[name]}
    return compare_with(off, "Share of the image in the same model", pair)


# A.7: runtimes ----------------------------------------------------------------------------------

# The paper's seconds per sample more than without tuning, at 1%, rank 1 and some of the layers.
RUNTIMES = {"mores": 0.08, "adapter": 0.3, "oft": 2.8}
SPECS: Mapping[str, str] = {
    "none": "none",
    "mores": "mores:rank=1,positions=image:1%,layers=every:2",
    "mores, all tokens and layers": "mores:rank=1,positions=image",
    "adapter": "adapter:bottleneck=16",
    "oft": "oft:block_size=8",
    "ia3": "ia3",
    "lora": "lora:rank=8",
}
ROWS, ROUNDS, NEW_TOKENS = 32, 15, 8


def _runtimes(pipeline: Pipeline, study: Study) -> Outcome:
    questions = _questions(pipeline)[:ROWS]
    added: dict[str, list[float]] = {name: [] for name in SPECS}
    for seed in pipeline.seeds:
        model = pipeline.model(seed, ZERO_SHOT)
        rows = [model.prompts.row(question.prompt, question.images) for question in questions]
        rounds = 2 if pipeline.fast else ROUNDS
        found = measure_overhead(model, tuple(SPECS.values()), rows, NEW_TOKENS, rounds=rounds)
        for name, spec in SPECS.items():
            added[name].append(1e3 * found[spec].added)
    base = "mores"
    cells = [[name, with_interval(own)] for name, own in added.items() if name != "none"]
    return Outcome(
        [Table("Milliseconds per sample of generation, beside none", ["tuning", "added"], cells)],
        [agreement("Added time", base, RUNTIMES, added)],
        {"added_milliseconds": added},
    )


STUDIES = (
    Study(
        "fig8",
        "LLaVA Steering, Figure 8: full attention maps",
        runs_of(PLAIN, MORES, "full"),
        claim("Visual attention is sparse: a few tokens carry the majority of it."),
        f"A scene has 16 visual tokens, four to a digit. {THREE_LAYERS}",
        _fig8,
        more_minutes=0.2,
    ),
    Study(
        "a4",
        "LLaVA Steering, appendix A.4: norms of steered tokens and attention on the image",
        runs_of(PLAIN, MORES, "mores r=4"),
        claim("The norms of steered tokens rise, and with them the attention that they get."),
        f"Edits of the last layer have no gradient and stay the identity. {THREE_LAYERS}",
        _a4,
        more_minutes=0.3,
    ),
    Study(
        "runtimes",
        "LLaVA Steering, appendix A.7: seconds that tuning adds to a sample",
        (),
        Table(
            "The paper: seconds per sample",
            ["tuning", "added"],
            [[name, f"{value:g}"] for name, value in RUNTIMES.items()],
        ),
        "On a model of three layers most of the time is none of the model's; `moresjax analyze "
        "overhead --model DIR` measures your own.",
        _runtimes,
        more_minutes=0.4,
    ),
)
