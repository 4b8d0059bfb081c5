"""Folders of pyreft: what its way of saving writes is read, and its way of loading reads ours."""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer, vocabulary
from moresjax.inference.load import load
from moresjax.models.initialize import initialize
from moresjax.models.mllm import MLLM
from moresjax.testing.models import tiny_config, tiny_model
from moresjax.weights.adapter import attach_adapter, save_adapter
from moresjax.weights.export import export_hf
from moresjax.weights.pyreft import KEYS, export_pyreft, import_pyreft

DIM, LAYERS = 16, 3
# Every key of these two classes of pyvene 0.1.8, from `pip download --no-deps pyvene==0.1.8`: the
# fields of the one, `sorted(IntervenableConfig().to_dict())` of the other with transformers 5.24.
# The ReftConfig of pyreft 0.1.0 adds none.
PYVENE = {
    "RepresentationConfig": (
        *("layer", "component", "unit", "max_number_of_units", "low_rank_dimension"),
        *("intervention_type", "intervention", "subspace_partition", "group_key"),
        *("intervention_link_key", "moe_key", "source_representation"),
        *("hidden_source_representation", "latent_dim"),
    ),
    "IntervenableConfig": (
        *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label"),
        *("intervention_constant_sources", "intervention_dimensions", "intervention_types"),
        *("is_encoder_decoder", "label2id", "mode", "model_type", "output_attentions"),
        *("output_hidden_states", "problem_type", "representations", "return_dict"),
        *("sorted_keys", "transformers_version"),
    ),
}
TYPE = "<class 'pyreft.interventions.LoreftIntervention'>"


class Loreft(torch.nn.Module):
    """The arithmetic of LoReFT on a rotation that torch keeps orthonormal, as pyreft has it."""

    class Rotate(torch.nn.Module):
        def __init__(self, rank):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(DIM, rank)))

    def __init__(self, rank: int, dtype=torch.float32):
        super().__init__()
        self.rotate_layer = torch.nn.utils.parametrizations.orthogonal(self.Rotate(rank))
        self.learned_source = torch.nn.Linear(DIM, rank).to(dtype)

    def forward(self, h):
        rotate = self.rotate_layer.weight
        low = self.learned_source(h.to(self.learned_source.weight.dtype)).float() - h @ rotate
        return h + low @ rotate.T

    def saved(self):
        state = OrderedDict(self.learned_source.state_dict())
        state["rotate_layer"] = self.rotate_layer.weight.data
        return state

    def load(self, state):
        """Puts R into a new parametrisation; pyreft insists that it comes out again."""
        self.learned_source.load_state_dict(state, strict=False)
        rotate = state["rotate_layer"]
        self.rotate_layer.parametrizations.weight[0].base[:, : rotate.shape[1]] = rotate
        assert torch.allclose(self.rotate_layer.weight.data, rotate)


def write_folder(folder, edits, names, component="block_output", extra=9):
    """As pyvene saves: `edits` lists (layer, module), `names` the files without their prefix."""
    folder.mkdir()
    rows = [
        [layer, component.format(layer), "pos", 1, module.learned_source.out_features]
        + [None] * extra
        for layer, module in edits
    ]
    for (_, module), name in zip(edits, names, strict=True):
        torch.save(module.saved(), folder / f"intkey_{name}.bin")
    config = {
        "intervention_constant_sources": [True] * len(rows),
        "intervention_dimensions": [DIM] * len(rows),
        "intervention_types": [TYPE] * len(rows),
        "mode": "parallel",
        "model_type": "<class 'transformers.models.llama.modeling_llama.LlamaForCausalLM'>",
        "representations": rows,
        "sorted_keys": names,
        "transformers_version": "4.45.1",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def described(spec: str = "none") -> MLLM:
    return MLLM(tiny_config(), spec)


def edit_of(model, number: int, layer: int, h: torch.Tensor) -> np.ndarray:
    """What a method of the model makes of features at one layer."""
    name, method = model.tuning.methods[number]
    params = {n: x[...][layer] for n, x in model.tuning.params[name]["llm.block.out"].items()}
    h = jnp.asarray(h.numpy())
    return np.asarray(h + method.delta(method.prepare(params), h[None])[0])


@pytest.fixture(scope="module")
def features():
    return torch.tensor(np.random.default_rng(0).standard_normal((5, DIM)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("component", "spelling", "extra"),
    [
        ("block_output", "layer_{}_comp_block_output_unit_pos_nunit_1#0", 9),
        ("block_output", "layer.{}.comp.block_output.unit.pos.nunit.1#0", 9),
        ("block_output", "layer.{}.repr.block_output.unit.pos.nunit.1#0", 5),
        ("model.layers[{}].output", "comp_model_layers[{}]_output_unit_pos_nunit_1#0", 9),
    ],
)
def test_a_folder_of_pyreft_gives_the_same_edits(tmp_path, features, component, spelling, extra):
    edits = [(layer, Loreft(2)) for layer in (0, 2)]
    names = [spelling.format(layer) for layer, _ in edits]
    folder = write_folder(tmp_path / "reft", edits, names, component, extra)
    model = described()
    assert import_pyreft(folder, model, allow_pickle=True) == "loreft:layers=0;2,rank=2"
    for layer, module in edits:
        expected = module(features).detach().numpy()
        np.testing.assert_allclose(edit_of(model, 0, layer, features), expected, atol=1e-5)
        assert np.abs(expected - features.numpy()).max() > 1e-2


def test_two_edits_of_a_layer_are_prefix_and_suffix_and_half_precision_is_read(tmp_path, features):
    edits = [(layer, Loreft(1, torch.bfloat16)) for layer in [*range(LAYERS)] * 2]
    names = [
        f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{n // LAYERS}"
        for n, (layer, _) in enumerate(edits)
    ]
    folder, model = write_folder(tmp_path / "reft", edits, names), described()
    spec = import_pyreft(folder, model, allow_pickle=True)
    assert spec == "loreft:positions=prompt:f4+l0,rank=1/loreft:positions=prompt:f0+l4,rank=1"
    for n, (layer, module) in enumerate(edits):
        module.learned_source.float()
        expected = module(features).detach().numpy()
        found = edit_of(model, n // LAYERS, layer, features)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    edits = "mores:positions=question:f2/mores:positions=question:l2"
    spec = import_pyreft(folder, model, edits=edits, allow_pickle=True)
    assert spec == "mores:positions=question:f2/mores:positions=question:l2"


@pytest.mark.parametrize("spec", ["mores:rank=3,layers=1;2", "reft:rank=2,layers=0;1"])
def test_a_written_folder_loads_as_pyreft_loads_it_and_comes_back_here(tmp_path, features, spec):
    model = described(spec)
    rng = np.random.default_rng(1)
    for name, _ in model.tuning.methods:
        for variable in model.tuning.params[name]["llm.block.out"].values():
            variable.set_value(jnp.asarray(rng.standard_normal(variable.shape), jnp.float32))
    folder = export_pyreft(model, tmp_path / "reft")
    config = json.loads((folder / "config.json").read_text())
    assert config["intervention_types"] == [TYPE] * len(config["sorted_keys"])
    rank = model.tuning.methods[0][1].rank
    for number, (layer, component, unit, units, low_rank, *others) in enumerate(
        config["representations"]
    ):
        assert (component, unit, units, low_rank) == ("block_output", "pos", 1, rank)
        assert others == [None] * 9
        place = number // 2
        key = f"layer_{layer}_comp_block_output_unit_pos_nunit_1#{place}"
        assert config["sorted_keys"][number] == key
        module = Loreft(rank)
        module.load(torch.load(folder / f"intkey_{key}.bin", weights_only=True))
        expected = module(features).detach().numpy()
        np.testing.assert_allclose(edit_of(model, place, layer, features), expected, atol=1e-4)
        rotate = module.saved()["rotate_layer"].double()
        np.testing.assert_allclose(rotate.T @ rotate, np.eye(rank), atol=1e-6)

    again = described()
    edits = "/".join(f"{m.name}:positions={m.positions}" for _, m in model.tuning.methods)
    found = import_pyreft(folder, again, edits=edits, allow_pickle=True)
    assert found == model.tuning.spec
    for number, (name, _) in enumerate(model.tuning.methods):
        for layer in np.flatnonzero(model.tuning.layer_masks[name]["llm.block.out"][...]):
            ours, theirs = (edit_of(m, number, layer, features) for m in (model, again))
            np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_what_cannot_be_read_or_written_is_refused(tmp_path, monkeypatch):
    name = "layer_0_comp_block_output_unit_pos_nunit_1#0"
    folder, model = write_folder(tmp_path / "reft", [(0, Loreft(2))], [name]), described("red")

    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            import_pyreft(folder, model, **({"allow_pickle": True} | options))
        assert model.tuning.spec == "red"

    refused("only pickled weights", allow_pickle=False)
    refused("'red'; choose from: loreft, mores", edits="red")
    refused("1 edits per layer, but 'loreft/mores' says it of 2", edits="loreft/mores")
    wide = MLLM(tiny_config(hidden_size=32), "none")
    with pytest.raises(UserError, match=r"rotate of an edit has shape \(16, 2\), .* \(32, 2\)"):
        import_pyreft(folder, wide, allow_pickle=True)
    state = torch.load(folder / f"intkey_{name}.bin", weights_only=True)
    for changed, message in (
        (state | {"rotate_layer": 2 * state["rotate_layer"]}, "is not orthonormal"),
        ({"proj_layer.weight": state["weight"]}, "must hold bias, rotate_layer, weight"),
    ):
        torch.save(changed, folder / f"intkey_{name}.bin")
        refused(message)
    shutil.move(folder / f"intkey_{name}.bin", tmp_path)
    refused(f"lacks the file intkey_{name}.bin")
    config = (folder / "config.json").read_text()
    for old, new, message in (
        ("block_output", "mlp_output", "component in .* 'mlp_output'; choose from: block_output"),
        ("LoreftI", "NodireftI", "intervention type .* choose from"),
        ('"pos"', '"h.pos"', "must be of single positions, got 1 of 'h.pos'"),
        ("representations", "layers", "has no representations"),
    ):
        (folder / "config.json").write_text(config.replace(old, new))
        refused(message)

    for spec in ("red", "loreft:site=llm.embed.out", "loreft/red"):
        with pytest.raises(UserError, match="holds loreft and mores at"):
            export_pyreft(described(spec), tmp_path / "out")
    with pytest.raises(UserError, match="no edits to write"):
        export_pyreft(described(), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch, which is not installed"):
        export_pyreft(described("loreft"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_key_of_a_folder_is_read_neutral_irrelevant_or_refused(tmp_path):
    name = "layer_0_comp_block_output_unit_pos_nunit_1#0"
    folder, model = write_folder(tmp_path / "reft", [(0, Loreft(2))], [name]), described()
    config = (folder / "config.json").read_text()
    assert KEYS.unlisted([*json.loads(config), *PYVENE["IntervenableConfig"]]) == []
    for old, new, message in (
        ('"parallel"', '"serial"', r"config\.json: mode=serial is not supported, only parallel is"),
        ('"mode"', '"moods"', r"the setting moods=parallel is not known"),
        ("[true]", "[false]", r"has edits with a source"),
        ("2, null", "2, [0, 1]", r"representations with field 6 = \[0, 1\]"),
        ("1, 2, null", "1, 3, null", r"is of rank 2, not of 3"),
    ):
        assert old in config
        (folder / "config.json").write_text(config.replace(old, new))
        with pytest.raises(UserError, match=message):
            import_pyreft(folder, model, allow_pickle=True)
    fields = PYVENE["RepresentationConfig"]
    (entry,) = json.loads(config)["representations"]
    assert len(entry) == len(fields)
    for field, value in (("low_rank_dimension", 2), *((field, 1) for field in fields[5:])):
        named = [dict(zip(fields, entry, strict=True)) | {field: value}]
        (folder / "config.json").write_text(
            json.dumps(json.loads(config) | {"representations": named})
        )
        message = "" if field == "low_rank_dimension" else f"field {field} = 1"
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            assert import_pyreft(folder, model, allow_pickle=True) == "loreft:layers=0,rank=2"


def test_adapter_folders_of_all_kinds_are_attached(tmp_path):
    names = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0" for layer in (0, 2)]
    edits = [(0, Loreft(2)), (2, Loreft(2))]
    folder, model = write_folder(tmp_path / "reft", edits, names), described()
    attach_adapter(model, folder, allow_pickle=True)
    assert model.tuning.spec == "loreft:layers=0;2,rank=2"
    attach_adapter(model, folder, edits="mores:positions=image:f2", allow_pickle=True)
    assert model.tuning.spec == "mores:positions=image:f2,layers=0;2,rank=2"
    with pytest.raises(UserError, match="--allow-pickle"):
        attach_adapter(model, folder)
    ours = save_adapter(tiny_model("red"), tmp_path / "ours")
    with pytest.raises(UserError, match="is not a folder of pyreft"):
        attach_adapter(model, ours, edits="mores")
    assert model.tuning.spec == "mores:positions=image:f2,layers=0;2,rank=2"


def test_the_command_line_generates_with_an_adapter_and_converts_it(tmp_path, capsys):
    config = dataclasses.replace(tiny_config(vocab_size=len(vocabulary())), vision=None)
    mllm = initialize(MLLM(config))
    nnx.update(mllm, jax.tree.map(lambda x: 12 * x, nnx.state(mllm, nnx.Param)))  # it talks
    base = export_hf(mllm, tmp_path / "base")
    build_tokenizer().save_pretrained(base)
    edits = [(layer, Loreft(2)) for layer in range(LAYERS)]
    for _, module in edits:
        module.learned_source.weight.data *= 300  # enough to change what is said
    names = [f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0" for layer, _ in edits]
    folder = write_folder(tmp_path / "reft", edits, names)
    prompt = ["--prompt", "two ?", "--max-new-tokens", "4", "--template", "bare", "--json"]
    spec = ["--edits", "loreft:positions=prompt:f4+l5", "--allow-pickle"]

    def answer(*adapter) -> str:
        assert main(["generate", "--model", str(base), *prompt, *map(str, adapter)]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    changed = answer("--adapter", folder, *spec)
    model = load(base, template="bare")
    bare = model.generate(["two ?"], max_new_tokens=4)[0]
    model.load_adapter(folder, edits="loreft:positions=prompt:f4+l5", allow_pickle=True)
    assert model.generate(["two ?"], max_new_tokens=4)[0] == changed != bare
    ours = tmp_path / "ours"
    arguments = [str(base), str(ours), "--format", "adapter", "--adapter", str(folder), *spec]
    assert main(["export", *arguments]) == 0
    capsys.readouterr()
    assert answer("--adapter", ours) == changed
    command = ["generate", "--model", str(base), *prompt, "--adapter", str(folder)]
    assert main(command) == 2
    assert "--allow-pickle" in capsys.readouterr().err
