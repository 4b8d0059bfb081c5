"""TinyLLaVA Factory's folders out and in again, and runs of LLaVA Steering."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
)

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.inference.convert import export_model, import_model
from moresjax.inference.load import load
from moresjax.inference.model import Model
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.testing.hf_encoders import clip, siglip
from moresjax.testing.hf_llms import IMAGE_ID, TEXT, qwen2, randomised, stablelm
from moresjax.weights.export import export_hf, export_tinyllava
from moresjax.weights.families.base import decoder_config, vision_config
from moresjax.weights.hf import load_pretrained

LLMS = {
    "phi": PhiConfig(**(TEXT | {"hidden_size": 80}), partial_rotary_factor=0.4),
    "tinyllama": LlamaConfig(**TEXT),
    "stablelm": stablelm(use_qkv_bias=True),
    "gemma": GemmaConfig(**TEXT, head_dim=12),
    "qwen2": qwen2(),
}
TOWERS: dict[str, CLIPVisionConfig | SiglipVisionConfig] = {
    "siglip": siglip().config,
    "clip": clip().config,
}


def model_of(llm: str, tower: str = "siglip", connector: str = "mlp2x_gelu") -> MLLM:
    """Random weights, in which each parameter differs from its start; SigLIP's first token goes."""
    vision = vision_config(TOWERS[tower].to_dict(), drop_first_token=tower == "siglip")
    config = MLLMConfig(llm=decoder_config(LLMS[llm].to_dict()), vision=vision, connector=connector)
    model, rng = initialize(MLLM(config)), np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        drawn = 0.2 * rng.standard_normal(variable.shape) + (path[-1] == "scale")
        variable.set_value(jnp.asarray(drawn, jnp.float32))
    nnx.update(model, nnx.state(model))
    return model


def params(model: MLLM) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in flat}


def logits(model: Model) -> np.ndarray:
    visual = model.config.visual_tokens
    ids = np.asarray([[IMAGE_ID] * visual + [7, 9, 11]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 12, 12), np.float32)
    return np.asarray(model.logits(input_ids=ids, pixel_values=pixels, image_token_id=IMAGE_ID))


@pytest.mark.parametrize(
    ("llm", "tower", "connector"),
    [(llm, "siglip", "mlp2x_gelu") for llm in LLMS]
    + [("phi", "clip", "linear"), ("tinyllama", "clip", "mlp3x_gelu")],
)
def test_the_factorys_format_keeps_every_bit(llm, tower, connector, tmp_path):
    model = model_of(llm, tower, connector)
    assert model.config.visual_tokens == (8 if tower == "siglip" else 9)
    folder = export_tinyllava(model, tmp_path / "out")
    back = load_pretrained(folder)
    assert back.config == model.config
    ours, theirs = params(model), params(back)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert theirs[name].tobytes() == x.tobytes(), name
    stored = load_file(folder / "model.safetensors")
    assert {n.split(".")[0] for n in stored} == {"language_model", "vision_tower", "connector"}
    assert ("language_model.lm_head.bias" in stored) == (llm == "phi")
    config = json.loads((folder / "config.json").read_text())
    # The factory looks for its names of parts in these.
    assert llm in config["llm_model_name_or_path"].lower()
    assert tower in config["vision_model_name_or_path"].lower()
    assert config["vision_feature_select_strategy"] == "patch"


def test_a_head_with_a_bias_is_named_and_so_is_the_format_that_has_it(tmp_path, capsys):
    """`transformers` has no LLaVA whose head has a bias; Phi-2's has one."""
    base = export_tinyllava(model_of("phi"), tmp_path / "base")
    import_model(base, tmp_path / "run")
    for format in ("hf", "merged"):
        arguments = ["export", tmp_path / "run", tmp_path / "out", "--format", format]
        assert main([str(x) for x in arguments]) == 2
        said = capsys.readouterr().err
        assert "LLaVA" in said
        assert "phi with head_bias=True; use format tinyllava" in said
        assert len(said) < 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    out = export_model(tmp_path / "run", tmp_path / "out", "tinyllava")
    first, second = (load_file(path / "model.safetensors") for path in (base, out))
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_what_the_factory_has_not_is_refused(tmp_path):
    model = model_of("tinyllama")
    for changes, message in (
        ({"connector": "resampler"}, "with connector resampler is not supported"),
        ({"vision": None}, "has one vision encoder"),
        ({"llm": dataclasses.replace(model.config.llm, model_type="opt")}, "opt"),
    ):
        with pytest.raises(UserError, match=message):
            export_tinyllava(MLLM(dataclasses.replace(model.config, **changes)), tmp_path / "out")
    model.attach("red")
    with pytest.raises(UserError, match="has no place for red"):
        export_tinyllava(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


class MoReS(torch.nn.Module):
    """The arithmetic of the authors' edit in single precision, and what they save of it."""

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.rotate = torch.nn.init.orthogonal_(torch.empty(dim, rank))
        self.learned = torch.nn.Linear(dim, rank)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + (self.learned(h) - h @ self.rotate) @ self.rotate.T

    def saved(self) -> dict[str, torch.Tensor]:
        return {**self.learned.state_dict(), "rotate_layer": self.rotate}


def steering_run(folder, base, positions: dict | None, type: str = "MoReSIntervention"):
    """A run of LLaVA Steering: the stages' folders and the edits, as its recipe saves them."""
    tensors = load_file(base / "model.safetensors")
    insides = {"language_model": "", "vision_tower": "_vision_tower.", "connector": ""}
    for part, inside in insides.items():
        (folder / part).mkdir(parents=True)
        prefix = f"{part}.{inside}"
        own = {
            n.removeprefix(prefix): torch.tensor(x)
            for n, x in tensors.items()
            if n.startswith(prefix)
        }
        torch.save(own, folder / part / "pytorch_model.bin")
    (folder / "config.json").write_text((base / "config.json").read_text())
    edits = folder / "mores" / "language_model"
    edits.mkdir(parents=True)
    torch.manual_seed(0)
    modules = [MoReS(32, 2) for _ in range(3)]
    names = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0" for layer in range(3)]
    for name, module in zip(names, modules, strict=True):
        torch.save(module.saved(), edits / f"intkey_{name}.bin")
    config = {
        "intervention_types": [f"<class 'tinyllava.model.intervention_models.{type}'>"] * 3,
        "representations": [[i, "block_output", "pos", 1, 2, *[None] * 8] for i in range(3)],
        "sorted_keys": names,
    }
    (edits / "config.json").write_text(json.dumps(config))
    if positions is not None:
        (edits / "mores_pos_configs.json").write_text(json.dumps(positions))
    return folder, modules


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_tinyllava(model_of("tinyllama"), tmp_path_factory.mktemp("base") / "base")


POSITIONS = {
    "intervention_positions": "f1+l2",
    "mores_share_weights": True,
    "intervened_prompt_part": "first_round",
    "intervene_modality": "vis",
    "num_interventions": {"llm": 3},
    "img_embed_token_len": 8,
}


def test_the_authors_runs_and_edits_are_read(base, tmp_path, capsys):
    run, modules = steering_run(tmp_path / "run", base, POSITIONS)
    with pytest.raises(UserError, match="allow-pickle"):
        load(run)
    model = load(run, allow_pickle=True)
    assert model.tuning == "mores:positions=image:f1+l2,rank=2"
    h = torch.tensor(np.random.default_rng(0).standard_normal((5, 32)), dtype=torch.float32)
    method = model._mllm.tuning.methods[0][1]
    for layer, module in enumerate(modules):
        leaves = model._mllm.tuning.params["mores"]["llm.block.out"]
        own = method.prepare({n: x[...][layer] for n, x in leaves.items()})
        found = h.numpy() + np.asarray(method.delta(own, jnp.asarray(h.numpy())[None])[0])
        np.testing.assert_allclose(found, module(h).detach().numpy(), atol=1e-5)
    bare = logits(load(run, tuning="none", allow_pickle=True))
    np.testing.assert_array_equal(bare, logits(load(base)))
    steered = logits(model)
    assert np.abs(steered - bare).max() > 1e-2

    # The folder of the edits is an adapter on the command line, and becomes ours, pyreft's, HF's.
    adapter = ["--adapter", str(run / "mores" / "language_model"), "--allow-pickle"]
    for format, options in (("adapter", {}), ("pyreft", {"allow_pickle": True}), ("hf", {})):
        out = tmp_path / format
        assert main(["export", str(base), str(out), "--format", format, *adapter]) == 0
        if format == "hf":
            again = load(out)
        else:
            again = load(base)
            spec = "mores:positions=image:f1+l2" if format == "pyreft" else ""
            again.load_adapter(out, edits=spec, **options)
        assert again.tuning == model.tuning
        np.testing.assert_allclose(logits(again), steered, atol=1e-5)
    capsys.readouterr()
    # A whole run goes out in their layout, edits and notes.
    out = export_model(run, tmp_path / "theirs", "tinyllava", allow_pickle=True)
    np.testing.assert_allclose(logits(load(out, allow_pickle=True)), steered, atol=1e-5)
    edits = out / "mores" / "language_model"
    noted = json.loads((edits / "mores_pos_configs.json").read_text())
    assert noted == POSITIONS
    made = json.loads((edits / "intervention_config.json").read_text())["representations"]
    assert [one["intervention"]["type"] for one in made] == ["mores"] * 3


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({"intervention_positions": "uniform4"}, "mores:positions=image:uniform(4),rank=2"),
        ({"intervene_modality": "text"}, "mores:positions=question:f1+l2,rank=2"),
        ({"intervene_modality": "vis+text"}, "names tokens that no selector is; .* --edits"),
        ({"intervened_prompt_part": "all"}, "intervened_prompt_part=all is not supported"),
        ({"mores_share_weights": False}, "says mores_share_weights=False, with 1 edits"),
        (
            {"intervention_positions_2": "f1"},
            "the setting intervention_positions_2=f1 is not known",
        ),
        (None, "mores:rank=2"),
    ],
)
def test_noted_tokens(base, tmp_path, changes, spec):
    run, _ = steering_run(tmp_path / "run", base, None if changes is None else POSITIONS | changes)
    if not spec.startswith("mores:"):
        with pytest.raises(UserError, match=spec):
            load(run, allow_pickle=True)
    else:
        assert load(run, allow_pickle=True).tuning == spec


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({"dropout": 0.05}, "mores:dropout=0.05,rank=2"),
        ({"type": "norot_mores"}, "type=norot_mores is not supported, only mores is"),
        ({"low_rank_dimension": 4}, "says low_rank_dimension=4, the edits have 2"),
        ({"act_fn": "relu"}, r"intervention_config\.json: the setting act_fn=relu is not known"),
    ],
)
def test_what_the_authors_note_about_their_edits(base, tmp_path, changes, spec):
    run, _ = steering_run(tmp_path / "run", base, None)
    edit = {"type": "mores", "embed_dim": 32, "low_rank_dimension": 2} | changes
    one = {"layer": "all", "component": "block_output", "intervention": edit}
    file = run / "mores" / "language_model" / "intervention_config.json"
    file.write_text(json.dumps({"representations": [one]}))
    if not spec.startswith("mores:"):
        with pytest.raises(UserError, match=spec):
            load(run, allow_pickle=True)
    else:
        assert load(run, allow_pickle=True).tuning == spec


def test_other_edits_of_the_authors_are_refused(base, tmp_path):
    run, _ = steering_run(tmp_path / "run", base, POSITIONS, "MultiMoReSIntervention")
    with pytest.raises(UserError, match=r"intervention type .*MultiMoReS.*; choose from: .*MoReSI"):
        load(run, allow_pickle=True)


def test_the_first_token_of_siglip_is_left_out(tmp_path, capsys):
    """LLaVA Steering 3B reads 728 of SigLIP's 729 tokens."""
    randomised(PhiForCausalLM(LLMS["phi"])).save_pretrained(tmp_path / "llm")
    siglip().save_pretrained(tmp_path / "siglip")
    clip().save_pretrained(tmp_path / "clip")

    def imports(out: str, *options: str) -> int:
        return main(["import", str(tmp_path / "llm"), str(tmp_path / out), *options])

    vision = ["--vision", str(tmp_path / "siglip")]
    assert imports("base", *vision, "--drop-first-token") == 0
    assert imports("all", *vision) == 0
    assert [load(tmp_path / n).config.visual_tokens for n in ("base", "all")] == [8, 9]
    capsys.readouterr()
    assert imports("clips", "--vision", str(tmp_path / "clip"), "--drop-first-token") == 2
    assert "has a class token, which is dropped already" in capsys.readouterr().err
    assert imports("none", "--drop-first-token") == 2
    assert "--drop-first-token is for an LLM with --vision" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"llm", "siglip", "clip", "base", "all"}
    with pytest.raises(UserError, match="head_bias=True; use format tinyllava"):
        export_model(tmp_path / "base", tmp_path / "hf", "hf")
    assert export_hf(load_pretrained(tmp_path / "llm"), tmp_path / "phi").is_dir()
