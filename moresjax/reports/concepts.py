"""A dictionary of concepts with its words, samples and quality: numbers and a contact sheet."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moresjax._version import __version__
from moresjax.analysis.concepts import learn, stability
from moresjax.analysis.grounding import (
    ClipScorer,
    ReadingModel,
    WordFilter,
    clip_scores,
    ground_images,
    ground_text,
    random_words,
    word_overlap,
)
from moresjax.analysis.sparse_autoencoder import SAEOptions
from moresjax.analysis.states import States
from moresjax.core.errors import UserError
from moresjax.core.folders import check_new, new_folder
from moresjax.reports import plots
from moresjax.reports.concept_figures import Pictures, contact_sheet, file_pictures

SHEET = "concepts.png"


def concepts_report(
    states: States,
    out: str | Path,
    *,
    method: str = "kmeans",
    concepts: int = 20,
    seed: int = 0,
    site: str | None = None,
    layer: int | None = None,
    sae: SAEOptions | None = None,
    model: ReadingModel | None = None,
    words: int = 10,
    candidates: int = 50,
    norm: str = "auto",
    word_filter: WordFilter | None = None,
    samples: int = 5,
    seeds: Sequence[int] = (),
    pictures: Pictures | None = None,
    scorer: ClipScorer | None = None,
) -> dict[str, Any]:
    """Learns a dictionary and writes it, with what its concepts mean, into a new folder.

    Args:
      states: The states.
      out: The folder: `concepts.npz`, `concepts.json`, `concepts.png`.
      method: As in `learn`.
      concepts: K.
      seed: The seed of every draw.
      site: The site of the states, where there are several.
      layer: The layer, likewise.
      sae: The settings of `sae`.
      model: Its head reads the concepts' words; without it there are none.
      words: Words of each concept.
      candidates: The tokens that they are sought among.
      norm: As in `ground_text`.
      word_filter: Which tokens are words.
      samples: Most activating samples of each concept.
      seeds: Of dictionaries to compare for stability; none for no comparison.
      pictures: Gives the pictures of images; default: files.
      scorer: Gives CLIP's similarities, for CLIPScore.

    Returns:
      The content of `concepts.json`.

    Raises:
      UserError: As `learn` and `ground_text`, and for a folder that is not empty.
    """
    check_new(Path(out), "concepts")
    check_model(states, model)
    options = {"site": site, "layer": layer, "sae": sae}
    d = learn(states, method, concepts, seed=seed, **options)
    facts: dict[str, Any] = {"version": __version__, "method": method, **d.facts}
    facts |= {"sizes": d.sizes.tolist()}
    found = ground_images(d, states, samples)
    facts["images"] = found.to_dict()
    activations = d.project(states)
    rows = [row for row in states.index if row.get("found", True)]
    if answers := [row["prediction"] for row in rows if row.get("prediction") is not None]:
        facts["answers"] = answer_purity(activations.argmax(1), answers, concepts)
    texts: list[list[str]] = []
    if model is not None:
        grounded = ground_text(
            model, d, words=words, candidates=candidates, norm=norm, word_filter=word_filter
        )
        size = d.vectors.shape[1]
        chance = random_words(model, grounded, size=size, seed=seed, word_filter=word_filter)
        texts = grounded.words
        facts["text"] = grounded.to_dict()
        facts["word_overlap"] = {"concepts": word_overlap(texts), "random": word_overlap(chance)}
        if scorer is not None:
            names = [str((row.get("images") or [""])[0]) for row in rows]
            both = {"concepts": texts, "random": chance}
            facts["clip_score"] = {
                name: clip_scores(own, activations, names, scorer) for name, own in both.items()
            }
    if seeds:
        facts["stability"] = stability(states, method, concepts, seeds=seeds, **options)
    with new_folder(out, "concepts") as folder:
        d.write(folder, facts)
        under = [[str(states.index[n].get("prediction", "")) for n in own] for own in found.rows]
        captions = [f"{k}: {size} samples" for k, size in enumerate(d.sizes)]
        sheet = contact_sheet(texts, found.images, pictures or file_pictures(), captions, under)
        plots.save(sheet, folder / SHEET)
    return facts


def check_model(states: States, model: ReadingModel | None, *others: States) -> None:
    """Refuses a model that none of the states is of.

    Raises:
      UserError: Their fingerprints differ.
    """
    known = [one.meta.get("model") for one in (states, *others)]
    own = getattr(model, "fingerprint", None)
    if own is not None and None not in known and own not in known:
        raise UserError(
            f"these states are of a model with fingerprint {known[0]}, --model has {own}; its head "
            "reads other words in them"
        )


def answer_purity(
    labels: Int[np.ndarray, " N"], answers: Sequence[str], concepts: int
) -> dict[str, Any]:
    """How far concepts are answers.

    >>> answer_purity(np.array([0, 0, 0, 1]), ["one", "one", "two", "two"], 2)
    {'purity': 0.75, 'most_frequent': ['one', 'two'], 'share': [0.6666666666666666, 1.0]}

    Args:
      labels: The concept of each sample.
      answers: What the model answered.
      concepts: K.

    Returns:
      `purity`, the share of samples whose answer is the most frequent one of their concept; for
      each concept this answer and its share, None where it has no samples.
    """
    each: list[Counter[str]] = [Counter() for _ in range(concepts)]
    for answer, label in zip(answers, labels, strict=True):
        each[label][answer] += 1
    first = [counts.most_common(1)[0] if counts else (None, 0) for counts in each]
    return {
        "purity": sum(count for _, count in first) / len(answers),
        "most_frequent": [answer for answer, _ in first],
        "share": [n / c.total() if c else None for (_, n), c in zip(first, each, strict=True)],
    }


def concept_lines(facts: dict[str, Any]) -> list[str]:
    """The dictionary in a line for each concept."""
    texts = facts.get("text", {}).get("words")
    explained = "" if facts["explained"] is None else f", {facts['explained']:.1%} explained"
    lines = [f"{facts['method']}: {len(facts['sizes'])} concepts of {facts['n']} states{explained}"]
    for k, size in enumerate(facts["sizes"]):
        own = ", ".join(texts[k]) if texts else ""
        lines.append(f"  {k:3d} {size:7d}  {own}")
    if "answers" in facts:
        lines.append(f"purity by answer: {facts['answers']['purity']:.3f}")
    if overlap := facts.get("word_overlap"):
        shown = [f"{n} {'-' if x is None else format(x, '.3f')}" for n, x in overlap.items()]
        lines.append(f"overlap of words: {', '.join(shown)}")
    for name, scores in facts.get("clip_score", {}).items():
        both = f"{scores['top1']:.3f}, best three {scores['top3']:.3f}"
        lines.append(f"CLIPScore of {name} words: {both}")
    if found := facts.get("stability"):
        lines.append(
            f"stability over seeds {found['seeds']}: cosine {found['cosine']:.3f} (centred "
            f"{found['centred_cosine']:.3f}), adjusted Rand {found['adjusted_rand']:.3f}"
        )
    if texts is None:
        lines.append("words: none without a model (--model)")
    return lines
