"""Shift and steering of the third paper (arXiv 2501.03012) on the digits world.

`paper` of every study holds what the paper claims; the controls beside every number are ours.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from moresjax.analysis.concepts import learn
from moresjax.analysis.grounding import WordFilter, ground_text
from moresjax.analysis.separability import labelled, separability
from moresjax.analysis.shift import CONTROLS as MOVES
from moresjax.analysis.shift import correlation
from moresjax.analysis.shift_study import ShiftOptions, measure_shift
from moresjax.analysis.states import States
from moresjax.analysis.steering import choose, coarse, subsampled
from moresjax.core.types import Tokenizer
from moresjax.data.digits import WORDS, describe, make_scene
from moresjax.data.samples import IMAGE_MARK
from moresjax.evaluation.benchmarks.digits import SEED
from moresjax.evaluation.examples import Example
from moresjax.evaluation.metrics.vqa import normalize_vqa
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.states import task_states
from moresjax.evaluation.steering.ask import Trial
from moresjax.evaluation.steering.build import coarse_plan, fine_plan, first_token_selections
from moresjax.evaluation.steering.run import ALL, BASELINE, SteeringResult, steer
from moresjax.evaluation.steering.tasks import parse_steering_task, split_states
from moresjax.evaluation.tasks import BenchmarkTask, load_tasks
from moresjax.inference.model import Model
from moresjax.reports import plots
from moresjax.reports.concepts import answer_purity
from moresjax.reports.shift import at_one
from moresjax.studies.findings import PairedDifference, compare_with
from moresjax.studies.llava_steering import runs_of
from moresjax.studies.pipeline import ZERO_SHOT, Pipeline
from moresjax.studies.study import Outcome, Study, Table, Values, claim, with_interval

SITE = "llm.block.out"
ALPHAS = (0.5, 1.0, 2.0)
STATES, ASKED = 150, 60  # scenes per family whose states are kept, and that are asked about
CAPTIONS = 300  # scenes whose captions' states make a vector
CONCEPTS, DIGITS = 20, 10  # concepts of a shift; between which fine vectors lead
CONTROLS = ("random", "shuffled", "reversed")
ANSWER_CONCEPTS = 12  # of which it is asked whether they are answers
FEW = 10  # states of each side that a vector needs
NUMBERS = frozenset(normalize_vqa(word) for word in WORDS)
STYLE, CAPTION_TOKENS = "seven;eight;nine", 9  # words that captions are steered to


# Shift ------------------------------------------------------------------------------------------


def _shift(pipeline: Pipeline, study: Study) -> Outcome:
    limit = STATES if not pipeline.fast else 20
    found: dict[str, dict[str, list[float]]] = {run.name: {} for run in study.runs}
    for seed in pipeline.seeds:
        base = _final_states(pipeline.model(seed, ZERO_SHOT), limit)
        size = min(CONCEPTS, len(base))
        concepts = learn(base, "kmeans", size, seed=seed)
        for run in study.runs:
            model = pipeline.model(seed, run.name)
            tuned = _final_states(model, limit)
            own = learn(tuned, "kmeans", size, seed=seed)
            numbers = _shift_numbers(base, tuned, concepts, own, seed, model)
            for name, value in (numbers | _answer_concepts(model, tuned, seed)).items():
                found[run.name].setdefault(name, []).append(value)
    moved = {name: {move: own[move] for move in MOVES} for name, own in found.items()}
    head = ["tuned with", *MOVES, "own from global", "concepts improved", "best alpha"]
    rows = [
        [
            name,
            *(with_interval(own[move]) for move in MOVES),
            PairedDifference.of(own["own"], own["global"]).points,
            with_interval(own["improved"], 2),
            with_interval(own["best_alpha"], 2),
        ]
        for name, own in found.items()
    ]
    sentences = [
        compare_with("global", f"Cosine with the concepts of {name}", values)
        for name, values in moved.items()
    ]
    by_seed = zip(*(own["r"] for own in found.values()), strict=True)
    together = [float(np.mean(values)) for values in by_seed]
    sentences.append(
        "Correlation of how consistent a concept's shifts are with how much they recover, mean "
        f"over the models and seeds: {with_interval(together, 2)}; the paper reports a positive "
        "one. With k-means, own shifts of strength 1 are nearly the best by construction: what "
        "they have beyond global and shuffled ones is what concepts add."
    )
    words = {name: {move: own[f"words {move}"] for move in MOVES} for name, own in found.items()}
    sentences += [
        compare_with("global", f"Words shared with the concepts of {name}", values)
        for name, values in words.items()
    ]
    title = "Cosine of concepts with those of the tuned model, moved by a shift of strength 1"
    return Outcome([Table(title, head, rows), *_word_tables(found)], sentences, found)


def _word_tables(found: dict[str, dict[str, list[float]]]) -> list[Table]:
    """The words that moved concepts share with tuned ones, and how far concepts are answers."""
    title = "T-Overlap: share of the 15 first words of tuned concepts that moved ones have"
    rows = [
        [name, *(with_interval(own[f"words {move}"]) for move in MOVES)]
        for name, own in found.items()
    ]
    shared = Table(title, ["tuned with", *MOVES], rows)
    title = f"{ANSWER_CONCEPTS} concepts of the tuned model as answers"
    head = ["tuned with", "purity by answer", "concepts whose first word is their answer"]
    rows = [
        [name, with_interval(own["purity"]), with_interval(own["named"], 1)]
        for name, own in found.items()
    ]
    return [shared, Table(title, head, rows)]


def _final_states(model: Model, limit: int) -> States:
    return task_states(model, ["digits"], split="train", limit=limit, site="llm.norm.out")


@dataclasses.dataclass(frozen=True)
class EveryToken(WordFilter):
    """Every token of the digits world is a word; English stop words have most of its numbers."""

    def describe(self) -> dict[str, str]:
        """The filter, as results name it."""
        return {"words": "all tokens", "stop_words": "none"}

    def keeper(self, tokenizer: Tokenizer) -> Callable[[int], str]:
        """A function from a token to its text."""
        return lambda token: tokenizer.decode([token], skip_special_tokens=True).strip()


def _answer_concepts(model: Model, states: States, seed: int) -> dict[str, float]:
    """How far a few concepts of a model's answers are answers, by their samples and by its head."""
    size = min(ANSWER_CONCEPTS, len(states))
    concepts = learn(states, "kmeans", size, seed=seed)
    answers = [normalize_vqa(row["prediction"] or "") for row in states.index]
    found = answer_purity(concepts.assign(states), answers, size)
    words = ground_text(model, concepts, words=1, word_filter=EveryToken()).words
    pairs = zip(words, found["most_frequent"], strict=True)
    named = sum([normalize_vqa(word) for word in own] == [answer] for own, answer in pairs)
    return {"purity": found["purity"], "named": float(named)}


def _shift_numbers(
    base: States, tuned: States, concepts: Any, own: Any, seed: int, model: Model
) -> dict:
    """A seed's numbers of one tuned model, whose head reads the words."""
    options = ShiftOptions(seed=seed, word_filter=EveryToken())
    found = measure_shift(base, tuned, concepts, own, options, model)
    recovered = at_one(found)
    best = max(found["recovery"]["own"], key=lambda row: row["cosine"])
    names = "pairwise_cosine", "relative_gain"
    r = correlation(*([row[name] for row in found["concepts"]] for name in names))["r"]
    numbers = {name: row["cosine"] for name, row in recovered.items()}
    numbers |= {f"words {name}": row["t_overlap"] / 100 for name, row in recovered.items()}
    return numbers | {
        "improved": recovered["own"]["improved"],
        "best_alpha": best["alpha"],
        "r": float("nan") if r is None else r,
    }


# Steering ---------------------------------------------------------------------------------------


def _steering(pipeline: Pipeline, study: Study) -> Outcome:
    (run,) = study.runs
    kept, asked = (STATES, ASKED) if not pipeline.fast else (20, 5)
    tasks = load_tasks(["digits"], None, asked, pipeline.split)
    every = [
        steering_numbers(pipeline.model(seed, run.name), tasks, kept, "yes", "no", seed)
        for seed in pipeline.seeds
    ]
    scenes = (CAPTIONS, ASKED) if not pipeline.fast else (20, 5)
    for seed, own in zip(pipeline.seeds, every, strict=True):
        captioner = pipeline.model(seed, ZERO_SHOT)
        own |= caption_numbers(captioner, caption_task(pipeline.split, scenes[1]), scenes[0], seed)
    values = {name: [float(one[name]) for one in every] for name in every[0]}
    layers = sorted({int(n.split()[2]) for n in values if n.startswith("success layer")})
    by_layer: Values = {f"layer {n}": values[f"success layer {n}"] for n in layers}
    own = {"yes>no": values["success 1"]}
    own |= {name: values[f"success {name}"] for name in CONTROLS}
    probes: Values = {f"layer {n}": values[f"probe layer {n}"] for n in layers}
    strengths = [
        [f"{alpha:g}", *(with_interval(values[f"{key} {alpha:g}"]) for key in ("success", "kept"))]
        for alpha in ALPHAS
    ]
    rows = [[name, with_interval(by_layer[name]), with_interval(probes[name])] for name in by_layer]
    tables = [
        Table("Steered at the last layer", ["alpha", "yes became no", "others kept"], strengths),
        Table("By layer, alpha 1", ["", "yes became no", "probe tells yes from no"], rows),
        Table(
            "Controls at the last layer, alpha 1",
            ["vector", "yes became no"],
            [[name, with_interval(x)] for name, x in own.items()],
        ),
        _vector_table(values),
        _caption_table(values),
    ]
    first, last = f"layer {layers[0]}", f"layer {layers[-1]}"
    sentences = [
        compare_with("random", "Share of yes that became no", own),
        compare_with(first, "Share of yes that became no", {n: by_layer[n] for n in (first, last)}),
        f"Of {DIGITS} digits, {with_interval(values['digits'], 1)} are the only main answer of a "
        "fine vector between concepts (kept by the first new token, from stored states).",
    ]
    sentences += _caption_sentences(values)
    drawn = {
        name: (layers, [float(np.mean(own[f"layer {n}"])) for n in layers])
        for name, own in (("yes became no", by_layer), ("probe, test states", probes))
    }
    figure = plots.lines(drawn, ("layer", "share"))
    alt = "success of steering and accuracy of probes by layer, mean over seeds"
    return Outcome(tables, sentences, values, {alt: figure})


def _vector_table(values: Values) -> Table:
    """Vectors of other answers, and of few states."""
    rows = [
        [f"yes became no, {FEW} states of each", with_interval(values[f"success n={FEW}"])],
        ["one became three", with_interval(values["success one>three"])],
        ["answers that are numbers, before", with_interval(values["numbers before"])],
        ["steered from yes and no to numbers", with_interval(values["numbers after"])],
    ]
    return Table("Other vectors at the last layer, alpha 1", ["", "share"], rows)


def steering_numbers(
    model: Model, tasks: Sequence[BenchmarkTask], kept: int, source: str, target: str, seed: int
) -> dict[str, float]:
    """What a coarse vector does to a model's answers at every layer and strength, with controls.

    Args:
      model: The model.
      tasks: What it is asked.
      kept: Scenes of each family of training handwriting whose states make the vectors.
      source: The answer to steer away from.
      target: The answer to steer to.
      seed: Seeds controls, probes and concepts.

    Raises:
      UserError: The model never gives one of the two answers.
    """
    store = task_states(model, ["digits"], split="train", limit=kept, site=SITE)
    steering = parse_steering_task(f"answers:{source}>{target}")
    sides = split_states(store, steering)
    plan = coarse_plan(*sides, steering.name, alphas=ALPHAS, seed=seed)
    layers = store.layers
    last = layers[-1]
    more = _more_trials(store, last, (source, target), seed)
    result = steer(model, tasks, [*plan.trials, *more.values()], steering)
    numbers = _more_numbers(result, more, (source, target))
    for layer in layers:
        row = result.row(f"{steering.name}@{layer}", task=ALL, alpha=1.0)
        numbers[f"success layer {layer}"] = row["success"]
    for alpha in ALPHAS:
        row = result.row(f"{steering.name}@{last}", task=ALL, alpha=alpha)
        numbers |= {f"success {alpha:g}": row["success"], f"kept {alpha:g}": row["kept"]}
    for control in CONTROLS:
        numbers[f"success {control}"] = result.row(control, task=ALL)["success"]
    chosen, labels = labelled(store, "prediction")
    rows = [n for n, label in enumerate(labels) if label in (source, target)]
    probes = separability(chosen.take(rows), [labels[n] for n in rows], seed=seed)
    numbers |= {f"probe layer {probe.layer}": probe.test for probe in probes}
    return numbers | {"digits": _reached_digits(model, store, last, seed)}


def _more_trials(store: States, layer: int, sides: tuple[str, str], seed: int) -> dict[str, Trial]:
    """Vectors of a few states, from one digit to another, and from other answers to numbers."""
    answers = [normalize_vqa(row["prediction"] or "") for row in store.index]
    states = store.matrix(SITE, layer)

    def of(wanted: Collection[str]) -> np.ndarray:
        return states[[answer in wanted for answer in answers]]

    one, three = (normalize_vqa(word) for word in ("one", "three"))
    source, target = (of({normalize_vqa(side)}) for side in sides)
    others = {*map(normalize_vqa, sides)}
    few = min(FEW, len(source), len(target))
    vectors = {"few": subsampled(source, target, [few], draws=1, seed=seed)[few][0]}
    for name, away, to in (("one>three", {one}, {three}), ("number", others, NUMBERS)):
        if len(of(away)) and len(of(to)):
            vectors[name] = coarse(of(away), of(to))
    return {name: Trial(name, vector, layer, site=SITE) for name, vector in vectors.items()}


def _more_numbers(
    result: SteeringResult, trials: dict[str, Trial], sides: tuple[str, str]
) -> dict[str, float]:
    """What these vectors did; nan for one that there are no answers for."""

    def said(key: str) -> list[str]:
        return [normalize_vqa(text) for own in result.answers.values() for text in own[key]]

    def became(name: str, source: str, target: str) -> float:
        if name not in trials:
            return float("nan")
        pairs = zip(said(BASELINE), said(trials[name].key), strict=True)
        away, to = normalize_vqa(source), normalize_vqa(target)
        after = [steered == to for before, steered in pairs if before == away]
        return float(np.mean(after)) if after else float("nan")

    before = [answer in NUMBERS for answer in said(BASELINE)]
    key = trials["number"].key if "number" in trials else BASELINE
    return {
        f"success n={FEW}": became("few", *sides),
        "success one>three": became("one>three", "one", "three"),
        "numbers before": float(np.mean(before)),
        "numbers after": float(np.mean([answer in NUMBERS for answer in said(key)])),
    }


def _reached_digits(model: Model, store: States, layer: int, seed: int) -> float:
    """How many digits some fine vector leads to and to nothing else."""
    rows = [
        number
        for number, row in enumerate(store.index)
        if normalize_vqa(row["prediction"] or "") in NUMBERS
    ]
    if len(rows) < DIGITS:
        return 0.0
    states = store.take(rows)
    concepts = learn(states, "kmeans", DIGITS, seed=seed, site=SITE, layer=layer)
    plan = fine_plan(concepts)
    selections = first_token_selections(model, states, plan, normalize_vqa)
    kept = choose(selections, targets=1, keep=len(selections))
    return float(len({selections[name].targets[0] for name in kept} & NUMBERS))


# Captions ---------------------------------------------------------------------------------------


def caption_task(split: str, scenes: int) -> BenchmarkTask:
    """Images of the digits world with five descriptions each, which name the cells in other orders.

    >>> example = caption_task("test", 1).examples[0]
    >>> len(example.answer), len(example.answer[0].split())
    (5, 8)
    """
    examples = []
    for number in range(scenes):
        rng = np.random.default_rng((SEED, number, 3))  # other scenes than questions are about
        scene = make_scene(rng, split)
        references = [describe(scene.digits, rng) for _ in range(5)]
        name = f"caption-{split}-{number}"
        examples.append(Example(name, IMAGE_MARK, references, (scene.image,)))
    options = {"max_new_tokens": CAPTION_TOKENS, "scorer": caption_scorer}
    return BenchmarkTask("digits_caption", examples, **options)


def caption_numbers(model: Model, task: BenchmarkTask, kept: int, seed: int) -> dict[str, float]:
    """What steering captions to a list of words does to these words and to CIDEr.

    The vector leads from the mean state of captions to the states that give one of the words.

    Args:
      model: A model that describes images.
      task: The images that it describes.
      kept: The scenes of training handwriting whose captions make the vector.
      seed: Seeds the controls.

    Raises:
      UserError: The model never says one of the words.
    """
    steering = parse_steering_task(f"style:{STYLE}")
    items = [
        {"id": example.id, "prompt": example.prompt, "images": example.images}
        for example in caption_task("train", kept).examples
    ]
    last = model.config.llm.num_layers - 1
    source, target = (
        model.states(items, site=SITE, layers=last, take=take, max_new_tokens=CAPTION_TOKENS)
        for take in ("answer", f"token({STYLE})")
    )
    plan = coarse_plan(source, target, steering.name, alphas=ALPHAS, seed=seed)
    result = steer(model, [task], plan.trials, steering)
    baseline = result.row(BASELINE)
    images = len(task.examples)
    numbers = {"caption cider 0": baseline["score"]}
    for row in result.rows:
        name = {steering.name: f"{row.get('alpha', 0):g}"}.get(row["vector"], row["vector"])
        if row is not baseline and name != "zero":
            numbers["caption words 0"] = row["words"][0] / images
            numbers[f"caption words {name}"] = row["words"][1] / images
            numbers[f"caption cider {name}"] = row["score"]
    return numbers


def _caption_table(values: Values) -> Table:
    """Words of the list in a caption and CIDEr by strength, and of the controls."""
    names = ["0", *(f"{alpha:g}" for alpha in ALPHAS), *CONTROLS]
    rows = [
        [name, *(with_interval(values[f"caption {key} {name}"], 2) for key in ("words", "cider"))]
        for name in names
    ]
    words = STYLE.replace(";", ", ")
    head = ["alpha, or control", "of these words in a caption", "CIDEr"]
    return Table(f"Captions steered towards {words}, at the last layer", head, rows)


def _caption_sentences(values: Values) -> list[str]:
    """What steering does to captions: words at strength 1, and CIDEr from there to 2."""
    words: Values = {name: values[f"caption words {name}"] for name in ("0", "1", "random")}
    cider: Values = {name: values[f"caption cider {name}"] for name in ("1", "2", "0")}
    return [
        compare_with("0", "Words of the list in a caption, by strength,", words),
        compare_with("1", "CIDEr of captions, by strength,", cider),
    ]


STUDIES = (
    Study(
        "shift",
        "Representation shift, Figures 5 to 8: recovering tuned concepts",
        runs_of("connector only", "lora r=8", "full"),
        claim(
            "Shifting a concept by the mean shift of its samples makes it more like the tuned "
            "model's concept, the more so the more consistent these shifts are."
        ),
        "20 concepts of the answers to seven families of questions, after stage 1 and after stage "
        "2. Three layers of 96 features say nothing about LLaVA-1.5.",
        _shift,
        more_minutes=0.3,
    ),
    Study(
        "steering",
        "Representation shift, Tables 1, 2 and 4 and Figure 13: steering without training",
        runs_of("full"),
        claim(
            "A difference of mean states changes answers from yes to no and leaves others; it "
            "works best at the last layer, where a probe tells the answers apart. Captions can be "
            "steered to a style, and get worse beyond strength 1."
        ),
        "Yes and no, and ten digits, in a model of three layers; the captions are those of the "
        "model after stage 1, and their style is which digits they name.",
        _steering,
        more_minutes=0.8,
    ),
)
