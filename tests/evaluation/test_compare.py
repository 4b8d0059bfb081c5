"""Models compared on the same questions: against scipy, by hand, and what is refused."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.evaluation.compare import MCNEMAR, SIGN_FLIP, compare, compare_table
from moresjax.evaluation.paired import (
    OF_ONE_SEED,
    bootstrap_interval,
    cluster_sums,
    holm,
    mcnemar,
    sign_flip,
)


@pytest.mark.parametrize(("up", "down"), [(0, 0), (1, 0), (3, 9), (9, 3), (7, 7), (40, 61)])
def test_mcnemar_is_the_binomial_test_of_those_who_differ(up, down):
    first = [1] * up + [0] * down + [1, 0, 1]
    second = [0] * up + [1] * down + [1, 0, 1]
    wanted = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-12)
    if up + down <= 14:  # all sign patterns are tried
        differences = np.subtract(first, second).tolist()
        assert sign_flip(differences, range(len(first))) == pytest.approx(wanted, rel=1e-12)


def test_signs_of_clusters_are_flipped_together():
    differences, clusters = [0.5, -0.25, 1.0, 0.25, -0.5], "aabcc"
    sums = [0.25, 1.0, -0.25]
    assert cluster_sums(differences, clusters)[0].tolist() == sums
    flips = [abs(np.dot(s, sums)) for s in itertools.product((1, -1), repeat=3)]
    wanted = np.mean(np.asarray(flips) >= abs(sum(sums)) - 1e-12)
    assert sign_flip(differences, clusters) == wanted
    assert sign_flip([0.5, -0.5], "aa") == 1.0


def test_drawn_sign_flips_approach_those_of_scipy():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.25, 1, 40)
    wanted = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
    ).pvalue
    assert sign_flip(differences.tolist(), range(40)) == pytest.approx(wanted, abs=0.015)


def test_the_interval_is_scipys_bootstrap_of_clusters():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(30), rng.integers(1, 8, 30))
    differences = rng.integers(-1, 2, len(clusters)) + 0.3 * (clusters % 3)
    sums, sizes = cluster_sums(differences.tolist(), clusters.tolist())
    wanted = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=rng,
    ).confidence_interval
    found = bootstrap_interval(differences.tolist(), clusters.tolist())
    assert found == pytest.approx((wanted.low, wanted.high), abs=0.02)
    # As if questions were independent draws, it would be narrower.
    alone = bootstrap_interval((clusters % 3).tolist(), range(len(clusters)))
    shared = bootstrap_interval((clusters % 3).tolist(), clusters.tolist())
    assert alone is not None
    assert shared is not None
    assert shared[1] - shared[0] > 1.3 * (alone[1] - alone[0])
    assert bootstrap_interval([1.0, 0.0], "aa") is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Holm by hand
        ([0.5], [0.5]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm(given, wanted):
    assert holm(given) == pytest.approx(wanted)


def evaluation(folder, scores, task="mine", images=None):
    folder.mkdir(exist_ok=True)
    rows = [
        {"task": task, "id": str(i), "prompt": "?", "prediction": "x", "score": score}
        | {"images": [images[i]] if images else []}
        for i, score in enumerate(scores)
    ]
    with (folder / "predictions.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(folder)


def test_models_are_compared_pair_by_pair(tmp_path, capsys):
    base = [1.0, 0.0] * 20
    better = [1.0] * 30 + base[30:]
    a, b = evaluation(tmp_path / "a", base), evaluation(tmp_path / "b", better)
    c = evaluation(tmp_path / "c", [*base[:38], 1.0, 1.0])
    (one,) = compare([a, b])
    assert (one.n, one.images, one.test, one.scores) == (40, 40, MCNEMAR, (0.5, 35 / 40))
    assert one.difference == pytest.approx(15 / 40)
    assert one.p == one.p_holm == pytest.approx(2 * 0.5**15)
    assert one.finding == f"{b} is higher than {a}"
    (other,) = compare([b, a])
    assert (other.difference, other.finding) == (-one.difference, f"{a} is lower than {b}")
    found = compare([a, b, c])
    assert [(x.first, x.second) for x in found] == [(a, b), (a, c), (b, c)]
    assert [x.p_holm for x in found] == holm([x.p for x in found])
    assert found[1].finding == "no difference could be shown"
    assert main(["compare", a, f"{b}/predictions.jsonl", c]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("mine: 40 questions in 40 groups by image\n")
    assert "0.875 - 0.500 = +0.375, 95% in +0.2" in printed
    assert "no difference could be shown" in printed
    assert main(["compare", a, b, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["comparisons"]
    assert (row["difference"], row["finding"]) == (one.difference, one.finding)
    assert printed.endswith(f"{told['note']}\n")
    assert told["note"] == OF_ONE_SEED
    assert "another seed of training" in OF_ONE_SEED


def test_questions_about_one_image_count_together(tmp_path):
    images = [f"{i // 10}.png" for i in range(40)]
    a = evaluation(tmp_path / "a", [0.0] * 40, images=images)
    b = evaluation(tmp_path / "b", [1.0] * 20 + [0.0] * 20, images=images)
    (one,) = compare([a, b])
    assert (one.images, one.test, one.p) == (4, SIGN_FLIP, 0.5)
    assert one.finding == "no difference could be shown"  # two images of four
    assert "in 4 groups by image" in compare_table([one])


def test_rows_without_images_are_told(tmp_path, caplog):
    a = evaluation(tmp_path / "a", [1, 0])
    compare([a, evaluation(tmp_path / "b", [0, 0])])
    assert not caplog.records
    (tmp_path / "c").mkdir()
    old = (tmp_path / "a" / "predictions.jsonl").read_text().replace(', "images": []', "")
    (tmp_path / "c" / "predictions.jsonl").write_text(old)
    compare([a, tmp_path / "c"])
    assert "c/predictions.jsonl was written before rows named their images" in caplog.text


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    a, b = evaluation(tmp_path / "a", [1, 0]), evaluation(tmp_path / "b", [1, 0, 1])
    other = evaluation(tmp_path / "c", [1, 0], task="theirs")
    silent = evaluation(tmp_path / "d", [None, None])
    for folders, message in (
        ([a, b], "answered different questions of mine: 0 are in the first alone, 1 in the second"),
        ([a, other], "have no task in common: .*a has mine; .*c has theirs"),
        ([a, silent], "has no task whose questions all have a score"),
        ([a, a], "is named twice"),
        ([a], "two evaluations at least are needed to compare, got 1"),
        ([a, str(tmp_path)], "has no predictions.jsonl; give the --out of an evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            compare(folders)
    assert main(["compare", a, b]) == 2
    assert main(["compare", a, a, "--resamples", "3"]) == 2
    assert "--resamples must be at least 100" in capsys.readouterr().err
