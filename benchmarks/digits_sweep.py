"""The search behind the demo's learning rates: every method, equal budget, validation handwriting.

    python benchmarks/digits_sweep.py --out runs/sweep --seeds 2

Needs the stages 0 and 1 of a demo in `--base`. The connector's learning rate is chosen for
connector-only training first; each method then tries four learning rates of its own beside it.
Prints a table; the winners are written into `configs/digits.py` by hand.
"""

import argparse
import json
from pathlib import Path

from moresjax.configs import digits as recipe
from moresjax.evaluation.run import evaluate
from moresjax.hardware.host import use_huge_pages
from moresjax.inference.load import load
from moresjax.training.loop import train

CONNECTOR = (1e-3, 2e-3, 4e-3, 8e-3)
OWN = {
    "mores r=1": (3e-3, 1e-2, 3e-2, 1e-1),
    "mores r=4": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora r=8": (1e-3, 3e-3, 1e-2, 3e-2),
    "ia3": (3e-3, 1e-2, 3e-2, 1e-1),
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
}


def score(base: Path, out: Path, spec: str, seed: int, lr: float, connector: float) -> float:
    """Mean validation accuracy of one run; a finished run is not repeated."""
    done = out / "score.json"
    if done.is_file():
        return json.loads(done.read_text())
    config = recipe.get_config(f"stage=finetune,tuning={spec},seed={seed}")
    parts = {"llm": "llm", "vision": "vit", "connector": "pretrain"}
    init = {part: str((base / stage).resolve()) for part, stage in parts.items()}
    rates = {"lr": lr, "lr_by_component": f"connector={connector}"}
    config.update({"init": init, "optimizer": rates})
    train(config, out)
    result = evaluate(load(out).merge(), ["digits"], split="val", title=out.name)
    assert result.mean_accuracy is not None
    done.write_text(json.dumps(result.mean_accuracy))
    return result.mean_accuracy


def main() -> None:
    """Searches and prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--connector", type=float, help="skip the first search")
    args = parser.parse_args()
    use_huge_pages()

    def mean(name: str, spec: str, lr: float, connector: float) -> float:
        scores = [
            score(args.base, args.out / f"{name}-{lr:g}-{connector:g}-{s}", spec, s, lr, connector)
            for s in range(args.seeds)
        ]
        value = sum(scores) / len(scores)
        spread = " ".join(f"{x:.3f}" for x in scores)
        print(
            f"{name:15s} lr {lr:7.4f} connector {connector:7.4f}  {value:.3f}  ({spread})",
            flush=True,
        )
        return value

    connector = args.connector
    if connector is None:
        tried = {lr: mean("connector-only", "none", lr, lr) for lr in CONNECTOR}
        connector = max(tried, key=lambda lr: tried[lr])
    for name, rates in OWN.items():
        tried = {
            lr: mean(name.replace(" ", "-"), recipe.METHODS[name], lr, connector) for lr in rates
        }
        print(f"{name}: {max(tried, key=lambda lr: tried[lr]):g}", flush=True)


if __name__ == "__main__":
    main()
