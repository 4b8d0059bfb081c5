"""Self-contained HTML pages.

Axis legend: Y, X pixels.
"""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from moresjax.core.folders import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    images = {name: png_uri((out / f"{name}.png").read_bytes()) for name in FIGURES}
    return render("demo_report.html.j2", out / "report.html", results=results, images=images)


def render(template: str, path: str | Path, **values: Any) -> Path:
    """Writes a page from one of the package's templates; values are escaped."""

    def source(name: str) -> str:
        return resources.files("moresjax.reports").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(source)
    )
    path = Path(path)
    replace_file(path, environment.get_template(template).render(**values))
    return path


def image_uri(image: UInt8[np.ndarray, "Y X 3"]) -> str:
    """An image as a `data:` address that a page may hold."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return png_uri(buffer.getvalue())


def figure_uri(figure: "Figure") -> str:
    """A figure as a `data:` address, and closes it."""
    from moresjax.reports import plots  # matplotlib takes a while

    buffer = io.BytesIO()
    plots.save(figure, buffer, dpi=150)
    return png_uri(buffer.getvalue())


def png_uri(png: bytes) -> str:
    """The bytes of a PNG as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
