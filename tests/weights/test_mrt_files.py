"""The files of MRT's code and of LLaVA's first stage, against the same modules in torch."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moresjax as mj
from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.inference.model import Model
from moresjax.testing.hf_llavas import IMAGE_ID, TEXT, case_of
from moresjax.testing.models import tiny_model
from moresjax.weights.adapter import attach_adapter, load_adapters
from moresjax.weights.projector import read_projector
from moresjax.weights.rt_modules import NAME, import_rt_modules

HIDDEN, VISION, VISUAL, RANK, VISUAL_RANK = 32, 16, 4, 3, 2
ROW = [*[IMAGE_ID] * VISUAL, *range(3, 15)]
PIXELS = np.random.default_rng(5).standard_normal((1, 3, 8, 8)).astype(np.float32)


class Rotate(torch.nn.Module):
    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, rank))


class Editor(torch.nn.Module):
    """Equation 1 of the paper, with the names of the released code."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.rotate_layer = Rotate(dim, rank)
        self.learned_source = torch.nn.Linear(dim, rank)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q, r = torch.linalg.qr(self.rotate_layer.weight)
        rotate = q * torch.where(torch.diag(r) < 0, -1.0, 1.0)
        return h + (self.learned_source(h) - h @ rotate) @ rotate.T


class Holder(torch.nn.Module):
    """A module with these ones inside."""

    def __init__(self, **inside: torch.nn.Module) -> None:
        super().__init__()
        for name, module in inside.items():
            self.add_module(name, module)


def trained(hidden=HIDDEN, vision=VISION, layers=2) -> Holder:
    """The editors where the released code has them; blocks that it leaves alone have none."""
    torch.manual_seed(0)
    text = {
        name: torch.nn.ModuleList([Editor(hidden, RANK) for _ in range(layers)])
        for name in ("prefix_lm_rt", "suffix_lm_rt")
    }
    visual = torch.nn.ModuleList([Editor(vision, VISUAL_RANK), torch.nn.Identity()])
    tower = Holder(vision_model=Holder(encoder=Holder(vision_rt=visual)))
    whole = Holder(
        mm_rt=Editor(hidden, VISUAL_RANK), vision_tower=Holder(vision_tower=tower), **text
    )
    return Holder(model=whole)


def saved(model: torch.nn.Module, file) -> dict:
    """`rt_modules.bin`: every module of an editor and every one above it with its own tensors."""
    modules = {
        name: module.state_dict()
        for name, module in model.named_modules()
        if any(kind in name for kind in ("mm_rt", "vision_rt", "lm_rt"))
    }
    torch.save(modules, file)
    return modules


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    model = trained()
    file = tmp_path_factory.mktemp("mrt") / NAME
    return model.get_submodule("model"), saved(model, file), file


def hooked(oracle, editors, prefix: slice, suffix: slice) -> np.ndarray:
    """Logits of a LLaVA of `transformers` whose modules are followed by the editors."""
    tower = next(m for n, m in oracle.named_modules() if n.endswith("encoder.layers.0"))
    visual = editors.vision_tower.vision_tower.vision_model.encoder.vision_rt[0]
    known = {}

    def remember(module, inputs):
        known["h"] = inputs[0]

    def after_mlp(module, inputs, out):
        # The features of a block are recorded before hooks on it see them: what follows the sum of
        # residual and MLP is done inside.
        return visual(known["h"] + out) - known["h"]

    def block(layer):
        def edit(module, inputs, out):
            h = out[0] if isinstance(out, tuple) else out
            new = h.clone()
            new[:, prefix] = editors.prefix_lm_rt[layer](h[:, prefix])
            new[:, suffix] = editors.suffix_lm_rt[layer](h[:, suffix])
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return edit

    handles = [
        tower.layer_norm2.register_forward_pre_hook(remember),
        tower.mlp.register_forward_hook(after_mlp),
        oracle.model.multi_modal_projector.register_forward_hook(
            lambda module, inputs, out: editors.mm_rt(out)
        ),
    ]
    for number, layer in enumerate(oracle.model.language_model.layers):
        handles.append(layer.register_forward_hook(block(number)))
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([ROW]), "pixel_values": torch.tensor(PIXELS)}
        logits = oracle(**inputs).logits.numpy()
    for handle in handles:
        handle.remove()
    return logits


def ours(mllm) -> np.ndarray:
    inputs = {"input_ids": np.asarray([ROW]), "pixel_values": PIXELS}
    return np.asarray(Model(mllm, None).logits(**inputs, image_token_id=IMAGE_ID))


def test_logits_are_those_of_the_editors_in_torch(editors):
    own, modules, file = editors
    assert sum(name.endswith("mm_rt.rotate_layer") for name in modules) == 1
    assert "model.prefix_lm_rt" in modules
    assert modules["model.vision_tower.vision_tower.vision_model.encoder.vision_rt.1"] == {}
    case = case_of("llama + clip")
    bare = ours(case.model)
    # Twelve tokens of text, the first two and the last left out: four at each end of nine.
    for edits, prefix, suffix in (
        ("", slice(6, 10), slice(11, 15)),
        ("mrt:length=2", slice(4, 6), slice(14, 16)),
    ):
        spec = import_rt_modules(file.parent / NAME, case.model, edits=edits, allow_pickle=True)
        expected = hooked(case.oracle, own, prefix, suffix)
        assert np.abs(expected - bare).max() > 0.1
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(ours(case.model), expected, atol=2e-5 * scale)
    assert spec.startswith("loreft:positions=all,rank=2,site=vision.block.out/loreft")


def test_a_part_of_the_editors_is_a_file_too(editors, tmp_path):
    _, modules, _ = editors
    model = tiny_model(hidden_size=HIDDEN, num_layers=2)
    only = {name: x for name, x in modules.items() if "suffix_lm_rt.1" in name}
    torch.save(only, tmp_path / NAME)
    attach_adapter(model, tmp_path, allow_pickle=True)
    assert model.tuning.spec == "loreft:positions=dialogue:skip(2;1)+f0+l6,layers=1,rank=3"
    load_adapters(model, {"a": tmp_path, "b": tmp_path / NAME}, allow_pickle=True)
    assert model.tuning.adapters == ("a", "b")


def test_what_is_no_file_of_editors_is_refused(editors, tmp_path):
    _, modules, file = editors
    model = tiny_model()
    with pytest.raises(UserError, match="is a pickle, and pickles run code"):
        attach_adapter(model, file)
    with pytest.raises(UserError, match=r"rotate at vision.block.out has shape \(1, 16, 2\)"):
        attach_adapter(model, file, allow_pickle=True)
    for edits in ("mrt:groups=prefix", "mrt/lora", "lora/mrt"):
        with pytest.raises(UserError, match="has the groups visual, connector, prefix, suffix"):
            attach_adapter(model, file, edits=edits, allow_pickle=True)
    one = "model.suffix_lm_rt.0"
    for changed, message in (
        ({}, "holds no editors of MRT"),
        ({one: {"learned_source.bias": torch.zeros(3)}}, "layer 0 has no rotate_layer.weight"),
        (modules | {f"{one}.learned_source": {"bias": torch.ones(RANK)}}, "with different values"),
        ({"model.lm_head": {"weight": torch.zeros(2)}}, "holds model.lm_head.weight"),
        ({"model": torch.zeros(2)}, "does not hold state dicts"),
    ):
        torch.save(changed, tmp_path / NAME)
        with pytest.raises(UserError, match=message):
            attach_adapter(model, tmp_path, allow_pickle=True)
    assert model.tuning.spec == "none"


def test_a_connector_of_the_first_stage_comes_before_an_llm(tmp_path, capsys):
    case = case_of("llama + clip")
    llm = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))
    llm.model.load_state_dict(case.oracle.model.language_model.state_dict())
    llm.lm_head.load_state_dict(case.oracle.lm_head.state_dict())
    llm.save_pretrained(tmp_path / "vicuna")
    case.oracle.model.vision_tower.save_pretrained(tmp_path / "clip")
    linears = case.oracle.model.multi_modal_projector
    tensors = {
        f"model.mm_projector.{place}.{leaf}": tensor.half()
        for place, linear in ((0, linears.linear_1), (2, linears.linear_2))
        for leaf, tensor in linear.state_dict().items()
    }
    file = tmp_path / "mm_projector.bin"
    torch.save(tensors, file)
    for linear in (linears.linear_1, linears.linear_2):
        linear.load_state_dict({n: x.half().float() for n, x in linear.state_dict().items()})
    command = ["import", str(tmp_path / "vicuna"), str(tmp_path / "run"), "--projector", str(file)]
    assert main([*command, "--allow-pickle"]) == 2
    assert "name its --vision too" in capsys.readouterr().err
    command += ["--vision", str(tmp_path / "clip")]
    assert main(command) == 2
    assert "is pickled, and pickles run code" in capsys.readouterr().err
    assert main([*command, "--allow-pickle", "--connector", "linear"]) == 2
    assert "is a connector mlp2x_gelu, not linear" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--allow-pickle"]) == 0
    model = mj.load(tmp_path / "run")
    inputs = {"input_ids": np.asarray([ROW]), "pixel_values": PIXELS}
    with torch.no_grad():
        expected = case.oracle(**{n: torch.tensor(x) for n, x in inputs.items()}).logits.numpy()
    found = model.logits(**inputs, image_token_id=IMAGE_ID)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_kinds_of_connectors(tmp_path):
    file = tmp_path / "mm_projector.bin"
    linear = torch.nn.Linear(3, 5)
    one = {f"model.mm_projector.{leaf}": x for leaf, x in linear.state_dict().items()}
    torch.save(one, file)
    kind, tensors = read_projector(file, allow_pickle=True)
    assert kind == "linear"
    np.testing.assert_array_equal(
        tensors["connector.layers.0.kernel"], linear.weight.detach().numpy().T
    )
    for changed, message in (
        ({"model.mm_projector.1.weight": one["model.mm_projector.weight"]}, "no whole LLaVA"),
        ({"model.mm_projector.weight": one["model.mm_projector.weight"]}, "no whole LLaVA"),
        (one | {"model.embed_tokens.weight": torch.zeros(2)}, "holds model.embed_tokens.weight"),
        ({"a": {"b": torch.zeros(2)}}, "holds no tensors by name"),
    ):
        torch.save(changed, file)
        with pytest.raises(UserError, match=message):
            read_projector(file, allow_pickle=True)
    with pytest.raises(UserError, match="is not a file"):
        read_projector(tmp_path / "nowhere.bin", allow_pickle=True)
