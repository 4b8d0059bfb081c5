"""The demo's page about hidden states: concepts of answers, and answers that a vector steers."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moresjax.analysis.concepts import learn
from moresjax.analysis.grounding import ground_images
from moresjax.analysis.states import States
from moresjax.evaluation.metrics.vqa import normalize_vqa
from moresjax.evaluation.states import task_states
from moresjax.evaluation.steering.build import coarse_plan
from moresjax.evaluation.steering.run import ALL, BASELINE, steer
from moresjax.evaluation.steering.tasks import parse_steering_task, split_states
from moresjax.evaluation.tasks import load_tasks
from moresjax.inference.model import Model
from moresjax.reports import plots
from moresjax.reports.concept_figures import contact_sheet
from moresjax.reports.html import figure_uri, render

SITE, NORMED = "llm.block.out", "llm.norm.out"  # steered; read for concepts, as in the paper
KEPT, ASKED = 40, 15  # scenes of each family whose states are kept, and that are asked about
CONCEPTS, WORDS, SAMPLES = 12, 4, 6
ALPHAS = (0.5, 1.0, 2.0)


def states_page(model: Model, out: Path, name: str, *, split: str, fast: bool) -> dict[str, Any]:
    """Learns concepts, steers answers at the last layer, and writes `states.html`.

    Args:
      model: The model.
      out: The folder of the page.
      name: What the page calls the model.
      split: The handwriting that is asked about; states are of training handwriting.
      fast: Whether a few scenes are enough.

    Returns:
      The numbers of the page: `concepts`, a row for each, and `steering`, a row for each vector and
      strength; empty where the model always answers alike.
    """
    kept, asked = (5, 2) if fast else (KEPT, ASKED)
    store = task_states(model, ["digits"], split="train", limit=kept, site=[SITE, NORMED])
    layer = model.config.llm.num_layers - 1
    concepts, sheet = _concepts(model, store, kept)
    steering = _steered(model, store, layer, asked, split)
    found = {"model": name, "layer": layer, "states": len(store), "concepts": concepts}
    found |= {"steering": steering}
    figures = {"sheet": figure_uri(sheet)}
    if steering:
        own = [row for row in steering if not row["control"]]
        series = {
            label: ([x["alpha"] for x in own], [np.nan if x[v] is None else x[v] for x in own])
            for label, v in (("became the target", "success"), ("others kept", "kept"))
        }
        figures["strengths"] = figure_uri(plots.lines(series, ("alpha", "share of answers")))
    render("demo_states.html.j2", out / "states.html", found=found, figures=figures)
    return found


def _concepts(model: Model, store: States, kept: int) -> tuple[list, Any]:
    """Concepts of the states with their words and answers, and their contact sheet."""
    d = learn(store, "kmeans", min(CONCEPTS, len(store)), seed=0, site=NORMED, layer=0)
    owner = d.assign(store)
    # Every token of this world is a word; filters for English would drop most of its numbers.
    logits = np.asarray(model.mllm.llm.logits(jnp.asarray(d.vectors, jnp.float32)))
    words = [[model.prompts.spell([i]) for i in own[:WORDS]] for own in np.argsort(-logits)]
    nearest = ground_images(d, store, SAMPLES).rows
    answers = [row["prediction"] for row in store.index]
    rows = []
    for k in range(len(d.vectors)):
        counts = Counter(np.asarray(answers, object)[owner == k].tolist())
        answer, most = counts.most_common(1)[0] if counts else ("", 0)
        rows.append({"words": list(words[k]), "answer": answer, "n": counts.total(), "of": most})
    examples = {
        f"{task.name}/{example.id}": example
        for task in load_tasks(["digits"], None, kept, "train")
        for example in task.examples
    }
    names = [[[str(store.index[n]["id"])] for n in own] for own in nearest]
    under = [[answers[n] for n in own] for own in nearest]
    captions = [f"{row['answer']}: {row['of']} of {row['n']}" for row in rows]
    sheet = contact_sheet(words, names, lambda name: examples[name].images[0], captions, under)
    return rows, sheet


def _steered(model: Model, store: States, layer: int, asked: int, split: str) -> list[dict]:
    """What a vector from the most frequent "yes or no" to the other does, beside its controls."""
    counts = Counter(normalize_vqa(row["prediction"] or "") for row in store.index)
    pair = ["yes", "no"] if {"yes", "no"} <= {*counts} else [x for x, _ in counts.most_common(2)]
    if len(pair) < 2 or not all(pair):
        return []
    steering = parse_steering_task("answers:" + ">".join(pair))
    plan = coarse_plan(
        *split_states(store, steering), steering.name, layers=[layer], alphas=ALPHAS, seed=0
    )
    result = steer(model, load_tasks(["digits"], None, asked, split), plan.trials, steering)
    numbers = ("alpha", "source", "success", "kept", "changed")
    return [
        {"vector": row["vector"], "control": row["vector"] != steering.name}
        | {key: row[key] for key in numbers}
        for row in result.rows
        if row["task"] == ALL and row["vector"] != BASELINE
    ]
