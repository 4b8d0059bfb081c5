"""Writes the tables and findings of the documentation from the result files in `docs/results/`.

    python docs/tables.py            # after new results were put there
    python docs/tables.py --check    # exit code 1 where a page says something else

A page holds a block between `<!-- FILE.BLOCK -->` and `<!-- end -->`: the block BLOCK of
`docs/results/FILE.json`. `moresjax demo` writes `demo.json` (as `results.json`),
`benchmarks/digits_sweep.py` writes `rates.json`, `moresjax study NAME` writes `NAME.json`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from moresjax.reports.tables import markdown_table as table
from moresjax.studies.demo import findings, plain_method
from moresjax.studies.findings import PairedDifference
from moresjax.studies.provenance import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- ([\w-]+)\.(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

FROM = "from_connector_only"

Results = Mapping[str, Any]


def share(value: float) -> str:
    """A share without its leading zero."""
    return f"{value:.3f}".removeprefix("0")


def difference(entry: Mapping[str, Any], seeds: int) -> str:
    """A paired difference in points, in bold where it is shown."""
    bounds = entry["interval95"]
    found = PairedDifference(entry["mean"], None if bounds is None else tuple(bounds), seeds)
    return f"**{found.points}**" if found.direction else found.points


def accuracy(results: Results) -> str:
    """Accuracy of every method by family, with paired differences from connector-only training."""
    families, majority = results["families"], results["majority"]
    head = ["", "LLM parameters", "mean", "from connector only", *families]
    plain = plain_method(results["methods"])
    most = [share(fmean(majority.values())), "", *(share(majority[f]) for f in families)]
    rows = [["most frequent answer", "", *most]]
    for name, m in results["methods"].items():
        mean, bounds = share(m["mean"]), m["mean_interval95"]
        if bounds:
            mean += f" [{share(bounds[0])}, {share(bounds[1])}]"
        own = "" if name == plain else difference(m[FROM]["mean"], results["seeds"])
        scores = [share(m["accuracy"][family]) for family in families]
        rows.append([name, f"{m['trainable_in_llm']:,}", mean, own, *scores])
    return table(head, rows)


def seeds(results: Results) -> str:
    """Mean accuracy of every method and seed."""
    head = ["seed", *map(str, range(results["seeds"]))]
    rows = [[n, *map(share, m["mean_by_seed"])] for n, m in results["methods"].items()]
    return table(head, rows)


def attention(results: Results) -> str:
    """How much attention goes to the image."""
    plain = plain_method(results["methods"])
    layers = len(next(iter(results["methods"].values()))["attention"]["share"])
    lmar = [f"LMAR, layer {number}" for number in range(layers)]
    rows = []
    for name, m in results["methods"].items():
        own = "" if name == plain else difference(m[FROM]["visual_share"], results["seeds"])
        ratios = [f"{ratio:.2f}" for ratio in m["attention"]["lmar_of_means"]["text"]]
        rows.append([name, share(fmean(m["visual_share_by_seed"])), own, *ratios])
    return table(["", "image share", "from connector only", *lmar], rows)


def sentences(results: Results) -> str:
    """What the numbers say."""
    return "\n".join(f"- {sentence}" for sentence in findings(results))


def made(results: Results) -> str:
    """What the numbers were made with."""
    seeds = results["seeds"]
    asked = f"{results['split']} handwriting, {results['scenes']} scenes per family and seed"
    return f"{asked}, seeds 0 to {seeds - 1}; {describe(results['made_with'])}."


def rates(results: Results) -> str:
    """Mean accuracy of every setting that was tried, with the least of its seeds."""
    head = ["method", "setting", "mean", "least", "by seed"]
    rows = []
    for entry in results["settings"]:
        values = entry["mean_by_seed"]
        setting = named(entry["setting"])
        if entry["chosen"]:
            setting = f"**{setting}**"
        by_seed = " ".join(map(share, values))
        rows.append([entry["method"], setting, share(fmean(values)), share(min(values)), by_seed])
    return table(head, rows)


def causes(results: Results) -> str:
    """What MoReS of rank 4 keeps of two families of questions with seed 0, by setting."""
    head = ["setting", "mean", "compare", "same"]
    names = ("mean", "compare", "same")
    return table(
        head,
        [[named(e["setting"]), *(share(e[name]) for name in names)] for e in results["causes"]],
    )


def named(setting: Mapping[str, float]) -> str:
    """A setting in words."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def miniature(results: Results) -> str:
    """Everything that a study found: sentences, tables, and what they were made with."""
    lines = [f"- {sentence}" for sentence in results["findings"]]
    for own in results["tables"][:-1]:  # the last is the paper's
        lines += ["", f"{own['title']}:", "", table(own["head"], own["rows"])]
    seeds = results["seeds"]
    facts = f"Seeds 0 to {seeds - 1} of the whole pipeline; {describe(results['made_with'])}."
    return "\n".join([*lines, "", facts])


def paper(results: Results) -> str:
    """The paper's own table, or its claim."""
    own = results["tables"][-1]
    return f"{own['title']}:\n\n{table(own['head'], own['rows'])}"


BLOCKS: Mapping[str, Callable[[Results], str]] = {
    "accuracy": accuracy,
    "seeds": seeds,
    "attention": attention,
    "findings": sentences,
    "made": made,
    "rates": rates,
    "causes": causes,
    "miniature": miniature,
    "paper": paper,
}


def pages() -> list[Path]:
    """The pages that may hold a block."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(text: str, results: Path = RESULTS) -> str:
    """A page with its blocks as the result files have them."""

    def block(found: re.Match) -> str:
        start, file, name, end = found.groups()
        path = results / f"{file}.json"
        if name not in BLOCKS or not path.is_file():
            raise SystemExit(f"there is no block {name} of {path}")
        return f"{start}{BLOCKS[name](json.loads(path.read_text()))}\n{end}"

    return BLOCK.sub(block, text)


def stale() -> dict[Path, str]:
    """By page that says something else what it ought to say."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    return {page: new for page, text in texts.items() if (new := written(text)) != text}


def main() -> int:
    """Writes the pages, or checks them."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    found = stale()
    for page, text in found.items():
        print(f"{page.relative_to(ROOT)} {'disagrees with its results' * args.check}")
        if not args.check:
            page.write_text(text, encoding="utf-8")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
