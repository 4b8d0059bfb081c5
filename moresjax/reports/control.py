"""Tables and figures about control, beside the paper's own numbers.

Axis legend: Y, X pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moresjax.core.errors import UserError
from moresjax.core.folders import replace_file
from moresjax.core.json_files import read_object
from moresjax.data.control.cases import KINDS, NEGATIVE, OTHER, OWN, SCENARIOS, TARGET, Case
from moresjax.data.images import open_image
from moresjax.evaluation.control.answers import ALL, BASE
from moresjax.evaluation.control.measure import Measured, Rate
from moresjax.evaluation.control.run import RESULTS, ControlResult
from moresjax.reports.html import png_uri, render
from moresjax.reports.plots import save
from moresjax.reports.tables import Table, in_points

SHOWN = 3  # questions of each kind in a figure
# Tables 2 and S9 print the same numbers: the base model's errors by class in percent; with editors
# 100% on the target and 0% on others, in both scenarios.
PAPER_BASE = {"cat": 18.8, "dog": 17.3, "ship": 21.8, "frog": 22.5, "truck": 21.4}
PAPER_CONTROL, PAPER_OTHERS = "100%", "0%"
TABLES, S10 = {1: "Table 2", 2: "Table S9"}, "Table S10"
NOTE = (
    "Control of this kind can make a model tell untruths on purpose. Say openly where editors are "
    "in use, test other ways to ask, and look at what else they change (the paper's section S10)."
)
MISALIGNED = (
    "The paper does not say how images of the target are asked about the other class: here the "
    "question names the other class."
)


def _text(rate: Rate | None) -> str:
    return "-" if rate is None else str(rate)


def editors_table(measured: Measured) -> Table:
    """Every set of editors: control, and what it does to other questions."""
    kinds = [k for k in (OTHER, NEGATIVE, OWN) if any(c.kind == k for c in measured.cases)]
    names = ["control", *(f"{what} {kind}" for kind in kinds for what in ("error", "leakage"))]
    rows = []
    for editors in measured.answers:
        rates = measured.rates(editors)
        moved = in_points(*measured.differences(editors)["control"])
        rows.append([editors, *(_text(rates[name]) for name in names), moved])
    return Table("Which editors act", ["editors", *names, "control, from all editors"], rows)


def paper_table(result: ControlResult) -> Table:
    """The row of the paper's table that the run is of, with the paper's numbers behind."""
    measured, plan = result.measured, result.measured.scenario
    rates = measured.rates(ALL)
    if plan.name == "indeterminate":
        row = [plan.target, _text(rates["control"]), PAPER_CONTROL]
        return Table(S10, ["attribute", "indeterminate", "the paper's"], [row])
    base, paper = measured.base_errors().get(plan.target), PAPER_BASE.get(plan.target)
    head = ["class", "base model wrong", "the paper's", plan.name, "the paper's"]
    others = {OTHER: rates[f"error {OTHER}"], NEGATIVE: rates[f"error {NEGATIVE}"]}
    of_paper = "-" if paper is None else f"{paper}%"
    row = [plan.target, _text(base), of_paper, _text(rates["control"]), PAPER_CONTROL]
    for kind, rate in others.items():
        head += [f"error {kind}", "the paper's"]
        row += [_text(rate), PAPER_OTHERS if kind == OTHER else "not asked"]
    phrasing = int(result.facts["data"]["phrasing"])
    return Table(TABLES.get(phrasing, "Table 2"), head, [row])


def class_table(measured: Measured) -> Table:
    """Questions by the class of their image: the base model, and with all editors."""
    rows = []
    base = measured.base_errors()
    for name in dict.fromkeys(case.shown for case in measured.cases):
        rates = measured.rates(ALL, name)
        paper = PAPER_BASE.get(name)
        own = [_text(base.get(name)), "-" if paper is None else f"{paper}%"]
        names = "control", f"error {OTHER}", f"error {NEGATIVE}"
        rows.append([name, *own, *(_text(rates[what]) for what in names)])
    head = ["image of", "base model wrong", "the paper's", "control", "error other"]
    return Table("By class, all editors", [*head, "error negative"], rows)


def paraphrase_table(result: ControlResult) -> Table:
    """Table S11: control in other words, with and without a rephraser."""
    head = ["paraphrase", BASE, "as it stands", "rephrased", "the paper's, rephrased"]
    head += ["error on others, rephrased", "indicators lost"]
    rows = [
        [
            row.text,
            _text(row.base),
            _text(row.without),
            _text(row.rephrased),
            PAPER_CONTROL,
            _text(row.others),
            str(row.lost),
        ]
        for row in result.paraphrases
    ]
    return Table("Table S11", head, rows)


def control_tables(result: ControlResult) -> list[Table]:
    """All tables of a result."""
    tables = [paper_table(result), editors_table(result.measured), class_table(result.measured)]
    return [*tables, paraphrase_table(result)] if result.paraphrases else tables


def joined_tables(folders: Sequence[str | Path]) -> list[Table]:
    """Tables 2, S9 and S10 with a row for every target, from results of `analyze control`.

    Args:
      folders: The directories of the results, of any targets, scenarios and phrasings.

    Raises:
      UserError: A folder has no results, or two of them are of the same cell.
    """
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in folders:
        file = Path(folder) / RESULTS
        if not file.is_file():
            raise UserError(f"{file} does not exist; give an --out of analyze control")
        found = read_object(file)
        data, rates = found["data"], next(x for x in found["rows"] if x["editors"] == ALL)
        scenario, target = data["scenario"], data["target"]
        title = S10 if scenario == "indeterminate" else TABLES.get(data["phrasing"], TABLES[1])
        cells = tables.setdefault(title, {}).setdefault(target, {})
        if scenario in cells:
            raise UserError(f"{folder}: another folder has {scenario} of {target}, too ({title})")
        cells[scenario] = rates
        if scenario == "misclassification" or "base" not in cells:
            cells["base"] = found["base_errors"].get(target)
    made = []
    for title in (x for x in (*TABLES.values(), S10) if x in tables):
        rows = tables[title]
        kinds = {f"error {OTHER}": PAPER_OTHERS, f"error {NEGATIVE}": "not asked"}
        head, body = ["target", "base model wrong", "the paper's"], []
        scenarios = [name for name in SCENARIOS if any(name in cells for cells in rows.values())]
        for name in scenarios:
            head += [f"{name} (the paper's: {PAPER_CONTROL})"]
            head += [f"{kind} ({paper})" for kind, paper in kinds.items()]
        for target, cells in rows.items():
            of_paper = PAPER_BASE.get(target)
            row = [target, _saved(cells["base"]), f"{of_paper}%" if of_paper else "-"]
            for name in scenarios:
                row += [_saved(cells.get(name, {}).get(what)) for what in ("control", *kinds)]
            body.append(row)
        made.append(Table(title, head, body))
    return made


def _saved(rate: dict[str, Any] | None) -> str:
    """A rate as `control.json` has it."""
    return _text(None if rate is None else Rate(**rate))


def overlay_figure(measured: Measured, shown: int = SHOWN) -> Figure:
    """Regions on their images with the answers without and with all editors (Figures 3, S1, S2).

    Args:
      measured: The answers.
      shown: The questions of each kind.
    """
    base, edited = measured.answers[BASE], measured.answers[ALL]
    every = list(zip(measured.cases, base, edited, strict=True))
    rows = {
        kind: sorted((x for x in every if x[0].kind == kind), key=lambda x: x[1] == x[2])[:shown]
        for kind in KINDS
    }
    rows = {kind: own for kind, own in rows.items() if own}
    size = (2.3 * shown, 2.7 * len(rows))
    figure, axes = plt.subplots(len(rows), shown, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, (kind, own) in zip(axes, rows.items(), strict=True):
        for axis, (case, before, after) in zip(row, own, strict=False):
            image = np.asarray(open_image(case.image))
            _draw(axis, image, case)
            text = f"{case.question.text}\n{before} → {after}"
            axis.set_title(text, fontsize=6.5, color="#0072B2" if kind == TARGET else "#222222")
        row[0].text(-0.05, 0.5, kind, transform=row[0].transAxes, rotation=90, va="center")
    figure.tight_layout()
    return figure


def _draw(axis: Axes, image: np.ndarray, case: Case) -> None:
    """An image with its region in colours and the rest pale."""
    height, width = image.shape[:2]
    axis.imshow(image, alpha=0.45)
    for x0, y0, x1, y1 in case.roi:
        left, right = round(x0 * width), round(x1 * width)
        top, bottom = round(y0 * height), round(y1 * height)
        extent = (left - 0.5, right - 0.5, bottom - 0.5, top - 0.5)
        if right > left and bottom > top:
            axis.imshow(image[top:bottom, left:right], extent=extent)
        corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor="#D55E00", linewidth=1.5))
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def control_report(result: ControlResult, out: str | Path) -> list[Path]:
    """Tables as Markdown, the figure, and a page with both.

    Args:
      result: What editors do.
      out: The directory.

    Returns:
      The files.
    """
    out = Path(out)
    tables, plan = control_tables(result), result.measured.scenario
    notes = [NOTE, *([MISALIGNED] if plan.into else [])]
    title = f"{plan.name}: {plan.target}" + (f" taken for {plan.into}" if plan.into else "")
    text = "\n\n".join([f"## {title}", *(table.markdown() for table in tables), *notes])
    files = [out / name for name in ("tables.md", "examples.png", "control.html")]
    replace_file(files[0], text + "\n")
    save(overlay_figure(result.measured), files[1], dpi=150)
    figure = png_uri(files[1].read_bytes())
    render("control.html.j2", files[2], title=title, tables=tables, figure=figure, notes=notes)
    return files
