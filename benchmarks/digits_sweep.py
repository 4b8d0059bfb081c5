"""The search behind the demo's learning rates, on validation handwriting.

    python benchmarks/digits_sweep.py --out runs/rates --seeds 5

Every setting is trained with every seed of the whole pipeline (stages 0, 1 and 2), and is judged by
its mean over them and by its worst seed. `rates.json` goes to `docs/results/`; the choice itself is
written into `configs/digits.py` by hand. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moresjax.configs import digits as recipe
from moresjax.core.errors import UserError
from moresjax.hardware.host import use_huge_pages
from moresjax.studies.pipeline import Finetuning, Pipeline
from moresjax.studies.provenance import provenance

# The connector's rate, by connector-only training; then each method's own beside a connector's.
CONNECTOR = (2e-3, 4e-3, 8e-3)
OWN = {
    "mores r=1": (3e-3, 1e-2, 3e-2),
    "mores r=4": (3e-3, 1e-2, 3e-2),
    "lora r=8": (1e-3, 3e-3, 1e-2),
    "ia3": (1e-2, 3e-2, 1e-1),
    "full": (3e-4, 1e-3, 3e-3),
}
# Why MoReS of rank 4 loses "compare" and "same" with seed 0: the rate of all, of W and b alone, of
# R alone, the warmup, the connector.
CAUSES = (
    {"rate": 3e-2, "connector": 8e-3},
    {"rate": 1e-2, "connector": 8e-3},
    {"rate": 3e-2, "connector": 8e-3, "R": 3e-3},
    {"rate": 3e-3, "connector": 8e-3, "R": 3e-2},
    {"rate": 3e-2, "connector": 8e-3, "warmup": 0.3},
    {"rate": 3e-2, "connector": 4e-3},
)
LOST = ("compare", "same")


def settings() -> Iterator[tuple[str, Mapping[str, float]]]:
    """Methods with their settings, in the order in which they are tried."""
    for rate in CONNECTOR:
        yield "connector only", {"rate": rate, "connector": rate}
    for name, rates in OWN.items():
        for rate in rates:
            yield name, {"rate": rate, "connector": recipe.CONNECTOR_LR}


def config_keys(setting: Mapping[str, float]) -> dict[str, Any]:
    """A setting as config keys."""
    components = f"connector={setting['connector']:g}"
    if "R" in setting:
        components += f";.*rotate={setting['R']:g}"
    keys = {"optimizer.lr": setting["rate"], "optimizer.lr_by_component": components}
    return keys | ({"optimizer.warmup": setting["warmup"]} if "warmup" in setting else {})


def is_chosen(name: str, setting: Mapping[str, float]) -> bool:
    """Whether a setting is that of `configs/digits.py`."""
    config = recipe.get_config(f"stage=finetune,tuning={recipe.METHODS[name]}")
    own = {"rate": config.optimizer.lr, "connector": recipe.CONNECTOR_LR}
    return dict(setting) == own


def main() -> None:
    """Searches, and writes what was found after every setting."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=150)
    args = parser.parse_args()
    use_huge_pages()
    pipeline = Pipeline(args.out, range(args.seeds), "val", scenes=args.scenes)
    pipeline.train_stages()
    results: dict[str, Any] = {
        "made_with": provenance(),
        "split": "val",
        "scenes": args.scenes,
        "seeds": args.seeds,
        "settings": [],
        "causes": [],
    }
    for name, setting in settings():
        means = [found["mean_accuracy"] for found in scores(pipeline, name, setting)]
        if means:
            entry = {"method": name, "setting": setting, "chosen": is_chosen(name, setting)}
            results["settings"].append(entry | {"mean_by_seed": means})
        (args.out / "rates.json").write_text(json.dumps(results, indent=1) + "\n")
    first = dataclasses.replace(pipeline, seeds=(0,))
    for setting in CAUSES:
        for found in scores(first, "mores r=4", setting):
            lost = {name: found["scores"][f"digits_{name}"]["score"] for name in LOST}
            entry = {"setting": setting, "mean": found["mean_accuracy"], **lost}
            results["causes"].append(entry)
        (args.out / "rates.json").write_text(json.dumps(results, indent=1) + "\n")


def scores(pipeline: Pipeline, name: str, setting: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """The evaluation of every seed; none where a run diverged."""
    title = " ".join([name, *(f"{key}={value:g}" for key, value in setting.items())])
    try:
        pipeline.finetune([Finetuning(title, recipe.METHODS[name], config_keys(setting))])
    except UserError as error:
        print(error, flush=True)
        return []
    found = [pipeline.scores(seed, title) for seed in pipeline.seeds]
    print(title, *(f"{each['mean_accuracy']:.3f}" for each in found), flush=True)
    return found


if __name__ == "__main__":
    main()
