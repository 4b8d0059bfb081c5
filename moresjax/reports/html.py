"""The demo's report: one self-contained page."""

import base64
from importlib import resources
from pathlib import Path

import jinja2

FIGURES = (
    "accuracy",
    "attention_share",
    "lmar",
    "lmar_mean_of_ratios",
    "share_against_size",
    "heat_map",
)


def write_demo_report(results: dict, out: str | Path) -> Path:
    """Renders `report.html` from the demo's results and the PNG files in `out`."""
    out = Path(out)
    images = {name: _data_uri(out / f"{name}.png") for name in FIGURES}
    source = resources.files("moresjax.reports").joinpath("demo_report.html.j2").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    path = out / "report.html"
    path.write_text(template.render(results=results, images=images), encoding="utf-8")
    return path


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
