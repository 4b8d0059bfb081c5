"""Files of xl-vlms: concepts and steering vectors in its format, and what is said of others."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from moresjax.analysis.concepts import Concepts
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


def imported(content, tmp_path, *options) -> int:
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
        (DICTIONARY | {"decomposition_method": "pca"}, "decomposition_method in"),
        (DICTIONARY | {"activations": torch.ones(4, 3)}, "2 concepts, but activations of 3"),
        (DICTIONARY | {"concepts": torch.ones(2)}, "concepts must be finite numbers of 2 axes"),
        (DICTIONARY | {"analysis_model": KMeans()}, "save it without that"),
        ({"hidden_states": []}, "neither concepts nor steering vectors, only: hidden_states"),
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
