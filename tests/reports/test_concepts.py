"""Concepts and shifts as commands and reports: files, words, figures, and mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from moresjax.analysis.concepts import Concepts
from moresjax.analysis.grounding import WordFilter
from moresjax.analysis.shift_study import ShiftOptions
from moresjax.analysis.states import States, StatesWriter
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.reports.concepts import answer_purity, concepts_report
from moresjax.reports.shift import at_one, shift_lines, shift_report
from moresjax.testing import talking_model

SITE, N, D = "llm.norm.out", 90, 16
MODEL = talking_model()
RNG = np.random.default_rng(0)
GROUPS = RNG.integers(0, 3, N)
HEAD = np.asarray(MODEL.mllm.llm.head.kernel[...]).T
# Three words whose directions the head reads as these words most clearly.
SCORES = HEAD @ HEAD.T
MARGINS = np.diag(SCORES) - (SCORES - np.diag([np.inf] * len(HEAD))).max(1)
KEEP = WordFilter().keeper(MODEL.processor.tokenizer)
OWN = [n for n in np.argsort(-MARGINS) if KEEP(int(n))][:3]
WORDS, CENTRES = [KEEP(int(n)) for n in OWN], 2 * HEAD[OWN]
MOVES = 1.5 * RNG.normal(size=(3, D)) * np.linalg.norm(CENTRES) / np.sqrt(3 * D)
A = (CENTRES[GROUPS] + 0.2 * RNG.normal(size=(N, D))).astype(np.float32)
B = (A + MOVES[GROUPS]).astype(np.float32)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The states of a model and of two tuned ones at two layers, with pictures."""
    root = tmp_path_factory.mktemp("stores")
    Image.new("RGB", (8, 6), "red").save(root / "red.png")
    for name, z in {"base": A, "10": (A + B) / 2, "20": B}.items():
        meta = {"model": MODEL.fingerprint, "processor": "p"}
        keys = [("llm.block.out", 0), ("llm.block.out", 1)]
        with StatesWriter(root / name, keys, D, meta, dtype="float32") as writer:
            for n in range(N):
                row = {"id": f"q{n}", "images": ["red.png"], "prediction": WORDS[GROUPS[n]]}
                found = n % 10 != {"base": 0, "10": 1, "20": 2}[name]
                writer.add(row | {"found": found}, {keys[0]: z[n] / 2, keys[1]: z[n]})
    return root


@pytest.fixture(scope="module")
def study(stores, tmp_path_factory):
    tuned = {name: States(stores / name) for name in ("10", "20")}
    options = ShiftOptions(words=4, candidates=37, norm="raw", samples=9, keywords=["seven"])
    out = tmp_path_factory.mktemp("study") / "h"
    layers = {"site": "llm.block.out", "layers": [0, 1]}
    more = {"concepts": [3, 2], "options": options, "model": MODEL}
    return shift_report(States(stores / "base"), tuned, out, **layers, **more), out


def test_concepts_from_states(stores, tmp_path, capsys):
    command = ["analyze", "concepts", "--states", str(stores / "base"), "--layer", "1"]
    options = ["--concepts", "3", "--seeds", "2", "--image-root", str(stores)]
    assert main([*command, *options, "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "kmeans: 3 concepts of 81 states" in printed
    assert "purity by answer: 1.000" in printed
    assert "words: none without a model (--model)" in printed
    assert "stability over seeds [0, 1]: cosine 1.000" in printed
    facts = json.loads((tmp_path / "c" / "concepts.json").read_text())
    assert sorted(facts["answers"]["most_frequent"]) == sorted(WORDS)
    assert facts["states"]["processor"] == "p"
    assert facts["version"]
    assert facts["layer"] == 1
    d = Concepts.load(tmp_path / "c")
    assert len(facts["images"]["ids"]) == len(d) == 3
    assert (tmp_path / "c" / "concepts.png").stat().st_size > 1000
    assert main([*command, "--out", str(tmp_path / "c")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_words_of_concepts_beside_random_ones(stores, tmp_path):
    seen = []

    def scorer(texts, images):
        seen.append((texts, images))
        return np.full((len(texts), len(images)), 0.3)

    options = {"concepts": 3, "layer": 1, "model": MODEL, "words": 3, "candidates": 37}
    facts = concepts_report(
        States(stores / "base"), tmp_path / "c", norm="raw", scorer=scorer, **options
    )
    # The concepts are directions of the head's words, which are the answers.
    first = [own[0] for own in facts["text"]["words"]]
    assert sorted(first) == sorted(WORDS)
    assert first == facts["answers"]["most_frequent"]
    assert facts["clip_score"]["concepts"]["top1"] == pytest.approx(0.75)
    assert len(seen) == 2
    assert len(seen[0][1]) == 81
    assert set(facts["word_overlap"]) == {"concepts", "random"}


def test_recovery_stands_beside_its_controls(study):
    result, out = study
    for name, entry in result["tuned"].items():
        assert entry["n"] == N - 2 * 9, name
        found = at_one(entry)
        assert found["own"]["cosine"] > found["global"]["cosine"]
        assert found["own"]["cosine"] > found["shuffled"]["cosine"]
        assert found["own"]["cosine"] == pytest.approx(1, abs=0.02)
        assert found["own"]["t_overlap"] > found["original"]["t_overlap"]
        assert found["own"]["image_overlap"] >= found["original"]["image_overlap"]
        assert 0 <= found["own"]["keywords"] <= 100
        assert found["own"]["t_overlap_15"] < found["own"]["t_overlap"]
        still = [row["cosine"] for row in entry["recovery"]["original"]]
        assert len(set(still)) == 1
        for row in entry["concepts"]:
            assert set(row["words"]) == {"original", "own", "tuned"}
            assert row["n"] > 1
            assert row["cosine_with_mean"] > 0.9
    text = "\n".join(shift_lines(result))
    assert text.count("own") >= 10
    for line in text.splitlines():
        if line.startswith(("  cosine", "  t_overlap", "  image_overlap", "  relative")):
            assert all(name in line for name in ("original", "own", "global", "shuffled")), line
    assert json.loads((out / "shift.json").read_text())["tuned"].keys() == result["tuned"].keys()


def test_sweeps_and_figures(study):
    result, out = study
    sweeps = result["sweeps"]
    assert [point["x"] for point in sweeps["concepts"]["20"]] == [2, 3]
    assert [point["x"] for point in sweeps["layer"]["10"]] == [0, 1]
    steps = sweeps["step"]["checkpoints"]
    assert [point["x"] for point in steps] == [10, 20]
    assert steps[0]["cosine"]["original"] > steps[1]["cosine"]["original"]
    assert steps[1]["cosine"] == {
        name: row["cosine"] for name, row in at_one(result["tuned"]["20"]).items()
    }
    expected = {"recovery", "concepts", "correlation"}
    expected |= {f"{a}_{b}" for a in ("concepts", "layer", "step") for b in ("cosine", "t_overlap")}
    assert {file.stem for file in out.glob("*.png")} == expected
    assert set(result["correlation"]["consistency"]) == {"10", "20", "overall"}
    assert result["correlation"]["consistency"]["overall"]["n"] == 6


def test_shift_from_a_dictionary(stores, tmp_path, capsys):
    base = ["--base", str(stores / "base"), "--tuned", f"full={stores / '20'}"]
    learn = ["analyze", "concepts", "--states", str(stores / "base"), "--layer", "1"]
    assert main([*learn, "--concepts", "3", "--out", str(tmp_path / "c")]) == 0
    options = ["--concepts", str(tmp_path / "c"), "--alpha", "0,1", "--image-root", str(stores)]
    capsys.readouterr()
    assert main(["analyze", "shift", *base, *options, "--out", str(tmp_path / "h")]) == 0
    printed = capsys.readouterr().out
    assert "full: 72 common samples, 3 concepts" in printed
    assert "by construction" in printed
    names = {file.name for file in (tmp_path / "h").iterdir()}
    assert {"shift.json", "sheet_full_original.png", "sheet_full_tuned.png"} <= names
    result = json.loads((tmp_path / "h" / "shift.json").read_text())
    assert [row["alpha"] for row in result["tuned"]["full"]["recovery"]["own"]] == [0, 1]
    assert result["tuned"]["full"]["concepts"][0]["words"] is None
    wrong = ["analyze", "shift", *base, *options, "--layers", "0", "--out", str(tmp_path / "w")]
    assert main(wrong) == 2
    assert "these concepts are of layer 1, not 0" in capsys.readouterr().err


def test_mistakes_of_a_shift(stores, tmp_path, capsys):
    base = ["analyze", "shift", "--base", str(stores / "base")]
    one = ["--tuned", f"a={stores / '10'}"]

    def told(*arguments):
        assert main([*base, *arguments, "--out", str(tmp_path / "x")]) == 2
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "two states have the name 'a'" in told(*one, *one)
    assert "--alpha takes numbers" in told(*one, "--alpha", "0,b")
    assert "choose one of [0, 1]" in told(*one)
    assert "holds no states" in told("--tuned", str(tmp_path))
    few = ["--layers", "1", "--num-concepts", "2"]
    assert "unknown mean of shifts 'mode'" in told(*one, *few, "--mean", "mode")
    index = [{"id": f"q{n}"} for n in range(N)]
    meta = {"processor": "other", "model": "another"}
    other = States.from_arrays({("llm.block.out", 1): B}, index, meta)
    original = States(stores / "base")
    where = {"site": "llm.block.out", "layers": [1], "concepts": [2]}
    with pytest.raises(UserError, match="with different tokenizers"):
        shift_report(original, {"b": other}, tmp_path / "x", **where)
    wide = States.from_arrays({("llm.block.out", 1): np.tile(B, 2)}, index)
    with pytest.raises(UserError, match="have 16 features, the tuned ones 32"):
        shift_report(original, {"b": wide}, tmp_path / "x", **where)
    with pytest.raises(UserError, match="these states are of a model with fingerprint another"):
        concepts_report(other, tmp_path / "x", concepts=2, model=MODEL)


def test_purity():
    found = answer_purity(np.array([0, 0, 2]), ["a", "b", "b"], 3)
    assert found == {
        "purity": pytest.approx(2 / 3),
        "most_frequent": ["a", None, "b"],
        "share": [0.5, None, 1.0],
    }
