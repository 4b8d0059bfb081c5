"""Files of xl-vlms: concepts and steering vectors in its format, and what is said of others."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, PCA, DictionaryLearning

from moresjax.analysis.concepts import Concepts
from moresjax.analysis.states import States
from moresjax.analysis.steering import fine
from moresjax.analysis.vectors import read_vector_facts
from moresjax.cli import main

STATES = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
STATES[:10] += 6
CENTRES = torch.tensor(np.stack([STATES[:10].mean(0), STATES[10:].mean(0)]))
DISTANCE = np.linalg.norm(STATES[:, None] - CENTRES.numpy(), axis=-1)
NEARNESS = torch.tensor(1 / (1 + DISTANCE))
DICTIONARY = {
    "concepts": CENTRES,
    "activations": NEARNESS,
    "decomposition_method": "kmeans",
    "text_grounding": [["dog", "dogs"], ["cat"]],
    "image_grounding_paths": [["a.jpg"], ["b.jpg"]],
}


STATE = torch.ones(1, 2, 5)


def imported(content, tmp_path, *options) -> int:
    tmp_path.mkdir(exist_ok=True)
    torch.save(content, tmp_path / "results.pth")
    source, out = str(tmp_path / "results.pth"), str(tmp_path / "out")
    return main(["import", source, out, "--allow-pickle", *options])


def test_concepts(tmp_path):
    assert imported(DICTIONARY, tmp_path, "--site", "llm.norm.out", "--layer", "0") == 0
    found = Concepts.load(tmp_path / "out")
    np.testing.assert_allclose(found.project(STATES), NEARNESS, atol=1e-6)
    assert found.sizes.tolist() == [10, 20]
    wanted = {"words": DICTIONARY["text_grounding"], "site": "llm.norm.out", "layer": 0, "n": 30}
    assert wanted.items() <= found.facts.items()


def test_concepts_with_the_object_that_was_fitted(tmp_path):
    fitted = PCA(2).fit(STATES)
    own = {"concepts": torch.tensor(fitted.components_), "decomposition_method": "pca"}
    own["activations"] = torch.tensor(fitted.transform(STATES))
    assert imported(DICTIONARY | own | {"analysis_model": fitted}, tmp_path) == 0
    found = Concepts.load(tmp_path / "out")
    np.testing.assert_allclose(found.project(STATES), own["activations"], atol=1e-5)
    for name, model in (("kmeans", KMeans(2)), ("snmf", DictionaryLearning(2, max_iter=2))):
        content = DICTIONARY | {"analysis_model": model.fit(STATES)}
        assert imported(content | {"decomposition_method": name}, tmp_path / name) == 0


def test_features_become_a_store_of_states(tmp_path):
    one, norm = "language_model.model.layers.3", "language_model.model.norm"
    tokens = [2, 1, 1, 0]
    states = torch.randn(4, 2, 5, dtype=torch.float16)
    content = {
        "hidden_states": [
            {one: states[n : n + 1, :t], norm: states[n : n + 1, : min(t, 1)] + 1}
            for n, t in enumerate(tokens)
        ],
        "image": [["coco/7.jpg"], ["coco/8.jpg"], ["coco/7.jpg"], ["coco/9.jpg"]],
        "model_predictions": [["a dog"], ["no"], ["a dog"], ["x"]],
        "token_of_interest_mask": [torch.tensor([n != 1]) for n in range(4)],
    }
    assert imported(content, tmp_path) == 0
    found = States(tmp_path / "out")
    assert found.keys == [("llm.block.out", 3), ("llm.norm.out", 0)]
    assert found.meta["dtype"] == "float16"
    assert found.ids == ["7", "8", "7#2", "9"]
    assert found.found.tolist() == [True, False, True, False]
    assert [row["prediction"] for row in found.index] == ["a dog", "no", "a dog", "x"]
    matrix = found.matrix("llm.block.out", 3)
    np.testing.assert_allclose(matrix[0], states[0].float().mean(0), atol=1e-3)
    np.testing.assert_array_equal(matrix[1], states[1, 0])
    of_one_token = found.matrix("llm.norm.out", 0)  # modules may have tokens of their own
    np.testing.assert_allclose(of_one_token[0], states[0, 0] + 1, atol=1e-3)
    assert not matrix[3].any()
    own = {"hidden_states": [{"lm.head": STATE}]}
    assert imported(own, tmp_path / "b", "--site", "llm.block.mlp.out", "--layer", "2") == 0
    assert States(tmp_path / "b" / "out").keys == [("llm.block.mlp.out", 2)]


def test_vectors_steer_the_way_that_their_names_say(tmp_path):
    between = CENTRES[:, None] - CENTRES[None]  # as theirs: u_i - u_j
    content = {"steering_vector": between, "concepts1": CENTRES, "activations1": NEARNESS}
    content |= {f"steering_vector_concept_{i}_to_{j}": between[i, j] for i, j in ((0, 1), (1, 0))}
    content["steering_vector_shift_of_means"] = CENTRES[1] - CENTRES[0]
    content["steering_vector_mean_of_directions"] = between.mean((0, 1))
    assert imported(content, tmp_path) == 0
    with np.load(tmp_path / "out" / "vectors.npz") as file:
        found = dict(file)
    assert sorted(found) == ["0>1", "1>0", "shift_of_means"]
    ours = fine(CENTRES.numpy())
    np.testing.assert_allclose(found["0>1"], ours[0, 1], atol=1e-6)
    np.testing.assert_allclose(found["1>0"], ours[1, 0], atol=1e-6)
    np.testing.assert_allclose(found["shift_of_means"], ours[0, 1], atol=1e-6)
    facts = read_vector_facts(tmp_path / "out")
    assert facts["0>1"]["origin"] == "xl-vlms"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DICTIONARY | {"decomposition_method": "ica"}, "decomposition_method in"),
        (DICTIONARY | {"decomposition_method": "pca"}, "concepts of pca are about a mean"),
        (DICTIONARY | {"activations": torch.ones(4, 3)}, "2 concepts, but activations of 3"),
        (DICTIONARY | {"concepts": torch.ones(2)}, "concepts must be finite numbers of 2 axes"),
        (DICTIONARY | {"analysis_model": NMF()}, "save it without that"),
        ({"logits": []}, "nor steering vectors nor hidden states, only: logits"),
        ({"hidden_states": []}, "must be a list with tensors by module for each sample"),
        ({"hidden_states": [{"lm_head": STATE}]}, "states of lm_head; say which --site"),
        ({"hidden_states": [{"model.norm": STATE[0]}]}, "must have three axes, got 2"),
        ({"hidden_states": [{"model.norm": STATE}], "image": ["a", "b"]}, "fewer states than"),
        ({"hidden_states": [{"a.norm": STATE, "b.norm": STATE}]}, "two modules of one site"),
        ([1], "is none of xl-vlms: it holds a list"),
    ],
)
def test_other_files_are_told_in_a_sentence(content, message, tmp_path, capsys):
    assert imported(content, tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_pickles_need_permission(tmp_path, capsys):
    torch.save(DICTIONARY, tmp_path / "c.pth")
    assert main(["import", str(tmp_path / "c.pth"), str(tmp_path / "out")]) == 2
    assert "allow it with --allow-pickle" in capsys.readouterr().err
