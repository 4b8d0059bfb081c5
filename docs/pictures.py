"""Draws the pictures of the documentation as SVG files into `docs/pictures/`.

    python docs/pictures.py

The row is one that `Row` lays out and `loss_mask` masks; the house is read from the imports of the
package. The colours are legible on a light and on a dark page.
"""

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from moresjax.core.layout import TokenKind, TokenLayout, loss_mask
from moresjax.core.row import Row, stack
from moresjax.tuning.selectors import parse_selector

ROOT = Path(__file__).parents[1]

INK = "#20262e"  # text on a filled box
OUTSIDE = "#7b8494"  # text and lines on the page
KIND_COLOURS = {
    "SYSTEM": "#cfd4dc",
    "IMAGE": "#a9d8b8",
    "QUESTION": "#a8c8ee",
    "ANSWER": "#f5c99b",
    "PAD": "none",
}
EDIT, DELTA, VIRTUAL, PROBE = "#35a06a", "#4a86d8", "#d9863b", "#9a6fd0"


class Picture:
    """An SVG that grows shape by shape."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img" '
            'font-family="Inter, Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0.5 L7.5 4 L0 7.5 z" '
            f'fill="{OUTSIDE}"/></marker></defs>',
        ]

    def text(
        self,
        x: float,
        y: float,
        words: object,
        *,
        colour: str = OUTSIDE,
        size: float = 13,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """A line of text whose baseline is at `y`."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size:g}" '
            f'text-anchor="{anchor}"{weight}>{escape(str(words))}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "none",
        dashed: bool = False,
        radius: float = 5,
    ) -> None:
        """A rounded rectangle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.3"{dash}/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str) -> None:
        """A filled circle."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}"/>')

    def line(
        self, path: str, *, colour: str = OUTSIDE, head: bool = True, width: float = 1.5
    ) -> None:
        """A line along an SVG path, with an arrow head at its end."""
        end = ' marker-end="url(#head)"' if head else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{end}/>'
        )

    def save(self, path: Path) -> None:
        """Writes the file."""
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


# ---- The layout of a row.


def example_row() -> tuple[Row, list[str]]:
    """A packed row of two documents, the second with two branches, and the words of its tokens."""
    visual = 4
    first = Row.text([1, 2], TokenKind.SYSTEM).append([0] * visual, TokenKind.IMAGE)
    image = np.where(first.kind == TokenKind.IMAGE, np.arange(len(first)) - 2, -1)
    first = first.replace(image=image.astype(np.int32), pixels=np.zeros((1, 2, 2, 3), np.float32))
    first = first.append([3, 4], TokenKind.QUESTION).append([5, 6, 7])
    second = Row.text([1], TokenKind.SYSTEM).append([8, 9], TokenKind.QUESTION)
    for branch in (1, 2):
        second = second.append([10], TokenKind.QUESTION, branch=branch, position=3)
        second = second.append([11, 7], branch=branch)
    row = Row.concat([first, second], visual).pad(22)
    words = ["<s>", "USER:", *["▦"] * visual, "what", "?", "a", "cat", "</s>"]
    words += ["<s>", "2", "5", "sum ?", "7", "</s>", "max ?", "5", "</s>", "", ""]
    return row, words


def draw_row() -> Picture:
    """A row with all of its fields, where MoReS edits and where the loss is."""
    row, words = example_row()
    layout = TokenLayout.stacked(stack([row.fields]), visual_tokens=4)
    edited = np.asarray(parse_selector("image")(layout))[0]
    loss = np.asarray(loss_mask(layout))[0]
    left, cell, top = 112, 44, 58
    width = left + cell * len(row) + 14
    picture = Picture(width, 396, "The layout of a packed row of two documents")

    def middle(token: int) -> float:
        return left + cell * (token + 0.5)

    def spans(values: Iterable) -> Iterable[tuple[int, int]]:
        """Runs of equal values as (first, one past the last)."""
        values = list(values)
        edges = [i for i in range(1, len(values)) if values[i] != values[i - 1]]
        return zip([0, *edges], [*edges, len(values)], strict=True)

    valid = row.kind != TokenKind.PAD
    documents = np.where(valid, row.document, -1)
    titles = {0: "document 0: one image, one question", 1: "document 1: two branches of one text"}
    for start, stop in spans(documents):
        x, size = left + cell * start, cell * (stop - start)
        name = titles.get(int(documents[start]), "padding")
        picture.text(x + size / 2, 22, name, bold=True)
        picture.line(f"M{x + 3:g} 38 V32 H{x + size - 3:g} V38", head=False, width=1.2)
    picture.text(left - 12, top + 20, "tokens", anchor="end", bold=True)
    for token, word in enumerate(words):
        colour = KIND_COLOURS[TokenKind(row.kind[token]).name]
        pad = not valid[token]
        stroke = OUTSIDE if pad else "none"
        picture.box(left + cell * token + 1.5, top, cell - 3, 32, colour, stroke=stroke, dashed=pad)
        picture.text(middle(token), top + 21, word, colour=INK, size=11.5)
    y = top + 62
    picture.text(left - 12, y, "kind", anchor="end", bold=True)
    keys = list(zip(documents.tolist(), row.kind.tolist(), row.branch.tolist(), strict=True))
    for start, stop in spans(keys):
        name = TokenKind(row.kind[start]).name
        label = name.replace("SYSTEM", "SYS") if stop - start > 1 else name[0]
        center = left + cell * (start + stop) / 2
        picture.text(center, y, label, size=11 if stop - start > 1 else 12)
    for field in ("image", "position", "document", "branch"):
        y += 30
        picture.text(left - 12, y, field, anchor="end", bold=True)
        for token, value in enumerate(getattr(row, field).tolist()):
            shown = "·" if value < 0 or not valid[token] else value
            picture.text(middle(token), y, shown, size=12.5)
    y += 22
    picture.line(f"M{left} {y} H{width - 14}", head=False, width=0.8)
    for name, mask, colour in (("MoReS edits", edited, EDIT), ("loss", loss, VIRTUAL)):
        y += 28
        picture.text(left - 12, y, name, anchor="end", bold=True)
        for token in np.flatnonzero(mask):
            picture.circle(middle(int(token)), y - 4, 6, colour)
    note = (
        "The loss stands where the next token is an answer's. Branches begin again at the position "
    )
    note += "after their trunk and do not see each other."
    picture.text(left, y + 36, note, anchor="start", size=12)
    x = left
    for name in ("SYSTEM", "IMAGE", "QUESTION", "ANSWER"):
        picture.box(x, y + 50, 14, 14, KIND_COLOURS[name], radius=3)
        picture.text(x + 20, y + 61, name, anchor="start", size=12)
        x += 112
    picture.box(x, y + 50, 14, 14, "none", stroke=OUTSIDE, dashed=True, radius=3)
    picture.text(x + 20, y + 61, "PAD", anchor="start", size=12)
    return picture


# ---- The sites inside a decoder block.


def draw_block() -> Picture:
    """A decoder block with its sites and the four kinds of tuning at their places."""
    picture = Picture(860, 746, "The sites inside a decoder block and what attaches to them")
    plain, centre = "#dfe3ea", 300

    def node(x: float, y: float, width: float, words: str, fill: str = plain) -> None:
        picture.box(x - width / 2, y, width, 32, fill)
        picture.text(x, y + 21, words, colour=INK)

    def site(y: float, name: str, x: float = centre) -> None:
        """A place in the residual stream or on a branch of it where edits act."""
        picture.circle(x, y, 7, EDIT)
        picture.text(x + 15, y + 5, name, colour=EDIT, anchor="start", bold=True)

    def linear(x: float, y: float, name: str) -> None:
        picture.box(x - 32, y, 64, 32, "#bcd4f3", stroke=DELTA)
        picture.text(x, y + 21, name, colour=INK, bold=True)

    def arrow(x: float, start: float, stop: float) -> None:
        picture.line(f"M{x:g} {start:g} V{stop:g}")

    def plus(y: float) -> None:
        picture.box(centre - 11, y - 11, 22, 22, plain, radius=11)
        picture.text(centre, y + 5, "+", colour=INK, size=16, bold=True)

    node(centre, 18, 250, "embedded text and visual tokens")
    picture.box(38, 18, 118, 32, "#f5d3b0", stroke=VIRTUAL)
    picture.text(97, 39, "virtual tokens", colour=INK, bold=True)
    picture.line("M156 34 H172")
    arrow(centre, 50, 140)
    site(76, "llm.embed.out")
    picture.box(60, 104, 500, 580, "none", stroke=OUTSIDE, dashed=True, radius=12)
    picture.text(546, 126, "one of the blocks", anchor="end", bold=True)
    # Attention.
    node(centre, 142, 110, "norm")
    for x, name in ((190, "q"), (300, "k"), (410, "v")):
        picture.line(f"M{centre} 174 V184 H{x} V196")
        linear(x, 198, name)
        arrow(x, 230, 250)
    node(centre, 252, 290, "attention")
    arrow(centre, 284, 302)
    linear(centre, 304, "o")
    arrow(centre, 336, 381)
    site(356, "llm.block.attn.out")
    plus(394)
    picture.line("M300 126 H90 V394 H287")
    # MLP.
    arrow(centre, 405, 424)
    node(centre, 426, 110, "norm")
    for x, name in ((230, "gate"), (370, "up")):
        picture.line(f"M{centre} 458 V468 H{x} V478")
        linear(x, 480, name)
    picture.line("M230 512 V522 H300 V532")
    picture.line("M370 512 V522 H300 V532", head=False)
    linear(centre, 534, "down")
    arrow(centre, 566, 603)
    site(584, "llm.block.mlp.out")
    plus(616)
    picture.line("M300 414 H90 V616 H287")
    arrow(centre, 627, 702)
    site(656, "llm.block.out")
    node(centre, 704, 220, "next block, then norm and head")
    # The legend.
    entries = (
        (EDIT, "Edit", "changes activations at a site", "mores, loreft, red, houlsby, steer"),
        (DELTA, "WeightDelta", "changes what a linear computes", "lora, ia3, mixlora, adapter"),
        (VIRTUAL, "VirtualTokens", "puts learned tokens before the row", "prompt, prefix, vpt"),
        (PROBE, "Probe", "reads and changes nothing", "attention statistics, capture"),
    )
    picture.text(590, 150, "Four kinds of tuning", anchor="start", bold=True, size=15)
    y = 184
    for colour, name, does, methods in entries:
        picture.circle(598, y - 5, 7, colour)
        picture.text(614, y, name, colour=colour, anchor="start", bold=True, size=14)
        picture.text(614, y + 20, does, anchor="start")
        picture.text(614, y + 38, methods, anchor="start", size=12)
        y += 72
    for path, x, at in (("M445 268 H502", 510, 268), ("M293 656 H246", 238, 656)):
        picture.line(path, colour=PROBE, head=False)
        picture.circle(x, at, 7, PROBE)
    note = ("The vision encoder has the same sites", "(vision.block…), and connector.out is one.")
    for line, words in enumerate(note):
        picture.text(590, y + 12 + 18 * line, words, anchor="start", size=12)
    return picture


# ---- The house.

WHAT = {
    "core": "rows, layouts, errors",
    "data": "sources, templates, batches",
    "tuning": "methods, sites, selectors",
    "sharding": "mesh, processes",
    "hardware": "chips, memory of the host",
    "models": "decoder, vision, connectors",
    "generation": "engine, KV cache, sampling",
    "weights": "HF, peft, pyreft, adapters",
    "analysis": "attention, steering, probes",
    "runs": "config, checkpoint, workdir",
    "configs": "digits, LLaVA-Steering",
    "inference": "load, Model, Chat",
    "training": "loop, objectives, optimizer",
    "evaluation": "benchmarks, judges, metrics",
    "plans": "memory and cost ahead",
    "reports": "plots, HTML pages",
    "studies": "the demo, papers' tables",
    "serve": "HTTP API",
    "testing": "tiny models for tests",
    "cli": "one file per command",
}


def read_house() -> tuple[tuple[set[str], ...], dict[str, set[str]]]:
    """The floors of the import test, and for every package those that it needs directly.

    An import that follows from others (through packages in between) is left out.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from test_architecture import FLOORS, edges  # pyright: ignore[reportMissingImports]

    below: dict[str, set[str]] = defaultdict(set)
    imports = sorted(edges())
    for one, other in imports:
        below[one].add(other)
    floors = tuple(floor & set(itertools.chain(*imports)) for floor in FLOORS)

    def reach(name: str) -> set[str]:
        return below[name].union(*(reach(other) for other in below[name]))

    direct = {
        name: {o for o in below[name] if not any(o in reach(p) for p in below[name] - {o})}
        for floor in floors
        for name in sorted(floor)
    }
    return floors, direct


def arrange(
    floors: tuple[set[str], ...], direct: dict[str, set[str]]
) -> tuple[list[list[str]], list[list[str]]]:
    """Packages by storey, and for every arrow the names that it passes.

    A storey holds packages that need nothing of each other; an arrow over several storeys passes a
    gap, which is named `from>to>storey`, on each of them.
    """
    storey: dict[str, int] = {}
    for floor in floors:
        for name in sorted(floor):
            storey[name] = 1 + max((storey[other] for other in direct[name]), default=-1)
    top = max(storey.values())
    for name in storey:  # what needs nothing stands just below the first that needs it
        if not direct[name] and name != "core":
            users = [storey[other] for other in storey if name in direct[other]]
            storey[name] = min(users, default=top + 1) - 1
    layers: list[list[str]] = [[] for _ in range(top + 1)]
    for name, number in storey.items():
        layers[number].append(name)
    routes = []
    for name, others in direct.items():
        for other in sorted(others):
            gaps = [f"{name}>{other}>{n}" for n in range(storey[name] - 1, storey[other], -1)]
            for gap in gaps:
                layers[int(gap.rsplit(">", 1)[1])].append(gap)
            routes.append([name, *gaps, other])
    return layers, routes


def place(layers: list[list[str]], routes: list[list[str]], box: float) -> dict[str, float]:
    """The x position of every package and gap: near its neighbours, without overlaps."""
    near: dict[str, list[str]] = defaultdict(list)
    for route in routes:
        for one, other in itertools.pairwise(route):
            near[one].append(other)
            near[other].append(one)

    def size(name: str) -> float:
        return 26 if ">" in name else box + 24

    def spread(layer: list[str], wanted: dict[str, float]) -> dict[str, float]:
        """The names in their order, each as near to its wanted place as the others let it."""
        found: dict[str, float] = {}
        edge = -np.inf
        for name in layer:
            found[name] = max(wanted[name], edge + size(name) / 2)
            edge = found[name] + size(name) / 2
        shift = float(np.mean([wanted[name] - found[name] for name in layer]))
        return {name: x + shift for name, x in found.items()}

    x = {}
    for layer in layers:
        x |= spread(layer, {name: 0.0 for name in layer})
    for _ in range(60):
        for layer in (*layers, *layers[::-1]):
            wanted = {n: float(np.mean([x[o] for o in near[n]] or [x[n]])) for n in layer}
            layer.sort(key=lambda name: wanted[name])
            x |= spread(layer, wanted)
    return x


def draw_house() -> Picture:
    """The packages by storey, with arrows to what they import."""
    floors, direct = read_house()
    layers, routes = arrange(floors, direct)
    box, height, step = 176, 46, 84
    x = place(layers, routes, box)
    names = [name for layer in layers for name in layer]
    low = min(x[name] - (0 if ">" in name else box / 2) for name in names)
    high = max(x[name] + (0 if ">" in name else box / 2) for name in names)
    total = step * len(layers) - 4
    picture = Picture(high - low + 40, total, "The packages of moresjax; every arrow is an import")
    shift = 20 - low
    y = {name: total - 64 - step * n for n, layer in enumerate(layers) for name in layer}
    for route in routes:
        path = f"M{x[route[0]] + shift:.1f} {y[route[0]] + height}"
        for one, other in itertools.pairwise(route):
            # Beside boxes an arrow runs straight down; between storeys it bends.
            start, stop = y[one] + height, y[other] - 2
            a, b = x[one] + shift, x[other] + shift
            bend = (stop - start) * 0.6
            path += f" C{a:.1f} {start + bend:.1f} {b:.1f} {stop - bend:.1f} {b:.1f} {stop:.1f}"
            path += f" V{y[other] + height}" if ">" in other else ""
        picture.line(path, width=1.3)
    tones = ("#cfd4dc", "#a9d8b8", "#a8c8ee", "#f5c99b", "#d9c2ee")
    for number, layer in enumerate(layers):
        for name in layer:
            if ">" in name:
                continue
            left = x[name] + shift - box / 2
            picture.box(left, y[name], box, height, tones[number * len(tones) // len(layers)])
            picture.text(left + box / 2, y[name] + 19, name, colour=INK, size=14, bold=True)
            picture.text(left + box / 2, y[name] + 36, WHAT.get(name, ""), colour=INK, size=11.5)
    note = "Imports run downwards; those that follow from others are left out."
    picture.text(20, total - 4, note, anchor="start", size=12)
    return picture


PICTURES = {"row": draw_row, "block": draw_block, "house": draw_house}


def main() -> None:
    """Draws all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    parser.add_argument("names", nargs="*", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or PICTURES:
        PICTURES[name]().save(args.out / f"{name}.svg")


if __name__ == "__main__":
    main()
