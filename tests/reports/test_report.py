"""`report`: one page about runs, with every number of its sources."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import moresjax as mj
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.examples import Example
from moresjax.evaluation.paired import OF_ONE_SEED, bootstrap_interval
from moresjax.evaluation.run import evaluate
from moresjax.evaluation.tasks import BenchmarkTask
from moresjax.reports import plots
from moresjax.reports.report import Report, as_text, findings
from moresjax.reports.runs import AskedQuestion, ReportedRun, gather
from moresjax.testing import talking_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"


class Page(HTMLParser):
    """The cells of a page's tables and all of its text; pictures count as their source."""

    def __init__(self, path: Path):
        super().__init__()
        self.cells, self.text, self.sources = [], [], []
        self._in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self._in_cell |= tag in ("td", "th")
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self._in_cell:
            self.cells.append(data.strip())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """Two evaluations of a tiny model with its attention; another model's scores in the second."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (12, 12, 12, 3)).astype(np.uint8))
    questions = [Example(str(n), "how many ?", "two", (x,)) for n, x in enumerate(images)]
    task = BenchmarkTask("counts", questions, max_new_tokens=2, benchmark="own.jsonl")
    result = evaluate(talking_model(), [task], attention=True, batch_size=12, out=root / "one")
    shutil.copytree(root / "one", root / "two")
    for name, right in (("one", 3), ("two", 12)):
        rows = [row | {"score": float(n < right)} for n, row in enumerate(result.predictions)]
        entry = result.scores["counts"] | {"score": right / 12, "interval95": [0.125, 0.9375]}
        data = json.loads((root / name / "results.json").read_text())
        data["scores"]["counts"] = entry
        (root / name / "results.json").write_text(json.dumps(data))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name / "predictions.jsonl").write_text(lines)
    return root


def test_the_page_has_every_number_of_its_sources(evaluated, tmp_path):
    path = mj.report(
        [f"first={evaluated / 'one'}", evaluated / "two", FIXTURES / "mores"],
        tmp_path / "page.html",
    )
    page, text = Page(path), " ".join(path.read_text().split())
    entry = json.loads((evaluated / "one" / "attention.json").read_text())["model"]
    for number in (
        *(row[1] for row in entry["share"]),
        entry["average_visual_share"],
        3 / 12,
        0.125,
        0.9375,
    ):
        assert any(f"{number:.3f}" in cell for cell in page.cells), number
    for number in entry["lmar_of_means"]["text"]:
        assert f"{number:.2f}" in page.cells
    assert "n = 12" in page.cells
    last = json.loads((FIXTURES / "mores" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['loss']:.3f}" in page.cells
    (mores,) = (run for run in gather([str(FIXTURES / "mores")]) if run.name == "mores")
    assert mores.parameters is not None
    assert f"{mores.parameters.trainable:,}" in page.cells
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    # scores, share, LMAR, groups, heads, loss, and the answers to three questions
    assert len(page.sources) == 9
    assert "http" not in text
    for missing in (
        "no evaluation, no attention statistics: <code>moresjax evaluate --model",
        "no training curves, no number of parameters: give the folder",
    ):
        assert missing in text
    assert text.count("The accuracy of two is higher than that of first: +75.0 points") == 1
    shares = "No difference in share of attention on the image could be shown between two and first"
    assert f"{shares}: +0.000, 95% interval +0.000 to +0.000, n = 12, p = 1 (Holm)." in text
    assert "trained parameters" in text
    assert OF_ONE_SEED in text


def test_folders_of_one_model_are_put_together(evaluated, tmp_path, capsys):
    run = tmp_path / "runs" / "mores"
    shutil.copytree(FIXTURES / "mores", run)
    shutil.copytree(evaluated / "one", run / "eval")
    elsewhere = tmp_path / "two"
    shutil.copytree(evaluated / "two", elsewhere)
    results = elsewhere / "results.json"
    data = json.loads(results.read_text())
    data["scores"] = {"others": data["scores"]["counts"]}
    results.write_text(json.dumps(data | {"model": str(run)}))
    entry = json.loads((evaluated / "one" / "attention.json").read_text())["model"]
    analysis = tmp_path / "analysis"
    analysis.mkdir()
    entries = {"a": entry | {"model": str(run)}, "b": entry | {"model": "gone/b"}}
    (analysis / "attention.json").write_text(json.dumps(entries))
    mores, b = gather([str(tmp_path / "runs"), str(elsewhere), str(analysis)])
    assert (mores.name, b.name, b.tasks) == ("mores", "b", {})
    assert [*mores.tasks] == ["others", "counts"]
    assert mores.curves["loss"][0] == [2, 4]
    assert b.attention is not None
    assert b.attention.visual_share == pytest.approx(entry["average_visual_share"])
    # What was put on a model is another model.
    results.write_text(json.dumps(data | {"model": str(run), "adapter": "adapters/x"}))
    both = gather([str(run), str(elsewhere)])
    assert [one.name for one in both] == ["mores", "x"]
    assert (both[1].tuning, both[1].parameters) == ("adapter adapters/x", None)
    command = ["report", str(run), f"x={elsewhere}", "--out", str(tmp_path / "p.html"), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["runs"]) == ["mores", "x"]
    assert list(printed["missing"]) == ["x"]
    assert "no training curves, no number of parameters" in printed["missing"]["x"][0]
    assert Path(printed["page"]).is_file()


def test_older_results_are_shown(tmp_path):
    found = gather([str(FIXTURES / "results")])
    (task, *_) = found[0].tasks.values()
    assert task.interval is None
    path = mj.report(FIXTURES / "results", tmp_path / "page.html")
    assert f"{task.score:.3f}" in Page(path).cells


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no folder .*run to report on"),
        ({}, "holds no run, no evaluation and no attention statistics"),
        ({"results.json": "{"}, r"results\.json cannot be used"),
        ({"attention.json": "[]"}, r"attention\.json cannot be used: expected `object`"),
    ],
)
def test_bad_folders_are_told_in_a_sentence(content, message, tmp_path, capsys):
    folder = tmp_path / "run"
    for name, text in () if content is None else [("", ""), *content.items()]:
        folder.mkdir(exist_ok=True)
        if name:
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        gather([str(folder)])
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "page.html").exists()


def asked(scores, images=None) -> dict:
    names = range(len(scores)) if images is None else images
    return {
        ("t", str(n), "?"): AskedQuestion(score, None, (str(name),))
        for n, (score, name) in enumerate(zip(scores, names, strict=True))
    }


def test_findings_follow_from_paired_intervals():
    rng = np.random.default_rng(0)
    base = (rng.random(200) < 0.5).astype(float)
    better = np.where(rng.random(200) < 0.3, 1.0, base)
    other = np.where(rng.random(200) < 0.1, 1 - base, base)
    runs = [
        ReportedRun(name, Path(name), answers=asked(list(values)))
        for name, values in (("base", base), ("better", better), ("other", other))
    ]
    first, second = findings(runs)
    low, high = bootstrap_interval(list(better - base), range(200)) or (0, 0)
    assert low > 0
    mean = 100 * np.mean(better - base)
    told = f"{mean:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}, n = 200"
    assert first.startswith(f"The accuracy of better is higher than that of base: {told}")
    assert second.startswith("No difference in accuracy could be shown between other and base")
    told = as_text(Report(runs, (first, second), (), {}, {}, ()))
    assert told == f"{first}\n{second}\n{OF_ONE_SEED}"
    assert as_text(Report(runs[:1], (), (), {}, {}, ())) == ""
    # The same difference in every question about three images may be chance.
    few = [
        ReportedRun(name, Path(name), answers=asked(list(values), np.arange(200) % 3))
        for name, values in (("base", base), ("better", base + 1))
    ]
    assert findings(few) == [
        "No difference in accuracy could be shown between better and base: +100.0 points, 95% "
        "interval +100.0 to +100.0, n = 200, p = 0.25 (Holm)."
    ]
    few[0].answers = {key: AskedQuestion(0.0, None, None) for key in few[0].answers}
    few[1].answers = dict(few[0].answers)
    assert "do not say which questions share images" in findings(few)[0]


def test_one_bad_model_does_not_flatten_the_others():
    good = {f"run {n}": [0.5 + 0.02 * n, 0.55 + 0.02 * n] for n in range(5)}
    low, high, outside = plots.limits(good | {"bad": [0.01, 0.01], "nan": [float("nan")]})
    assert set(outside) == {"bad", "nan"}
    assert 0.45 < low < 0.5
    assert 0.63 < high < 0.7
    assert plots.limits(good)[2] == []
    low, high, outside = plots.limits({"a": [0.1], "b": [0.9]})  # two of two are no outliers
    assert outside == []
    assert low < 0.1 < 0.9 < high
    colours = [style.colour for style in plots.styles(map(str, range(7))).values()]
    assert len(set(colours)) == 7
    many = {(s.colour, s.marker, s.dash) for s in plots.styles(map(str, range(28))).values()}
    assert len(many) == 28
