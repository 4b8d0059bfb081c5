"""`analyze steer` and `analyze separability`: from stores of states to vectors and numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from moresjax.analysis.concepts import Concepts
from moresjax.analysis.states import StatesWriter
from moresjax.analysis.vectors import read_vector_facts
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.steering.build import check_model
from moresjax.inference.load import load
from moresjax.reports.steering import layer_figure, size_figure

BASE = str(Path(__file__).parents[1] / "fixtures" / "v0_1" / "base")
SITE, D = "llm.block.out", 8
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Folders of states and concepts, and a file of questions, by name."""
    root = tmp_path_factory.mktemp("steer")
    model = load(BASE)
    facts = {"model": model.fingerprint, "weights": model.exact_fingerprint, "take": "prompt"}
    sides = {
        "yes": ["yes"] * 8,
        "no": ["no"] * 8,
        "both": ["yes"] * 8 + ["no"] * 8,
        "other": ["no"] * 4,
    }
    for name, answers in sides.items():
        meta = (
            facts
            | {"data": f"of {name}"}
            | (dict.fromkeys(("model", "weights"), "another") if name == "other" else {})
        )
        with StatesWriter(root / name, [(SITE, 0), (SITE, 1)], D, meta, dtype="float32") as writer:
            for number, answer in enumerate(answers):
                row = {"id": f"{number}", "prediction": answer, "found": True}
                shift = 3.0 * (answer == "yes")
                states = {(SITE, n): RNG.standard_normal(D) + n * shift for n in (0, 1)}
                writer.add(row, states)
    concepts = Concepts("kmeans", 30 * np.eye(3, D), np.ones(3, int))
    concepts.save(root / "concepts", {"site": SITE, "layer": 1, "states": facts})
    questions = [{"question": f"is there a {x} ?", "answer": "yes"} for x in ("two", "six")]
    lines = ["from moresjax.evaluation.examples import Example"]
    lines += ["from moresjax.evaluation.tasks import BenchmarkTask"]
    lines += ['known = Example("1", "?", "two", metadata={"answer_type": "number"})']
    lines += ['task = BenchmarkTask("typed", [known])', ""]
    (root / "typed.py").write_text("\n".join(lines))
    (root / "asked.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return {path.stem: str(path) for path in root.iterdir()}


def command(data, out, *arguments) -> list[str]:
    common = ["--model", BASE, "--tasks", data["asked"] + ".jsonl", "--out", str(out), "--json"]
    return ["analyze", "steer", *common, *map(str, arguments)]


@pytest.fixture(scope="module")
def asked(data):
    return data | {name: str(Path(data[name]).with_suffix("")) for name in ("asked", "typed")}


def test_two_stores_become_a_vector_with_its_controls(asked, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--source", asked["yes"], "--target", asked["no"], "--layers", "1"]
    options += ["--alpha", "0.5,1", "--sizes", "4", "--gguf", "--max-new-tokens", "3"]
    options += ["--types", asked["typed"] + ".py:task"]
    assert main(command(asked, out, *options)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steering"] == "yes>no"
    by_name = {(row["vector"], row.get("alpha")): row for row in found["rows"]}
    assert {name for name, _ in by_name} == {
        *("baseline", "yes>no", "random", "shuffled", "reversed", "zero"),
        *(f"n4.{n}" for n in range(5)),
    }
    assert by_name["zero", 0.0]["changed"] == 0
    assert by_name["yes>no", 0.5]["n"] == 2
    assert len(found["cosines"]["4"]) == 5
    assert [*by_name["random", 1.0]["answer_types"]] == ["number", "unrecognised"]
    facts = read_vector_facts(out)
    assert (facts["yes>no"]["layer"], facts["yes>no"]["n"]) == (1, [8, 8])
    assert facts["yes>no"]["data"] == ["of yes", "of no"]
    assert len(found["data"]) == 12
    names = {path.name for path in out.iterdir()}
    assert {"vectors.npz", "steering.json", "predictions.jsonl", "yes-to-no.gguf"} <= names
    assert {"changes.png", "kept.png", "asked.html", "sizes.png"} <= names
    assert "layers.png" not in names
    # The file feeds the method, whose answers are those of the run.
    spec = f"steer:vector={out}/vectors.npz:yes>no,layers=1,positions=last_prompt|generated"
    model = load(BASE, tuning=spec)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    own = {row["id"]: row for row in rows if row["trial"].startswith("yes>no layer=1 alpha=1 ")}
    for row in own.values():
        assert model.generate(row["prompt"], max_new_tokens=3) == row["prediction"]
        assert row["max_new_tokens"] == 3
    assert len(own) == 2
    assert main(command(asked, out, *options)) == 0  # a finished run asks nothing again
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]
    assert len((out / "predictions.jsonl").read_text().splitlines()) == len(rows)


def test_one_store_and_a_task_or_concepts_with_first_tokens(asked, tmp_path, capsys):
    options = ["--states", asked["both"], "--steer", "answers:yes>no", "--limit", 1]
    options += ["--positions", "all", "--positions", "generated"]
    assert main(command(asked, tmp_path / "a", *options)) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    tried = [(row["vector"], row.get("positions")) for row in rows]
    layers = [f"yes>no@{layer}" for layer in (0, 1)]
    assert tried[:5] == [
        ("baseline", None),
        *((name, positions) for name in layers for positions in ("all", "generated")),
    ]
    controls = ("random", "shuffled", "reversed", "zero")
    assert tried[5:] == [(name, "all") for name in controls]
    assert (tmp_path / "a" / "layers.png").is_file()
    options = ["--fine", asked["concepts"], "--states", asked["both"], "--keep", 1, "--limit", 1]
    assert main(command(asked, tmp_path / "b", *options)) == 0
    found = json.loads(capsys.readouterr().out)
    (name,) = found["chosen"]
    by_name = {row["vector"]: row for row in found["rows"]}
    controls = [f"{name} random", f"{name} reversed"]
    assert [*by_name] == ["baseline", name, *controls, "zero"]
    assert (by_name["zero"]["alpha"], by_name["zero"]["changed"]) == (0, 0)
    facts = read_vector_facts(tmp_path / "b")
    assert [*facts] == [name, *controls]
    assert [own.get("control") for own in facts.values()] == [None, "random", "reversed"]
    own, drawn, back = np.load(tmp_path / "b" / "vectors.npz").values()
    np.testing.assert_array_equal(back, -own)
    assert np.linalg.norm(drawn) == pytest.approx(np.linalg.norm(own), rel=1e-5)
    assert abs(drawn @ own) < 0.9 * own @ own


def test_the_figure_by_number_of_states_has_every_draw():
    rows = [
        {"vector": f"n{n}.{draw}", "success": n / 10 + draw / 100}
        for n in (2, 4)
        for draw in (0, 2)
    ]
    rows += [{"vector": "a>b", "success": 1.0}, {"vector": "n4.4", "success": None}]
    figure = size_figure({4: [0.5, 0.9], 2: [0.3]}, rows)
    cosines, successes = (
        [np.round(np.asarray(line.get_xydata()), 6).tolist() for line in axis.lines]
        for axis in figure.axes
    )
    assert cosines == [[[2, 0.3], [4, 0.5], [4, 0.9]], [[2, 0.3], [4, 0.7]]]
    assert successes == [[[2, 0.2], [2, 0.22], [4, 0.4], [4, 0.42]], [[2, 0.21], [4, 0.41]]]
    plt.close(figure)


def test_the_figure_by_layer_has_the_shares_of_each_layer():
    rows = [
        {"vector": f"a>b@{n}", "layer": n, "alpha": alpha, "positions": "all"}
        | {"success": 0.1 * n * alpha, "kept": None if alpha == 2 else 0.5}
        for alpha in (1.0, 2.0)
        for n in (3, 7)
    ]
    control = {"vector": "random", "layer": 7, "alpha": 1.0, "positions": "all", "success": 1.0}
    figure = layer_figure([*rows[::-1], control])
    assert figure is not None
    drawn = {str(x.get_label()): np.asarray(x.get_xydata()).tolist() for x in figure.axes[0].lines}
    wanted = {"success, alpha 1": [0.3, 0.7], "kept, alpha 1": [0.5, 0.5]}
    wanted["success, alpha 2"] = [0.6, 1.4]
    points = {name: [[3, y[0]], [7, y[1]]] for name, y in wanted.items()}
    assert {name: np.round(own, 6).tolist() for name, own in drawn.items()} == points
    plt.close(figure)
    assert layer_figure(rows[:1]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "vectors are made of --source and --target states"),
        (["--source", "{yes}"], "vectors are made of --source and --target states"),
        (["--states", "{both}"], "--states needs --steer TASK"),
        (["--source", "{yes}", "--target", "{yes}"], "the answer 'yes' is the source's and the ta"),
        (["--source", "{yes}", "--target", "{other}"], "are of different models: model is"),
        (["--source", "{yes}", "--target", "{no}", "--layers", "x"], "--layers takes numbers"),
        (["--source", "{yes}", "--target", "{no}", "--layers", "7"], "layer of the states"),
        (["--source", "{yes}", "--target", "{no}", "--sizes", "9"], "there are 1 to 8"),
        (["--source", "{yes}", "--target", "{no}", "--gguf"], "blocks from 1 on, and vector"),
        (["--fine", "{concepts}", "--steer", "gender"], "--fine makes vectors of concepts"),
        (["--fine", "{yes}"], "holds no concepts"),
    ],
)
def test_options_that_do_not_go_together_are_refused(asked, tmp_path, capsys, options, message):
    options = [option.format(**asked) for option in options]
    assert main(command(asked, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_states_of_another_model_are_refused_unless_that_is_meant(asked, tmp_path, capsys):
    options = ["--states", asked["both"], "--steer", "answers:yes>no", "--limit", 1]
    changed = ["--tuning", "steer:alpha=0"]
    assert main([*command(asked, tmp_path / "a", *options), *changed]) == 2
    assert "is made of states of another model or tuning" in capsys.readouterr().err
    model, own = load(BASE), {"model": "x", "weights": load(BASE).exact_fingerprint}
    assert "of a twin of this model" in check_model({"v": own}, model)
    assert check_model({"v": own | {"model": model.fingerprint}}, model) == ""
    with pytest.raises(UserError, match="another template, tokenizer or image size"):
        check_model({"v": {"processor": "x"}}, model)


def test_vectors_of_a_twin_in_another_precision_are_allowed_and_named(asked, tmp_path, capsys):
    facts = load(BASE).provenance
    eight = load(BASE, quantize="int8")
    note = "the states are of a twin of this model: float32, float32, this one int8, float32"
    assert check_model({"v": facts}, eight) == note
    half = load(BASE, dtype="bfloat16")
    assert "float32, float32, this one float32, bfloat16" in check_model({"v": facts}, half)
    assert check_model({"v": half.provenance}, half) == ""
    # Another model is none, though its other parts and its precision are like these.
    other = load(BASE, quantize="int8")
    other.mllm.llm.norm.scale[...] += 1
    tuned = load(BASE, quantize="int8", tuning="lora:rank=1")
    for model in (other, tuned):
        with pytest.raises(UserError, match="made of states of another model or tuning"):
            check_model({"v": facts}, model)


def test_separability_is_written_with_its_figures(asked, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--states", asked["both"], "--by", "prediction", "--out", str(out)]
    assert main(["analyze", "separability", *arguments]) == 0
    assert "llm.block.out 1: test accuracy" in capsys.readouterr().out
    found = json.loads((out / "separability.json").read_text())
    tests = [layer["test"] for layer in found["layers"]]
    assert tests[1] == 1.0 >= tests[0]
    assert len(found["labels"]) == len(found["layers"][0]["plane"]) == 16
    assert found["data"] == "of both"
    assert {path.name for path in out.iterdir()} == {
        *("separability.json", "probes.png", "planes.png")
    }
    for more, message in (
        (["--by", "kind"], "no state has the field 'kind'"),
        (["--by", "prediction", "--classes", "yes,maybe"], "no state has prediction 'maybe'"),
        (["--by", "prediction", "--classes", "yes"], "there is only yes"),
    ):
        rest = ["--states", asked["both"], "--out", str(tmp_path / "new"), *more]
        assert main(["analyze", "separability", *rest]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_sensitivities_are_written_with_their_figure(asked, tmp_path, capsys):
    common = ["analyze", "sensitivity", "--model", BASE, "--states", asked["both"], "--json"]
    common += ["--by", "prediction", "--tasks", asked["asked"] + ".jsonl"]
    out = tmp_path / "out"
    options = ["--answer", "yes", "--against", "no", "--runs", "3", "--out", str(out)]
    assert main([*common, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "sensitivity.json").read_text())
    assert (out / "sensitivity.png").is_file()
    assert (len(found["data"]), found["states_data"]) == (12, "of both")
    assert [(row["concept"], row["layer"]) for row in found["concepts"]] == [
        *(("no", 0), ("yes", 0), ("no", 1), ("yes", 1))
    ]
    assert (found["n"], found["tests"], len(found["concepts"][0]["scores"])) == (2, 4, 3)
    for options, message in (
        (["--concepts", "maybe"], "no state has the concept 'maybe'"),
        (["--select", "answer=never"], "no question is selected"),
        (["--against", "no"], "against needs the answer"),
    ):
        assert main([*common, *options, "--out", str(tmp_path / "bad")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()
    common[common.index(asked["both"])] = asked["other"]
    assert main([*common, "--out", str(tmp_path / "bad")]) == 2
    assert "states of another model" in capsys.readouterr().err
