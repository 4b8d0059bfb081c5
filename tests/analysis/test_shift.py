"""Shift of concepts: the identities that hold by construction, hand-made cases, and scipy."""

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import linear_sum_assignment

from moresjax.analysis.concepts import cosines, learn
from moresjax.analysis.shift import (
    CONTROLS,
    MEANS,
    Comparison,
    common_samples,
    consistency,
    control_shifts,
    correlation,
    correlations,
    match_nearest,
    recoveries,
    recovery,
    shift_vectors,
    text_overlap,
)
from moresjax.analysis.states import States
from moresjax.core.errors import UserError

RNG = np.random.default_rng(0)
GROUPS = RNG.integers(0, 5, 300)
A = (4 * RNG.normal(size=(5, 12))[GROUPS] + RNG.normal(size=(300, 12))).astype(np.float32)
MOVES = 2 * RNG.normal(size=(5, 12))
B = (A + MOVES[GROUPS] + 1 + 0.5 * RNG.normal(size=(300, 12))).astype(np.float32)
BASE, TUNED = learn(A, concepts=5), learn(B, concepts=5)
LABELS = BASE.assign(A)


def compared(a=A, b=B, labels=LABELS, base=BASE.vectors, tuned=TUNED.vectors):
    return Comparison.of(a, b, labels, base, tuned)


def test_with_kmeans_a_shifted_concept_is_the_mean_of_the_tuned_states():
    """Why recovery by alpha = 1 is near the best by construction."""
    shifted = BASE.vectors + shift_vectors(A, B, LABELS, 5)
    means = np.stack([B[k == LABELS].mean(0) for k in range(5)])
    np.testing.assert_allclose(shifted, means, atol=1e-5)


def test_without_tuning_nothing_moves():
    both = compared(b=A, tuned=BASE.vectors)
    assert both.match.tolist() == list(range(5))
    assert match_nearest(BASE.vectors, BASE.vectors).tolist() == list(range(5))
    for shifts in control_shifts(A, A, LABELS, 5).values():
        for shift in shifts:
            np.testing.assert_array_equal(shift, 0)
    own = recoveries(both)["own"][0]
    assert own["cosine"] == pytest.approx(1)
    assert own["gain"] == pytest.approx(0, abs=1e-9)
    assert own["relative_distance_gain"] is None  # nothing to gain


def test_rotations_change_no_number_and_neither_does_the_order_of_samples():
    expected = recoveries(compared(), [0.5, 1], seed=3)
    rotation = np.linalg.qr(RNG.normal(size=(12, 12)))[0]
    turned = compared(
        A @ rotation, B @ rotation, LABELS, *(x.vectors @ rotation for x in (BASE, TUNED))
    )
    for name, rows in recoveries(turned, [0.5, 1], seed=3).items():
        for row, other in zip(rows, expected[name], strict=True):
            assert row == pytest.approx(other, abs=1e-4)
    order = RNG.permutation(300)
    mixed = recoveries(compared(A[order], B[order], LABELS[order]), [0.5, 1])
    for name in ("original", "own", "global"):
        for row, other in zip(mixed[name], expected[name], strict=True):
            assert row == pytest.approx(other, abs=1e-6)
    before, after = consistency(A, B, LABELS, 5), consistency(A[order], B[order], LABELS[order], 5)
    for one, other in zip(before, after, strict=True):
        assert vars(one) == pytest.approx(vars(other))


def test_three_clusters_by_hand():
    """Two concepts move along the axes by 1, one stands still; the tuned are in other order."""
    a = np.array([[1.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 3]])
    moves = np.array([[0.0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]])
    labels = np.array([0, 0, 1, 1, 2])
    base = np.diag([1.0, 2, 3])
    tuned = np.array([[0.0, 0, 3], [1, 1, 0], [0, 2, 1]])
    both = Comparison.of(a, a + moves, labels, base, tuned)
    assert both.match.tolist() == [1, 2, 0]
    np.testing.assert_allclose(shift_vectors(a, a + moves, labels, 3), moves[[0, 2, 4]])
    found = recovery(base, base + moves[[0, 2, 4]], both.tuned)
    np.testing.assert_allclose(found.cosine, 1)
    np.testing.assert_allclose(found.gain, [1 - 0.5**0.5, 1 - 2 / 5**0.5, 0], atol=1e-12)
    np.testing.assert_allclose(found.relative_gain, [2**0.5 - 1, 5**0.5 / 2 - 1, 0], atol=1e-12)
    np.testing.assert_allclose(found.distance_gain, [1, 1, 0])
    np.testing.assert_allclose(found.relative_distance_gain[:2], 1)
    rows = recoveries(both, [0, 1])
    assert list(rows) == list(CONTROLS)
    assert [rows[name][0]["gain"] for name in CONTROLS] == [0] * 4
    assert rows["own"][1]["improved"] == pytest.approx(2 / 3)
    assert rows["own"][1]["cosine"] > rows["global"][1]["cosine"]


def test_own_shifts_recover_more_than_the_controls_where_concepts_move_apart():
    rows = {name: found[0]["cosine"] for name, found in recoveries(compared()).items()}
    assert rows["own"] > rows["global"] > rows["original"]
    assert rows["own"] > rows["shuffled"]
    # Where all move alike, one global shift is as good: the controls tell.
    alike = (A + 3 * MOVES[0]).astype(np.float32)
    rows = recoveries(compared(b=alike, tuned=learn(alike, concepts=5).vectors))
    assert rows["own"][0]["cosine"] == pytest.approx(rows["global"][0]["cosine"], abs=1e-6)
    assert rows["own"][0]["cosine"] == pytest.approx(rows["shuffled"][0]["cosine"], abs=1e-6)


@pytest.mark.parametrize("how", MEANS)
def test_means_of_shifts(how):
    found = shift_vectors(A, B, LABELS, 5, how)
    own_a, own_b = A[LABELS == 2].astype(float), B[LABELS == 2].astype(float)
    expected = {
        "mean": (own_b - own_a).mean(0),
        "median": np.median(own_b - own_a, 0),
        "trimmed": scipy.stats.trim_mean(own_b - own_a, 0.1),
        "difference-of-medians": np.median(own_b, 0) - np.median(own_a, 0),
        "difference-of-trimmed": scipy.stats.trim_mean(own_b, 0.1)
        - scipy.stats.trim_mean(own_a, 0.1),
    }
    np.testing.assert_allclose(found[2], expected[how])


def test_bijective_matching_is_scipys_and_nearest_may_share():
    order = linear_sum_assignment(-cosines(BASE.vectors, TUNED.vectors))[1]
    np.testing.assert_array_equal(compared().match, order)
    one = np.array([[1.0, 0], [1, 0.1]])
    assert match_nearest(one, np.array([[1.0, 0.05], [-1, 0]])).tolist() == [0, 0]


def test_overlap_of_words():
    assert text_overlap(["a", "b", "c"], ["c", "d", "a"]) == pytest.approx(200 / 3)
    assert text_overlap(["a", "b", "c"], ["c", "a"], of=15) == pytest.approx(200 / 15)
    assert text_overlap([], ["a"]) is None


def test_consistency_by_all_pairs_and_of_few_samples():
    labels = np.where(LABELS == 4, 0, LABELS)
    labels[0], labels[1:3] = 4, 0
    found = consistency(A, B, labels, 6)
    deltas = (B - A)[labels == 2]
    pairs = cosines(deltas, deltas)[~np.eye(len(deltas), dtype=bool)]
    assert found[2].pairwise_cosine == pytest.approx(pairs.mean())
    assert found[2].cosine_with_mean == pytest.approx(cosines(deltas, deltas.mean(0)[None]).mean())
    assert found[2].magnitude == pytest.approx(np.linalg.norm(deltas.mean(0)), rel=1e-5)
    assert (found[4].n, found[4].pairwise_cosine, found[4].std_magnitude) == (1, None, None)
    assert found[4].cosine_with_mean == pytest.approx(1)
    assert set(vars(found[5]).values()) == {0, None}


def test_a_concept_without_common_samples_is_left_out():
    kept = LABELS != 3
    both = compared(A[kept], B[kept], LABELS[kept])
    rows = recoveries(both)
    some = control_shifts(both.a, both.b, both.labels, 5)
    for shifts in some.values():
        assert all(np.isfinite(shift).all() for shift in shifts)
        assert all((shift[3] == 0).all() for shift in shifts)
    shifted = both.base + some["own"][0]
    expected = recovery(both.base, shifted, both.tuned).cosine[[0, 1, 2, 4]].mean()
    assert rows["own"][0]["cosine"] == pytest.approx(expected)


def test_correlations_are_scipys():
    x, y = RNG.normal(size=9), RNG.normal(size=9)
    expected = scipy.stats.pearsonr(x, y)
    found = correlations({"a": ([*x[:5]], [*y[:5]]), "b": ([*x[5:]], [*y[5:]])})
    assert found["overall"]["r"] == pytest.approx(expected.statistic)
    assert found["overall"]["p"] == pytest.approx(expected.pvalue)
    assert found["b"]["n"] == 4
    assert correlation([1, 1, 1], [1, 2, 3])["r"] is None
    assert correlation([1, 2, float("nan"), None], [1, 2, 3, 4])["n"] == 2


def test_common_samples_are_found_in_both():
    def store(rows):
        arrays = {("llm.norm.out", 0): np.zeros((len(rows), 2))}
        return States.from_arrays(arrays, [{"id": name, "found": found} for name, found in rows])

    one = store([("a", True), ("b", False), ("c", True), ("d", True), ("d", True)])
    other = store([("d", True), ("c", True), ("b", True), ("d", True), ("e", True)])
    a, b = common_samples(one, other)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(2, 1), (3, 0), (4, 3)]
    with pytest.raises(UserError, match="no sample is found in both"):
        common_samples(one, store([("a", False), ("x", True)]))
    with pytest.raises(UserError, match="unknown mean of shifts 'mode'"):
        shift_vectors(A, B, LABELS, 5, "mode")
