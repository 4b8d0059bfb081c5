"""Standard errors clustered by image, against the regression's formula, by hand, and in results."""

import json

import numpy as np
import pytest
from scipy import stats

from moresjax.evaluation.examples import Example
from moresjax.evaluation.presets import table
from moresjax.evaluation.results import EvaluationResult, score_task, write_results
from moresjax.evaluation.scoring import caption_scorer
from moresjax.evaluation.statistics import clustered_stderr, image_clusters, interval
from moresjax.evaluation.tasks import BenchmarkTask


def sandwich(values: np.ndarray, clusters: np.ndarray) -> float:
    """Cluster-robust (CR1) standard error of a regression on a constant, from its matrices."""
    n, names = len(values), np.unique(clusters)
    design = np.ones((n, 1))
    bread = np.linalg.inv(design.T @ design)
    residuals = values - design @ (bread @ design.T @ values)
    meat = np.zeros((1, 1))
    for name in names:
        chosen = clusters == name
        score = design[chosen].T @ residuals[chosen]
        meat += np.outer(score, score)
    correction = len(names) / (len(names) - 1) * (n - 1) / (n - 1)
    return float(np.sqrt(correction * (bread @ meat @ bread)[0, 0]))


@pytest.mark.parametrize(("n", "groups"), [(2, 2), (40, 7), (500, 16), (300, 300)])
def test_errors_equal_the_regression_on_a_constant(n, groups):
    rng = np.random.default_rng(n)
    for _ in range(5):
        clusters = np.r_[np.arange(groups), rng.integers(0, groups, n - groups)]
        values = (rng.random(n) < 0.3 + 0.4 * (clusters % 2)).astype(float)
        expected = sandwich(values, clusters)
        assert clustered_stderr(values.tolist(), clusters.tolist()) == pytest.approx(expected)


def test_errors_without_shared_images_are_the_usual_ones():
    values = np.random.default_rng(0).random(30)
    expected = values.std(ddof=1) / np.sqrt(30)
    assert clustered_stderr(values.tolist(), range(30)) == pytest.approx(expected)
    # Copies of every question teach nothing: by hand, 2/1 * (1^2 + 1^2) / 4^2.
    assert clustered_stderr([1.0, 1.0, 0.0, 0.0], "aabb") == pytest.approx(0.5)
    assert clustered_stderr([1.0, 1.0, 0.0, 0.0] * 9, "aabb" * 9) == pytest.approx(0.5)
    assert clustered_stderr([1.0], "a") is clustered_stderr([1.0, 0.0], "aa") is None


def test_intervals_are_of_students_t():
    for clusters in (2, 5, 398):
        low, high = interval(0.6, 0.01, clusters)
        expected = stats.t.interval(0.95, clusters - 1, 0.6, 0.01)
        assert (low, high) == pytest.approx(expected)
    assert interval(0.6, 0.01) == pytest.approx(stats.norm.interval(0.95, 0.6, 0.01))
    assert interval(0.9, 0.5, 9, share=True)[1] == 1
    assert interval(0.1, 0.5, 9, share=True)[0] == 0


def test_examples_that_share_an_image_are_one_cluster():
    array, other = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    images = [("a",), (), (array,), ("b", "c"), (), (other,), ("c",), ("a", "b"), (array,), (b"x",)]
    examples = [Example(str(i), "?", images=shown) for i, shown in enumerate(images)]
    assert image_clusters(examples) == [0, 1, 2, 0, 4, 5, 0, 0, 2, 9]


def questions(*images: str) -> BenchmarkTask:
    return BenchmarkTask(
        "asked", [Example(str(i), "Is it?", "yes", (image,)) for i, image in enumerate(images)]
    )


def answered(task: BenchmarkTask, *answers: str) -> EvaluationResult:
    return score_task(task, {str(i): text for i, text in enumerate(answers)})


def test_results_say_which_error_it_is():
    shared = answered(questions("a", "a", "b", "b", "c"), "yes", "yes", "no", "no", "yes").scores
    entry = shared["asked"]
    expected = sandwich(np.array([1, 1, 0, 0, 1.0]), np.array([0, 0, 1, 1, 2]))
    assert entry["stderr"] == pytest.approx(expected)
    assert entry["interval95"] == list(interval(0.6, entry["stderr"], 3, share=True))
    assert (entry["stderr_kind"], entry["clusters"]) == ("clustered by image", 3)
    assert "standard error clustered by image in 3 groups)" in table(shared)
    apart = answered(questions(*"abcde"), "yes", "yes", "no", "no", "yes").scores
    assert apart["asked"]["stderr"] == pytest.approx(np.std([1, 1, 0, 0, 1], ddof=1) / 5**0.5)
    assert apart["asked"]["stderr"] < entry["stderr"]
    assert "0.600 +- 0.245, 95% in 0.000 to 1.000  (" in table(apart)
    assert "standard error i.i.d.)" in table(apart)


def test_one_cluster_has_a_score_without_an_error():
    scores = answered(questions("a", "a"), "yes", "no").scores
    assert scores["asked"]["stderr"] is None
    assert "interval95" not in scores["asked"]
    assert table(scores).split("  (")[0].endswith("0.500")
    scores["asked"]["benchmark"] = "hallusionbench"
    assert table(scores, ["mores-table6"]).split()[-1] == "50.0"  # still a share, in percent


def test_cider_is_no_share_and_not_cut_at_one():
    task = BenchmarkTask(
        "captions",
        [Example(str(i), "?", [text], (str(i),)) for i, text in enumerate(("a b c d", "e f g h"))],
        scorer=caption_scorer,
    )
    entry = answered(task, "a b c d", "e f g").scores["captions"]
    assert entry["interval95"][1] > entry["score"] > 1


def test_results_of_version_0_2_stay_beside_new_ones(tmp_path):
    old = {"benchmark": "gqa", "metric": "accuracy", "score": 0.5, "fraction": True}
    old |= {"stderr": 0.1, "n": 26, "missing": 0, "max_new_tokens": 128, "details": {}}
    data = {"fingerprint": "", "processor": {"hash": ""}, "scores": {"gqa": old}}
    (tmp_path / "results.json").write_text(json.dumps(data))
    write_results(answered(questions("a", "b"), "yes", "no"), tmp_path)
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert scores["gqa"] == old
    lines = table(scores).split("\n")
    assert " ".join(lines[0].split()) == "gqa 0.500 +- 0.100 (accuracy, n = 26)"
    assert len(lines) == 2
