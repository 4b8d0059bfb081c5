"""Concept dictionaries: against scikit-learn, in pieces, from one seed, and through files."""

import dataclasses
import functools

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, DictionaryLearning

from moresjax.analysis import concepts as module
from moresjax.analysis.concepts import (
    METHODS,
    Concepts,
    cosines,
    learn,
    match_bijective,
    matched_cosines,
    stability,
)
from moresjax.analysis.lloyd import first_centers, lloyd
from moresjax.analysis.sparse_autoencoder import SAEOptions
from moresjax.analysis.state_rows import StateRows
from moresjax.analysis.states import States, StatesWriter
from moresjax.core.errors import UserError

SITE = "llm.norm.out"
RNG = np.random.default_rng(0)
CENTRES = 3 * RNG.normal(size=(6, 16)) + 5
GROUPS = RNG.choice(6, 500, p=[0.3, 0.25, 0.2, 0.12, 0.08, 0.05])
Z = (CENTRES[GROUPS] + RNG.normal(size=(500, 16))).astype(np.float32)
SAE = SAEOptions(active=2, epochs=4, batch_size=128)


def stored(folder, dtype="float32", found=lambda number: True):
    with StatesWriter(folder, [(SITE, 0)], 16, {"model": "m"}, dtype=dtype, rows=150) as writer:
        for number, z in enumerate(Z):
            writer.add({"id": str(number), "found": found(number)}, {(SITE, 0): z})
    return States(folder)


def z_for(method):
    """Fewer states for the slow one."""
    return Z[:60] if method == "snmf" else Z


@functools.cache
def learned(method):
    return learn(z_for(method), method, 6, seed=1, sae=SAE)


@pytest.mark.parametrize("chunk_rows", [None, 64, 33])
@pytest.mark.parametrize("empty", [False, True])
def test_lloyd_is_that_of_scikit_learn(chunk_rows, empty):
    """Also where two of the first centres are far from everything: their clusters are empty."""
    first = Z[:6].copy()
    if empty:
        first[3], first[4] = 100, 101
    expected = KMeans(6, init=first, n_init=1).fit(Z)
    found = lloyd(StateRows(Z), first, chunk_rows=chunk_rows)
    np.testing.assert_allclose(found.centers, expected.cluster_centers_, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels_)
    assert found.iterations == expected.n_iter_


def test_lloyd_keeps_its_digits_far_from_zero(monkeypatch):
    """States share most of what they are; distances must not drown in it. Read anew each time."""
    far = (Z + 300).astype(np.float32)
    monkeypatch.setattr("moresjax.analysis.lloyd.HELD_BYTES", 0)
    found = lloyd(StateRows(far), far[:6], chunk_rows=100)
    expected = KMeans(6, init=far[:6], n_init=1).fit(far)
    np.testing.assert_allclose(found.centers, expected.cluster_centers_, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels_)


def test_many_states_are_clustered_and_decomposed_in_pieces(monkeypatch):
    small = learned("kmeans"), learned("pca")
    monkeypatch.setattr(module, "SKLEARN_ROWS", 100)
    kmeans, pca = learn(Z, "kmeans", 6, seed=1), learn(Z, "pca", 6, seed=1)
    assert matched_cosines(kmeans.vectors, small[0].vectors).min() > 1 - 1e-5
    np.testing.assert_allclose(pca.vectors, small[1].vectors, atol=1e-4)
    np.testing.assert_allclose(pca.project(Z), small[1].project(Z), atol=1e-3)
    with pytest.raises(UserError, match=r"at most 100, got 500; take a sample"):
        learn(Z, "snmf", 6)


def test_first_centres_are_states_and_differ():
    first = first_centers(StateRows(Z), 6, seed=3)
    assert {tuple(row) for row in first} <= {tuple(row) for row in Z}
    assert len(np.unique(first)) > 6
    np.testing.assert_array_equal(first, first_centers(StateRows(Z), 6, seed=3))


def test_kmeans_is_nearness_to_means_of_clusters():
    d, active = learned("kmeans"), learned("kmeans").project(Z)
    model = KMeans(6, random_state=1, n_init=1, max_iter=5000).fit(Z)
    order = np.argsort(-np.bincount(model.labels_), kind="stable")
    np.testing.assert_allclose(d.vectors, model.cluster_centers_[order], atol=1e-5)
    np.testing.assert_allclose(active, 1 / (1 + model.transform(Z)[:, order]), atol=1e-5)
    labels = d.assign(Z)
    np.testing.assert_array_equal(labels, d.assign(Z, "l2"))
    for k in range(6):
        np.testing.assert_allclose(d.vectors[k], Z[labels == k].mean(0), atol=1e-4)
    share = 1 - model.inertia_ / (np.var(Z, 0).sum() * len(Z))
    assert d.facts["explained"] == pytest.approx(share, abs=1e-5)


def test_pca_and_snmf_are_scikit_learns():
    pca = PCA(6).fit(Z)
    np.testing.assert_allclose(learned("pca").vectors, pca.components_, atol=1e-5)
    np.testing.assert_allclose(learned("pca").project(Z), pca.transform(Z), atol=1e-4)
    share = float(pca.explained_variance_ratio_.sum())
    assert learned("pca").facts["explained"] == pytest.approx(share, abs=1e-5)
    options = {"alpha": 1, "positive_code": True, "fit_algorithm": "cd", "max_iter": 5000}
    model = DictionaryLearning(6, transform_algorithm="lasso_cd", random_state=1, **options)
    d, z = learned("snmf"), z_for("snmf").astype(np.float64)
    model.fit(z)
    match = match_bijective(d.vectors, model.components_)
    np.testing.assert_allclose(d.vectors, model.components_[match], atol=1e-5)
    codes = d.project(z)
    np.testing.assert_allclose(codes, model.transform(z)[:, match], atol=1e-3)
    assert codes.min() >= 0
    assert np.linalg.norm(d.vectors, axis=1).max() <= 1 + 1e-6


def test_simple_takes_the_states_of_largest_norm():
    rows = np.argsort(-np.linalg.norm(Z, axis=1))[:6]
    assert {tuple(u) for u in learned("simple").vectors} == {tuple(z) for z in Z[rows]}


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_dictionary_in_order_of_its_sizes(method):
    d, z = learned(method), z_for(method)
    again = learn(z, method, 6, seed=1, sae=SAE)
    np.testing.assert_array_equal(d.vectors, again.vectors)
    np.testing.assert_array_equal(d.project(Z), again.project(Z))
    sizes = np.bincount(d.assign(z), minlength=6)
    np.testing.assert_array_equal(d.sizes, sizes)
    assert method == "pca" or (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_dictionary_is_read_back_without_pickle(tmp_path, method):
    d = learned(method)
    d.save(tmp_path / "d", {"words": [["a"]]})
    back = Concepts.load(tmp_path / "d")
    np.testing.assert_array_equal(back.project(Z), d.project(Z))
    assert back.method == method
    assert back.facts["seed"] == 1
    assert back.facts["words"] == [["a"]]
    with pytest.raises(UserError, match="not empty"):
        d.save(tmp_path / "d")


def test_sparse_codes_and_planted_concepts():
    rng = np.random.default_rng(0)
    planted = rng.normal(size=(24, 32))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    codes = rng.uniform(1, 2, (1500, 24)) * (rng.random((1500, 24)).argsort(1) < 2)
    z = codes @ planted + 4
    options = SAEOptions(active=2, epochs=30, batch_size=128, lr=0.02)
    d = learn(z, "sae", 24, sae=options)
    assert d.facts["explained"] > 0.9
    assert (matched_cosines(planted, d.vectors) > 0.9).mean() > 0.7
    # Clusters of such states are not their parts.
    assert (matched_cosines(planted, learn(z, "kmeans", 24).vectors) > 0.9).mean() < 0.3
    active = d.project(z)
    assert ((active > 0).sum(1) <= 2).all()
    assert active.min() >= 0
    assert d.facts["sae"] == dataclasses.asdict(options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stores_count_states_that_were_found(tmp_path, dtype):
    states = stored(tmp_path / "s", dtype, lambda number: number % 5 > 0)
    d = learn(states, "kmeans", 6, seed=1)
    kept = np.arange(500) % 5 > 0
    expected = learn(states.matrix(SITE, 0)[kept].astype(np.float32), "kmeans", 6, seed=1)
    np.testing.assert_array_equal(d.vectors, expected.vectors)
    assert d.facts["site"] == SITE
    assert d.facts["layer"] == 0
    assert d.facts["n"] == 400
    assert d.facts["states"]["model"] == "m"
    assert d.project(states).shape == (400, 6)
    np.testing.assert_array_equal(d.rows(states).numbers, np.flatnonzero(kept))


@pytest.mark.parametrize(("method", "every"), [("sae", 1), ("snmf", 9)])
def test_sparse_dictionaries_of_several_shards_are_those_of_one_array(tmp_path, method, every):
    states = stored(tmp_path / "s", found=lambda number: number % every == 0)
    assert len([*(tmp_path / "s").glob("*.npy")]) == 4
    d, z = learn(states, method, 6, seed=1, sae=SAE), Z[::every]
    one = learned("sae") if method == "sae" else learn(z, method, 6, seed=1)
    np.testing.assert_allclose(d.vectors, one.vectors, atol=1e-5)
    assert d.sizes.tolist() == one.sizes.tolist()
    np.testing.assert_allclose(d.project(states), one.project(z), atol=1e-4)


def test_stability_tells_groups_from_noise():
    groups = stability(Z, concepts=6, seeds=[0, 1, 2])
    assert groups["adjusted_rand"] > 0.6
    assert len(groups["by_concept"]) == 6
    noise = stability(RNG.normal(size=(300, 16)), concepts=6, seeds=[0, 1, 2])
    assert noise["adjusted_rand"] < 0.4 < groups["centred_cosine"]
    assert noise["centred_cosine"] < groups["centred_cosine"]
    with pytest.raises(UserError, match="at least two seeds"):
        stability(Z, seeds=[1, 1])


def test_bad_input_is_told(tmp_path):
    with pytest.raises(UserError, match="7 concepts of 6 states of 16 features: kmeans finds from"):
        learn(Z[:6], "kmeans", 7)
    with pytest.raises(UserError, match="from 1 to 16"):
        learn(Z, "pca", 17)
    with pytest.raises(UserError, match="unknown method of concepts 'ica'"):
        learn(Z, "ica")
    bad = Z.copy()
    bad[7, 3] = np.nan
    for method in METHODS:
        with pytest.raises(UserError, match="state 7 is not finite"):
            learn(bad, method, 4)
    with pytest.raises(UserError, match="these concepts have 16 features, the states 8"):
        learned("kmeans").project(Z[:, :8])
    with pytest.raises(UserError, match="unknown way to assign"):
        learned("kmeans").assign(Z, "nearest")
    with pytest.raises(UserError, match="no sample's state was found"):
        learn(stored(tmp_path / "none", found=lambda number: False))
    with pytest.raises(UserError, match="unknown layer of the states"):
        learn(stored(tmp_path / "s"), layer=3)
    with pytest.raises(UserError, match="5 active concepts of 4"):
        learn(Z, "sae", 4, sae=SAEOptions(active=5))
    with pytest.raises(UserError, match="holds no concepts"):
        Concepts.load(tmp_path)
    with pytest.raises(UserError, match="epochs of a sparse autoencoder must be above 0"):
        SAEOptions(epochs=0)


def test_cosines_of_nothing_are_zero():
    assert cosines(np.eye(2), np.array([[0.0, 0], [3, 3]])).tolist() == [
        [0, pytest.approx(0.5**0.5)],
        [0, pytest.approx(0.5**0.5)],
    ]
