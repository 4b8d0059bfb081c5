"""Vision encoders from captions: SigLIP's loss, what the towers see, and what a run leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from run_helpers import TINY, cli_arguments, config_of, logged
from transformers import SiglipConfig, SiglipModel

from moresjax.cli import main
from moresjax.core.layout import Batch, TokenKind
from moresjax.models.contrastive import ContrastiveModel
from moresjax.models.decoder import DecoderConfig
from moresjax.models.initialize import initialize
from moresjax.models.vision import VisionConfig
from moresjax.runs.build import build_model
from moresjax.runs.init_weights import trained_parameters
from moresjax.sharding.mesh import batch_sharding, make_mesh, replicated
from moresjax.testing.batches import row_layout, stack_layout, tiny_batch
from moresjax.testing.models import TINY_LLM, TINY_VISION
from moresjax.training.objectives import siglip


@pytest.fixture(scope="module")
def model():
    return initialize(ContrastiveModel(VisionConfig(**TINY_VISION), DecoderConfig(**TINY_LLM)))


def captions(*rows: list[int], images=None) -> Batch:
    """Rows of an image and a caption; of a caption alone where `images` says so."""
    images = [True] * len(rows) if images is None else images
    parts = [
        [(TokenKind.SYSTEM, 1), (TokenKind.IMAGE, int(image)), (TokenKind.ANSWER, len(row))]
        for row, image in zip(rows, images, strict=True)
    ]
    length = 2 + max(map(len, rows))
    layout = stack_layout([row_layout(*pieces, length=length) for pieces in parts], visual=1)
    tokens = np.zeros(layout.shape, np.int32)
    for number, row in enumerate(rows):
        tokens[number, 1 + images[number] :][: len(row)] = row
    pixels = np.random.default_rng(0).standard_normal((len(rows), 1, 12, 12, 3))
    return Batch(tokens, layout, pixels.astype(np.float32))


def test_the_loss_is_that_of_transformers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    towers = {
        "text_config": {"vocab_size": 30, "num_hidden_layers": 1, "projection_size": 8} | sizes,
        "vision_config": {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1} | sizes,
    }
    reference = SiglipModel(SiglipConfig(**towers)).eval()
    with torch.no_grad():
        reference.logit_scale.fill_(0.7)
        reference.logit_bias.fill_(-1.5)
        ids, pixels = torch.randint(2, 30, (5, 6)), torch.randn(5, 3, 8, 8)
        out = reference(input_ids=ids, pixel_values=pixels, return_loss=True)
    logits = jnp.asarray(out.logits_per_image.numpy())
    found = siglip(lambda _: logits, captions(*ids.tolist()))
    assert found.weight == 5
    np.testing.assert_allclose(found.total / found.weight, out.loss, rtol=1e-5)
    best = np.asarray(logits).argmax(1) == np.arange(5)
    assert found.correct == best.sum()


def test_equal_captions_are_no_negatives_and_text_alone_counts_nowhere():
    batch = captions([3, 4], [5, 6, 7], [3, 4], [8], images=[True, True, True, False])
    logits = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    logits[0] = [1, 0, 2, 5]  # an equal caption is as right as one's own
    found = siglip(lambda _: jnp.asarray(logits), batch)
    wanted = 0.0
    for one in range(3):
        for other in range(3):
            if one == other or {one, other} != {0, 2}:
                sign = 1 if one == other else -1
                wanted += np.log1p(np.exp(-sign * logits[one, other]))
    assert found.weight == 3
    np.testing.assert_allclose(found.total, wanted, rtol=1e-6)
    assert found.correct == 1 + (logits[1, :3].argmax() == 1) + (logits[2, :3].argmax() in (0, 2))


def test_a_caption_sees_neither_images_nor_padding(model):
    one, other = captions([3, 4, 5]), captions([3, 4, 5], [6, 7, 8, 9, 10])
    tokens = np.where(np.asarray(one.layout.kind) == TokenKind.IMAGE, 11, one.tokens)
    wanted = model.embed_captions(one)[0]
    for batch in (dataclasses.replace(one, tokens=tokens), other):
        np.testing.assert_allclose(model.embed_captions(batch)[0], wanted, atol=1e-6)
    assert abs(model.embed_captions(other)[1] - wanted).max() > 1e-2


def test_a_mesh_compares_all_pairs(model):
    batch = tiny_batch(rows=8)
    graphdef, params = nnx.split(model)

    def loss(params, batch):
        return siglip(nnx.merge(graphdef, params), batch).total

    wanted = jax.value_and_grad(loss)(params, batch)
    mesh = make_mesh(data=8)
    placed = jax.device_put(params, replicated(mesh))
    found = jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(batch, batch_sharding(mesh)))
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * max(abs(other).max(), 1))


def test_a_connector_starts_from_a_run_on_captions(tmp_path, capsys):
    settings = TINY | {"steps": 2, "log_every": 1}
    assert main(cli_arguments("stage=siglip", tmp_path / "siglip", settings)) == 0
    assert [line["labels"] for line in logged(tmp_path / "siglip")] == [8, 8]
    trained = trained_parameters(tmp_path / "siglip")
    assert {name.split(".")[0] for name in trained} >= {"vision", "llm", "log_temperature"}
    later = TINY | {"init.vision": str(tmp_path / "siglip")}
    model = build_model(config_of("stage=pretrain", later))
    kernel = model.vision.blocks.attn.q.kernel[...]
    np.testing.assert_array_equal(kernel, trained["vision.blocks.attn.q.kernel"])
    capsys.readouterr()
    packed = cli_arguments("stage=siglip", tmp_path / "none", settings | {"batching": "pack"})
    assert main(packed) == 2
    assert "objective siglip compares the rows" in capsys.readouterr().err


def test_the_towers_are_as_the_configuration_says():
    settings = TINY | {"dtype": "bfloat16", "remat": True, "also_train": "vision:last1"}
    settings["model.vision.num_layers"] = 2
    model = build_model(config_of("stage=siglip", settings))
    assert model.llm.config.dtype == "bfloat16"
    assert model.llm.config.remat
    assert model.vision.config.remat
    assert model.vision.config.num_trainable_blocks == 1
