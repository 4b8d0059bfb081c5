"""Steering vectors, selection scores, side effects and probes, against hand-made cases."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from moresjax.analysis.separability import labelled, separability
from moresjax.analysis.states import States
from moresjax.analysis.steering import (
    Selection,
    choose,
    coarse,
    contrast,
    controls,
    count_changes,
    fine,
    selection,
    side_effects,
    subsampled,
)
from moresjax.core.errors import UserError

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((30, 8)), RNG.standard_normal((20, 8)) + 1


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_coarse_vector_leads_from_mean_to_mean():
    vector = coarse(A, B)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(A.mean(0) + vector, B.mean(0), atol=1e-6)
    np.testing.assert_allclose(coarse(B, A), -vector, atol=1e-7)


def test_a_fine_vector_leads_to_its_second_concept_in_all_pairs():
    concepts, noise = RNG.standard_normal((10, 8)) + 1, 0.5 * RNG.standard_normal((30, 8))
    vectors, pairs = fine(concepts), 0
    for i in range(10):
        for j in {*range(10)} - {i}:
            before, after = (
                np.mean([cosine(h + moved, concepts[j]) for h in concepts[i] + noise])
                for moved in (0.0, vectors[i, j])
            )
            pairs += after > before
            np.testing.assert_allclose(concepts[i] + vectors[i, j], concepts[j], atol=1e-5)
    assert pairs == 90


def test_contrast_vectors_are_those_of_scikit_learn_with_the_sign_of_the_pairs():
    shared = np.eye(8)[0]
    negative = RNG.standard_normal((40, 8))
    positive = negative + 3 * shared + RNG.standard_normal((40, 8)) * [0, 2, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(
        contrast(positive, negative), (positive - negative).mean(0), atol=1e-5
    )
    middle = (positive + negative) / 2
    data = {
        "pca_diff": positive - negative,
        "pca_center": np.concatenate([positive - middle, negative - middle]),
    }
    for method, points in data.items():
        found, expected = (
            contrast(positive, negative, method),
            np.asarray(PCA(1).fit(points).components_)[0],
        )
        assert abs(cosine(found, expected)) > 1 - 1e-6
        assert np.mean(positive @ found > negative @ found) >= 0.5
        np.testing.assert_allclose(contrast(negative, positive, method), -found, atol=1e-5)
    assert cosine(contrast(positive, negative, "pca_center"), shared) > 0.8
    # What all pairs share is the mean that a principal component leaves out.
    assert abs(cosine(contrast(positive, negative, "pca_diff"), shared)) < 0.3


@pytest.mark.parametrize(
    ("changes", "score", "targets"),
    [
        ({"no": 50, "yes": -60, "red": 2, "two": 1}, 48, ("no",)),
        ({"two": 30, "three": 28, "one": -70, "red": 3}, 25, ("two", "three")),
        ({"no": 7}, 7, ("no",)),  # a lone answer is one answer, not its letters
        ({"a": 4, "b": 4}, 4, ("a", "b")),
        ({"a": 3, "b": 3, "c": 3, "d": 3, "e": 3, "f": 1}, 3, ("a", "b", "c", "d", "e")),
        ({"yes": 0, "no": 0}, 0, ()),
        ({"yes": -5}, 0, ()),
        ({}, 0, ()),
        # An answer that steering lost entirely counts, with all that it lost.
        ({"yes": -40, "no": 12, "black": 11}, 51, ("no", "black")),
    ],
)
def test_selection_scores_of_hand_made_cases(changes, score, targets):
    found = selection(changes)
    assert (found.score, found.targets) == (score, targets)


def test_changes_are_over_the_answers_of_both_sides():
    found = count_changes(["yes", "yes", "white"], ["no", "yes", "no"])
    assert found == {"yes": -1, "white": -1, "no": 2}


def test_the_most_selective_vectors_are_kept():
    found = {
        "a": Selection(5, ("no",), {}),
        "b": Selection(9, ("no",), {}),
        "c": Selection(7, ("two", "three"), {}),
        "d": Selection(3, ("red",), {}),
        "e": Selection(0, (), {}),
    }
    assert choose(found) == ["b", "a", "d"]
    assert choose(found, keep=2) == ["b", "a"]
    assert choose(found, unique=True) == ["b", "d"]
    assert choose(found, targets=2, unique=True) == ["b", "c", "d"]
    with pytest.raises(UserError, match="at least 1, got 0 and 5"):
        choose(found, targets=0)


def test_controls_have_the_norm_the_labels_or_the_sign_of_nothing():
    vector, found = coarse(A, B), controls(A, B, seed=3)
    np.testing.assert_array_equal(found["reversed"], -vector)
    assert np.linalg.norm(found["random"]) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    assert abs(cosine(found["random"], vector)) < 0.7
    assert np.linalg.norm(found["shuffled"]) < 0.6 * np.linalg.norm(vector)
    again = controls(A, B, seed=3)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    assert not np.array_equal(found["random"], controls(A, B, seed=4)["random"])


def test_vectors_of_more_states_are_nearer_to_that_of_all():
    whole = coarse(A, B)
    found = subsampled(A, B, [2, 10, 20], draws=20, seed=1)
    near = [np.mean([cosine(v, whole) for v in found[size]]) for size in (2, 10, 20)]
    assert near == sorted(near)
    assert near[-1] > 0.95
    with pytest.raises(UserError, match="vectors of 21 states a side: there are 1 to 20"):
        subsampled(A, B, [21])


def test_side_effects_tell_source_answers_from_the_others():
    baseline = ["yes", "yes", "yes", "red", "two", "no"]
    steered = ["no", "no", "yes", "red", "no", "no"]
    found = side_effects(
        baseline, steered, "yes".__eq__, "no".__eq__, ([1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 1])
    )
    assert (found.source, found.success, found.kept) == (
        3,
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    )
    assert found.changed == pytest.approx(0.5)
    assert found.accuracy == (1.0, pytest.approx(2 / 3))
    assert (found.distinct, found.targets) == ((4, 3), (1, 4))
    nothing = side_effects(["a"], ["a"], "b".__eq__, "c".__eq__)
    assert (nothing.success, nothing.kept, nothing.accuracy) == (None, 1.0, None)


def test_probes_are_those_of_scikit_learn_and_grow_with_what_a_layer_knows():
    labels = [str(n % 3) for n in range(120)]
    centres = 4 * np.eye(3, 6)[np.arange(120) % 3]
    noise = RNG.standard_normal((120, 6))
    arrays = {("llm.block.out", n): noise + n * centres / 2 for n in range(3)}
    found = separability(States.from_arrays(arrays, [{"id": str(n)} for n in range(120)]), labels)
    tests = [one.test for one in found]
    assert tests == sorted(tests)
    assert tests[0] < 0.6
    assert tests[-1] > 0.95
    train, test = train_test_split(np.arange(120), test_size=0.3, random_state=0, stratify=labels)
    x, y = arrays["llm.block.out", 1], np.array(labels)
    scaler = StandardScaler().fit(x[train])
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(x[train]), y[train])
    assert found[1].test == pytest.approx(probe.score(scaler.transform(x[test]), y[test]))
    assert found[1].majority == pytest.approx(1 / 3, abs=0.03)
    expected = PCA(2).fit(x).explained_variance_ratio_
    np.testing.assert_allclose(found[1].explained, expected, atol=1e-6)
    assert len(found[1].to_dict()["plane"]) == 120


def test_what_cannot_be_compared_is_refused():
    for a, b, message in (
        (A[:0], B, "no source states"),
        (A, B * np.nan, "target states are not all finite"),
    ):
        with pytest.raises(UserError, match=message):
            coarse(a, b)
    with pytest.raises(UserError, match=r"as many positive states \(30\)"):
        contrast(A, B)
    with pytest.raises(UserError, match="'median'; choose from: mean, pca_diff, pca_center"):
        contrast(A, A, "median")
    with pytest.raises(UserError, match="pca_diff needs pairs that differ"):
        contrast(np.ones((3, 2)), np.zeros((3, 2)), "pca_diff")
    store = States.from_arrays({("s", 0): A}, [{"id": "x", "metadata": {"kind": "k"}}] * 30)
    with pytest.raises(UserError, match="there is only k"):
        separability(*labelled(store, "kind"))
    with pytest.raises(UserError, match="class 'b' has 1 states"):
        separability(store, ["a"] * 29 + ["b"])
    with pytest.raises(UserError, match="no state has the field 'type'; there are: id, kind, meta"):
        labelled(store, "type")
