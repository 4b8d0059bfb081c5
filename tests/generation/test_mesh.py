"""Generation, scores and logits over eight devices: those of one device, however it is split."""

import jax
import numpy as np
import pytest

from moresjax import load
from moresjax.analysis.attention import AttentionProbe
from moresjax.analysis.capture import StateProbe
from moresjax.cli import main
from moresjax.generation.sampling import Sampling
from moresjax.inference.chat import Chat
from moresjax.inference.model import Model
from moresjax.sharding.mesh import make_mesh, mesh_preset
from moresjax.testing.hf_llavas import IMAGE_ID, case_of
from moresjax.testing.models import talking_model
from moresjax.weights.fingerprint import fingerprint

NEW = 4
TUNING = "lora:rank=2/mores:rank=1,positions=image:f4+l5"
STATES = StateProbe(layers=(1,), take="each")
IMAGES = list(np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3)).astype(np.uint8))
HEAD = "how many times two ? three . "
PROMPTS = [
    (HEAD + "<image> is there a two ?", [IMAGES[0]]),
    (HEAD + "what is the largest ?", []),
    (HEAD + "<image> what is at top-left ? <image> the same ?", [IMAGES[1], IMAGES[2]]),
    (HEAD + "<image> how many times three ?", [IMAGES[2]]),
    (HEAD + "is there a seven ? no .", []),
]
# Wide enough for the rules of every mesh, features of the heads included.
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "num_kv_heads": 4}


def answers(model: Model) -> dict:
    """What a model gives in every way there is."""
    rows = [model.prompts.row(*prompt) for prompt in PROMPTS]
    texts, images = zip(*PROMPTS, strict=True)
    probes = AttentionProbe(), STATES
    # More rows than devices, fewer, and as many; groups that do not divide.
    whole = model.service.generate_rows(rows + rows[:3], NEW, probes)
    left = model.service.generate_many(rows, [NEW, 1, 2, NEW, NEW], batch_size=2)
    # Questions about the same images, which are read before them.
    asked = ["is there a two ?", "what is the largest ?", "how many times three ?"] * 4
    about = [[image] for image in IMAGES[:2] for _ in range(6)]
    drawn = model.service.generate_rows(
        rows, NEW, sampling=Sampling(temperature=1.0), seeds=range(5)
    )
    chat = Chat(model, max_new_tokens=NEW)
    spoken = ["".join(chat.ask(*turn)) for turn in ((asked[0], [IMAGES[0]]), (asked[1],))]
    assert chat.tokens_read < 20  # the image is in the cache
    scores = model.score(texts[:2], [["three .", "no ."], ["seven ."]], images[:2])
    return {
        "tokens": np.asarray(whole.tokens).tolist(),
        "stats": jax.tree.map(np.asarray, whole.stats["attention"]),
        "states": np.asarray(whole.stats[STATES.name]["state"]),
        "refilled": [completion.tokens.tolist() for completion in left],
        "about": model.generate(asked, about, max_new_tokens=NEW, batch_size=16),
        "ranked": [
            score.logprob
            for (score,) in model.score(asked, [["three ."]] * len(asked), about, batch_size=8)
        ],
        "chat": spoken,
        "drawn": np.asarray(drawn.tokens).tolist(),
        "beams": model.generate(texts[:1], images[:1], max_new_tokens=NEW, num_beams=2),
        "scores": [[score.logprob for score in each] for each in scores],
        "logits": np.asarray(model.logits(texts[:3], images[:3])),
    }


@pytest.fixture(scope="module")
def expected() -> dict:
    return answers(talking_model(TUNING, **SIZES))


@pytest.mark.parametrize("preset", ["replicated", "fsdp+tensor"])
def test_a_mesh_changes_no_token(preset, expected):
    model = talking_model(TUNING, **SIZES)
    name = fingerprint(model.mllm)
    model.shard(make_mesh(**mesh_preset(preset, 8)))
    kernel = model.mllm.llm.blocks.mlp.up.kernel[...]
    assert len(kernel.devices()) == 8
    parts = {"replicated": 1, "fsdp+tensor": 8}[preset]
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
    assert fingerprint(model.mllm) == name
    found = answers(model)
    assert len(set(map(tuple, expected["tokens"]))) >= 4
    for name in ("tokens", "drawn", "refilled", "beams", "about", "chat"):
        assert found[name] == expected[name], name
    for name in ("logits", "states"):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, atol=1e-5)
    for one, other in zip(found["scores"], expected["scores"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    np.testing.assert_allclose(found["ranked"], expected["ranked"], rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (found["stats"], expected["stats"])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_weights_are_split_as_they_are_read(tmp_path):
    case = case_of("llama + clip")
    case.oracle.save_pretrained(tmp_path)
    model = load(tmp_path, mesh=make_mesh(**mesh_preset("fsdp", 8)))
    kernel = model.mllm.llm.blocks.mlp.up.kernel[...]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    ids, mask, pixels = case.arrays()
    inputs = {"attention_mask": mask, "pixel_values": pixels, "image_token_id": IMAGE_ID}
    models = model, Model(case.model, None)
    found, expected = (np.asarray(each.logits(input_ids=ids, **inputs)) for each in models)
    np.testing.assert_allclose(found[mask > 0], expected[mask > 0], atol=1e-5)


def test_a_mesh_that_does_not_exist_is_refused(tmp_path, capsys):
    command = ["generate", "--model", str(tmp_path), "--prompt", "hi", "--mesh", "fdsp"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "'fdsp'" in error
    assert "fsdp+tensor" in error
