"""Takes the pictures of the page of `moresjax serve` for the documentation.

    moresjax demo && python docs/screenshots.py runs/demo

It needs the extra `test` and Debian's chromium, and writes `page.png` and `page_phone.png` into
`docs/pictures/`.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import moresjax as mj
from moresjax.core.errors import UserError
from moresjax.serve.run import running
from moresjax.serve.server import Server
from moresjax.studies.demo_result import demo_result

PICTURES = Path(__file__).parent / "pictures"
COLUMNS = ("connector-only", "mores-r-1")
QUESTION = "what is at top-left ?"


def ask(page: Page) -> None:
    """Asks two adapters about a sample, and looks at a token."""
    expect(page.locator("body")).to_have_attribute("data-ready", "yes")
    page.click("#samples li:nth-child(2) button")
    page.click("#add-column")
    for number, name in enumerate(COLUMNS, 1):
        page.select_option(f"#columns .column:nth-child({number}) select", name)
    page.click("#settings summary")
    page.fill("#max_tokens", "12")
    page.fill("#question", QUESTION)
    page.click("#settings summary")
    page.press("#question", "Enter")
    expect(page.locator(".answer[data-status=done]")).to_have_count(2)
    page.locator(".answer >> nth=1").locator(".token").first.hover()
    page.locator("canvas.map").wait_for()
    page.wait_for_timeout(500)


def take(url: str, out: Path) -> None:
    """Both pictures."""
    with sync_playwright() as tools:
        path = shutil.which("chromium")
        browser = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        page.goto(url)
        ask(page)
        page.screenshot(path=out / "page.png")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 390, "height": 844})
        page.click("#views [data-view=look]")
        page.wait_for_timeout(300)
        page.screenshot(path=out / "page_phone.png")
        browser.close()
    for name in ("page.png", "page_phone.png"):  # a third of the bytes
        Image.open(out / name).convert("RGB").quantize(128).save(out / name, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", help="the folder of a finished demo")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    args = parser.parse_args()
    demo = demo_result(args.demo)
    if demo is None:
        raise UserError(f"{args.demo} is no result of a demo")
    model = mj.load(demo.base)
    model.load_adapters(demo.adapters)
    with running(Server(model, "demo")) as url:
        take(url, args.out)


if __name__ == "__main__":
    main()
