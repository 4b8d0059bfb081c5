"""The page of the server in a real browser: Debian's chromium, driven by playwright."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from run_helpers import DIGITS

import moresjax as mj
from moresjax.analysis.vectors import save_vectors
from moresjax.cli import main
from moresjax.data.digits import make_scene
from moresjax.inference.analyze import attention_map
from moresjax.inference.attention_maps import answer_maps
from moresjax.serve.run import running
from moresjax.serve.server import Server, ServerConfig
from moresjax.serve.steering import read_shelf
from moresjax.testing.models import randomised_tuning
from moresjax.weights.adapter import save_adapter

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="apt install chromium")
BASE = DIGITS.parents[1] / "tests" / "fixtures" / "v0_1" / "base"
QUESTION = "how many digits ?"
NEW = 6
SIZES = {"wide": {"width": 1440, "height": 900}, "phone": {"width": 390, "height": 844}}
LIMIT = "tokens => import('/store.js').then(({ state }) => { state.settings.max_tokens = tokens })"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """Adapters that say other things than the base model and than each other."""
    model, folder = mj.load(BASE), tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("one", "two")):
        model.attach("mores:positions=all")
        found[name] = str(save_adapter(randomised_tuning(model.mllm, seed, 4.0), folder / name))
    return found


@pytest.fixture(scope="module")
def address(adapters, tmp_path_factory):
    model = mj.load(BASE)
    model.load_adapters(adapters)
    vector = 100 * np.random.default_rng(0).standard_normal(8)
    file = save_vectors(tmp_path_factory.mktemp("vectors"), {"up": vector}, {"up": {"layer": 1}})
    shelf = read_shelf([str(file)], 8, 2)
    config = ServerConfig(rows=4, max_new_tokens=512)
    server = Server(model, "base", config, shelf, {"base": BASE, **adapters})
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A PNG file of a scene."""
    file = tmp_path_factory.mktemp("scenes") / "scene.png"
    Image.fromarray(make_scene(np.random.default_rng(0), "test").image).save(file)
    return file


@pytest.fixture
def page(browser, address):
    """The page as a new visitor finds it; nothing fails on it, and nothing leaves this machine."""
    context = browser.new_context(viewport=SIZES["wide"])
    page, told, asked = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on(
        "console",
        lambda message: message.type in ("error", "warning") and told.append(message.text),
    )
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    expect(page.locator("body")).to_have_attribute("data-ready", "yes", timeout=60_000)
    page.evaluate(LIMIT, NEW)
    yield page
    context.close()
    assert told == []
    assert {url.split("/")[2] for url in asked if not url.startswith(("data:", "blob:"))} == {
        address.removeprefix("http://")
    }


def ask(page, text=QUESTION, file=None, columns=1):
    """Asks a question and waits for its answers; their texts."""
    if file is not None:
        page.set_input_files("#file", file)
        expect(page.locator("#attached li")).to_have_count(1)
    page.fill("#question", text)
    page.press("#question", "Enter")
    return answers(page, columns)


def answers(page, columns=1):
    """The texts of the last question's answers, once they have ended."""
    done = page.locator(".turn:last-child .answer[data-status=done]")
    expect(done).to_have_count(columns, timeout=60_000)
    return [" ".join(text.split()) for text in done.locator(".tokens").all_inner_texts()]


def side_by_side(page, *models):
    """Has a column for each of these models."""
    for number, model in enumerate(models):
        if number:
            page.click("#add-column")
        page.select_option(f"#columns .column:nth-child({number + 1}) select", model)


def generate(capsys, *arguments):
    """The text that `moresjax generate` answers."""
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["text"]


def test_an_uploaded_image_gets_a_streamed_answer(page, scene):
    with page.expect_response("**/v1/chat/completions") as response:
        (text,) = ask(page, file=scene)
    assert response.value.header_value("content-type").startswith("text/event-stream")
    model = mj.load(BASE)
    assert text == model.generate(QUESTION, scene, max_new_tokens=NEW)
    image = page.locator(".question canvas")
    assert image.get_attribute("aria-label") == "scene.png"
    assert page.locator("#status").inner_text().startswith("base (base): ")


def test_columns_are_those_of_the_commands_that_the_page_names(
    page, scene, adapters, capsys, tmp_path, monkeypatch
):
    side_by_side(page, "one", "two")
    texts = ask(page, file=scene, columns=2)
    assert texts[0] != texts[1]
    marked = page.locator(".answer >> nth=0").locator(".differs")
    assert marked.count() >= 1
    monkeypatch.chdir(tmp_path)
    shutil.copy(scene, "scene.png")
    for column, name in enumerate(adapters):
        page.locator(".answer").nth(column).get_by_text("Command").click()
        words = shlex.split(page.inner_text("#command-text"))
        page.click("#command-close")
        assert words[:6] == [
            "moresjax",
            "generate",
            "--model",
            str(BASE),
            "--adapter",
            adapters[name],
        ]
        assert generate(capsys, *words[2:]) == texts[column]


def test_a_reload_keeps_the_chat_and_a_new_one_forgets_it(page, scene):
    side_by_side(page, "one", "base")
    texts = ask(page, file=scene, columns=2)
    page.wait_for_timeout(400)  # until it is kept
    page.reload()
    assert answers(page, 2) == texts
    assert page.locator(".question canvas").count() == 1
    assert page.locator("#columns select").first.input_value() == "one"
    more = ask(page, "and the largest ?", columns=2)  # the conversation goes on
    assert len(more) == 2
    assert page.locator(".turn").count() == 2
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_a_broken_image_is_one_sentence(page):
    broken = {"name": "cat.png", "mimeType": "image/png", "buffer": b"\x89PNG no more"}
    page.set_input_files("#file", files=[broken])
    problem = page.locator("#problem")
    expect(problem).to_have_text("cat.png is broken, or not an image that this browser can read.")
    page.set_input_files("#file", files=[{**broken, "name": "a.txt", "mimeType": "text/plain"}])
    expect(problem).to_contain_text("a.txt is not an image")
    assert page.locator("#attached li").count() == 0


def test_images_are_dropped_and_pasted(page, scene):
    data = list(scene.read_bytes())
    for kind in ("drop", "paste"):
        page.evaluate(
            """([kind, data]) => {
              const moved = new DataTransfer();
              moved.items.add(new File([new Uint8Array(data)], `${kind}.png`, {type: "image/png"}));
              const event = kind === "drop"
                ? new DragEvent("drop", {dataTransfer: moved, bubbles: true, cancelable: true})
                : new ClipboardEvent("paste", {clipboardData: moved, cancelable: true});
              (kind === "drop" ? document.body : document).dispatchEvent(event);
            }""",
            [kind, data],
        )
    expect(page.locator("#attached canvas")).to_have_count(2)
    labels = [c.get_attribute("aria-label") for c in page.locator("#attached canvas").all()]
    assert sorted(labels) == ["drop.png", "paste.png"]
    page.click("[aria-label='Take drop.png away']")
    expect(page.locator("#attached canvas")).to_have_count(1)


def test_an_answer_is_stopped_retried_and_its_question_edited(page):
    page.select_option("#columns select", "one")
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not come
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    expect(page.locator(".answer[data-status=running]")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".answer[data-status=stopped] .note")).to_have_text("Stopped.")
    page.unroute("**/v1/chat/completions")
    page.click("[aria-label='Retry one']")
    (first,) = answers(page)
    page.click("[aria-label='Edit question 1']")
    field = page.locator(".question textarea")
    assert field.input_value() == QUESTION
    field.fill("is there a two ?")
    field.press("Enter")
    (second,) = answers(page)
    assert (page.inner_text(".said"), page.locator(".turn").count()) == ("is there a two ?", 1)
    assert all([first, second])


def test_tokens_are_reached_by_keyboard(page):
    page.select_option("#columns select", "one")
    ask(page)
    tokens = page.locator(".token")
    tokens.first.focus()
    assert tokens.first.get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator("#token strong")).to_have_text(tokens.nth(1).inner_text().strip())
    shares = page.locator(".alternatives .share").all_inner_texts()
    assert len(shares) >= 5
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    # A tab reaches everything else, in the order of the page.
    page.locator("#question").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#send")).to_be_focused()


def test_the_chat_is_exported_with_its_commands(page, scene):
    (text,) = ask(page, file=scene)
    ask(page, "and the smallest ?")
    with page.expect_download() as download:
        page.click("#export")
    content = json.loads(Path(download.value.path()).read_text())
    first, second = content["turns"]
    assert content["format"] == "moresjax-chat"
    assert first["images"][0]["uri"].startswith("data:image/png;base64,")
    assert first["answers"][0]["text"].split() == text.split()
    assert len(first["answers"][0]["tokens"]) >= 1
    assert shlex.split(first["answers"][0]["command"])[:4] == [
        "moresjax",
        "generate",
        "--model",
        str(BASE),
    ]
    # The terminal's conversation asks the questions one after the other.
    assert second["answers"][0]["command"].startswith(
        f"printf '%s\\n' '/image scene.png' '{QUESTION}' "
    )


def test_a_slider_steers_and_zero_restores(page, capsys):
    page.select_option("#columns select", "one")
    (plain,) = ask(page)
    kept = "import('/store.js').then(({ state }) => state.turns[0].answers[0])"
    tokens = page.evaluate(kept)["tokens"]
    slider = page.locator("#vector-up")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("-8", "8")

    def steer(alpha):
        """The answer that comes by itself after the slider has moved."""
        with page.expect_response("**/v1/chat/completions"):
            slider.fill(str(alpha))
        (text,) = answers(page)
        return text

    steered = steer(2)
    assert steered != plain
    assert page.inner_text(".answer .who") == "one + 2 \u00d7 up"
    page.locator(".answer").get_by_text("Command").click()
    words = shlex.split(page.inner_text("#command-text"))
    page.click("#command-close")
    assert generate(capsys, *words[2:]) == steered
    assert steer(0) == plain
    assert page.evaluate(kept)["tokens"] == tokens  # log-probabilities too


def test_words_that_not_all_columns_have(page):
    texts = ["a red cat sits", "a blue cat sits here", "the cat sits"]
    found = page.evaluate(
        "texts => import('/diff.js').then(({differing}) => differing(texts))", texts
    )
    words = [[text[a:b] for a, b in own] for text, own in zip(texts, found, strict=True)]
    assert words == [["a", "red"], ["a", "blue", "here"], ["the"]]


def test_a_token_shows_its_map_its_probability_and_its_lines(page, scene, adapters):
    side_by_side(page, "one", "base")
    ask(page, file=scene, columns=2)
    model = mj.load(BASE)
    model.load_adapter(adapters["one"])
    answer = model.generate(QUESTION, scene, max_new_tokens=NEW, details=True, logprobs=True)
    chosen = 1
    page.locator(".answer").first.locator(".token").nth(chosen).hover()
    page.locator("canvas.map").wait_for()
    page.locator("#numbers summary").click()

    def shown():
        """The numbers of the map on the page."""
        page.wait_for_timeout(100)
        rows = page.locator("#numbers tr").all()
        return np.array([[float(cell) for cell in row.inner_text().split()[1:]] for row in rows])

    expected = attention_map(model, QUESTION, scene, max_new_tokens=NEW).grid[:, chosen]
    for layer in range(2):
        page.evaluate(
            "layer => { const it = document.querySelector('#layer'); it.value = layer;"
            " it.dispatchEvent(new Event('input')); }",
            layer,
        )
        np.testing.assert_allclose(shown(), expected[layer], atol=1e-5)
    page.check("#all-layers")
    np.testing.assert_allclose(shown(), expected.mean(0), atol=1e-5)
    row = model.prompt(QUESTION, scene)
    by_head = answer_maps(model, row, answer.tokens, places=[chosen])[0, :, :, 0]
    page.select_option("#head", "1")
    np.testing.assert_allclose(shown(), by_head[:, 1].mean(0), atol=1e-5)

    probability = float(np.exp(answer.logprobs[chosen]))
    told = page.inner_text(".chosen")
    word = page.locator(".token").nth(chosen).inner_text().strip()
    assert told.startswith(f"{word} has probability ")
    assert float(told.split("probability ")[1].split(" %")[0]) == pytest.approx(
        100 * probability, rel=0.1
    )
    assert "Attention is not a cause" in page.inner_text(".caution")
    labels = [drawing.get_attribute("aria-label") for drawing in page.locator("svg.lines").all()]
    assert [label.split(" by layer: ")[0] for label in labels] == [
        "Share of attention on the image",
        "LMAR, image against text",
    ]
    names = [name.split(" ")[0] for name in labels[0].split(": ")[1].split("; ")]
    assert names == ["one", "base", "this"]


OVERLAPS = (Path(__file__).parent / "overlaps.js").read_text()


@pytest.mark.parametrize("size", SIZES)
def test_nothing_overlaps(page, scene, size):
    page.set_viewport_size(SIZES[size])

    def check():
        page.wait_for_timeout(50)
        found = page.evaluate(OVERLAPS)
        assert (found["bad"], found["wide"]) == ([], [])
        assert found["scrolls"] <= 0
        assert found["count"] > 10

    check()
    side_by_side(page, "one", "two", "base", "one")
    page.click("#settings summary")
    page.set_input_files("#file", scene)
    check()
    ask(page, QUESTION + " " + 12 * "and ", columns=4)
    check()
    page.locator(".token").first.click()
    page.locator("#maps > *").first.wait_for()
    check()
    if size == "phone":
        page.click("#views [data-view=chat]")
        check()
    page.locator(".answer").first.get_by_text("Command").click()
    page.wait_for_selector("dialog[open]")
    page.click("#command-close")
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        ink, paper = page.evaluate(
            "() => ['color', 'backgroundColor'].map((it) => getComputedStyle(document.body)[it])"
        )
        assert contrast(ink, paper) > 7


def contrast(*colours):
    """The ratio of luminance of two colours `rgb(..)`, as WCAG defines it."""

    def luminance(colour):
        parts = np.array([float(x) for x in colour[4:-1].split(",")[:3]]) / 255
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)
