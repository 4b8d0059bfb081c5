"""Config files, overrides, and what is written into a run's directory."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moresjax.configs import digits
from moresjax.core.errors import UserError
from moresjax.models.zoo import mllm_config
from moresjax.runs.architecture import model_config
from moresjax.runs.config import (
    base_config,
    differences,
    find_config,
    load_config,
    parse_arg,
    read_config,
    save_config,
    set_value,
)
from moresjax.runs.run_config import RunConfig, resolve

DEFAULTS = {"stage": "llm", "tuning": "none", "seed": 0, "lr": 1.0, "fast": False}
KEYS = ("rank", "positions", "layers", "dropout", "init", "targets")
VALUES = st.text("abcxyz0189;.+%()", min_size=1, max_size=6)
METHOD = st.builds(
    lambda name, pairs: name + (":" + ",".join(f"{k}={v}" for k, v in pairs) if pairs else ""),
    st.sampled_from(("mores", "lora", "ia3")),
    st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3),
)
SPEC = st.lists(METHOD, min_size=1, max_size=3).map("/".join)


def config_file(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text)
    return str(path)


@given(SPEC, st.integers(), st.permutations(("stage", "tuning", "seed")))
def test_a_tuning_spec_is_one_argument_wherever_it_stands(spec, seed, order):
    values = {"stage": "finetune", "tuning": spec, "seed": seed}
    parsed = parse_arg(",".join(f"{key}={values[key]}" for key in order), **DEFAULTS)
    assert parsed.to_dict() == DEFAULTS | values


def test_arguments_take_the_type_of_their_default():
    parsed = parse_arg("seed=7,lr=2,fast=true,stage=3", **DEFAULTS)
    assert parsed.to_dict() == DEFAULTS | {"seed": 7, "lr": 2.0, "fast": True, "stage": "3"}
    assert isinstance(parsed.lr, float)


def test_no_arguments_are_the_defaults():
    assert parse_arg(None, **DEFAULTS).to_dict() == DEFAULTS


@pytest.mark.parametrize("arg", ["sed=1", "seed=1,steps=2", "seed"])
def test_an_unknown_argument_names_the_allowed_ones(arg):
    with pytest.raises(UserError, match="stage, tuning, seed, lr, fast"):
        parse_arg(arg, **DEFAULTS)


@pytest.mark.parametrize("arg", ["seed=x", "seed=1.5", "lr=fast", "fast=1"])
def test_an_argument_of_another_type_is_refused(arg):
    with pytest.raises(UserError, match=arg.split("=")[0]):
        parse_arg(arg, **DEFAULTS)


@settings(max_examples=25)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_is_set_exactly(value):
    config = base_config()
    set_value(config, "optimizer.lr", repr(value))
    assert config.optimizer.lr == value


@settings(max_examples=25)
@given(st.integers(-(2**40), 2**40))
def test_a_whole_number_fits_whole_and_real_keys(value):
    config = base_config()
    set_value(config, "steps", str(value))
    set_value(config, "optimizer.lr", str(value))
    assert config.steps == value
    assert config.optimizer.lr == value
    assert type(config.steps) is int
    assert type(config.optimizer.lr) is float


@settings(max_examples=25)
@given(st.text(max_size=20))
def test_text_is_taken_as_it_stands(text):
    config = base_config()
    set_value(config, "tuning", text)
    assert config.tuning == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("vision", ("vision",)),
        ("('llm', 'connector')", ("llm", "connector")),
        ("['llm']", ("llm",)),
        ("()", ()),
        (r"llm\..*bias", (r"llm\..*bias",)),
    ],
)
def test_a_list_of_patterns_from_text(text, value):
    config = base_config()
    set_value(config, "also_train", text)
    assert config.also_train == value


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False)])
def test_a_truth_value(text, value):
    config = base_config()
    set_value(config, "tensorboard", text)
    assert config.tensorboard is value


def test_open_dicts_take_new_keys():
    config = base_config()
    set_value(config, "data.size", "32")
    set_value(config, "data.task", "text")
    assert config.data.to_dict() == {"name": "digits", "size": 32, "task": "text"}
    with pytest.raises(UserError, match=r"optimizer\.rate"):
        set_value(config, "optimizer.rate", "1e-4")


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("stepz", "steps"),
        ("optimizer.lrr", "weight_decay"),
        ("optimiser.lr", "optimizer"),
        ("data.deep.size", "name"),
        ("steps.lr", ""),
        ("mesh.model", "tensor"),
    ],
)
def test_an_unknown_key_names_itself_and_the_allowed_ones(key, allowed):
    config = base_config()
    before = config.to_dict()
    with pytest.raises(UserError) as error:
        set_value(config, key, "1")
    assert repr(key) in str(error.value)
    assert allowed in str(error.value)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("steps", "many", "int"),
        ("steps", "1.5", "int"),
        ("steps", "True", "int"),
        ("steps", "None", "int"),
        ("optimizer.lr", "fast", "float"),
        ("optimizer.lr", "True", "float"),
        ("optimizer.lr", "[1]", "float"),
        ("tensorboard", "yes", "true"),
        ("optimizer", "3", "ConfigDict"),
    ],
)
def test_a_value_of_another_type_names_key_and_type(key, text, kind):
    config = base_config()
    before = config.to_dict()
    with pytest.raises(UserError) as error:
        set_value(config, key, text)
    assert key in str(error.value)
    assert text in str(error.value)
    assert kind in str(error.value)
    assert config.to_dict() == before


def test_a_config_file_with_arguments_and_overrides(tmp_path):
    name = config_file(
        tmp_path,
        "from moresjax.runs.config import base_config, parse_arg\n"
        "def get_config(arg=None):\n"
        "    config = base_config()\n"
        "    config.tuning = parse_arg(arg, tuning='none').tuning\n"
        "    return config\n",
    )
    config = load_config(f"{name}:tuning=lora:rank=2,alpha=1", ["steps=5", "name=a=b"])
    assert (config.tuning, config.steps, config.name) == ("lora:rank=2,alpha=1", 5, "a=b")
    assert load_config(name).tuning == "none"
    with pytest.raises(UserError, match="key=value"):
        load_config(name, ["steps"])


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"missing\.py does not exist"):
        load_config(str(tmp_path / "missing.py"))
    with pytest.raises(UserError, match="get_config"):
        load_config(config_file(tmp_path, "config = 1\n"))
    with pytest.raises(UserError, match="returned None, which is no configuration"):
        load_config(config_file(tmp_path, "def get_config(arg=None):\n    pass\n"))


@settings(max_examples=15)
@given(
    steps=st.integers(0, 10**9),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    tuning=st.text(max_size=20),
    also=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    data=st.dictionaries(st.sampled_from(("size", "seed", "task")), st.integers()),
)
def test_saved_configs_read_back_the_same(tmp_path_factory, steps, lr, tuning, also, data):
    config = base_config()
    config.steps, config.optimizer.lr, config.tuning = steps, lr, tuning
    config.also_train = also
    config.data.update(data)
    path = tmp_path_factory.mktemp("config") / "config.json"
    config = resolve(config)
    save_config(config, path)
    again = read_config(path)
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert type(again.also_train) is tuple
    path.write_text(json.dumps(again.to_dict() | {"stepz": 1}))
    with pytest.raises(UserError, match="unknown config key"):
        read_config(path)


def test_saved_configs_are_json_a_person_can_read(tmp_path):
    save_config(RunConfig(), tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["optimizer"]["lr"] == 1e-3
    assert len(text.splitlines()) > 20


def test_differences_name_the_changed_leaves():
    a, b = base_config(), base_config()
    assert differences(a.to_dict(), b.to_dict()) == []
    b.steps = 7
    b.optimizer.lr = 0.5
    b.data.size = 3
    found = differences(a.to_dict(), b.to_dict())
    assert found == ["data.size", "optimizer.lr", "steps"]
    assert differences(b.to_dict(), a.to_dict()) == found


NESTED = st.recursive(
    st.integers(0, 2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@given(*[st.dictionaries(st.sampled_from("abc"), NESTED, max_size=3) for _ in range(2)])
def test_differences_are_empty_for_equal_dicts_only(a, b):
    assert (differences(a, b) == []) == (a == b)
    assert differences(a, b) == differences(b, a)


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text in ("{", "[1]", '{"also_train": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json is not a run's configuration"):
            read_config(path)


OLD = {"length": 77, "images": 3, "window": 5, "reading_threads": 4, "probe_every": 9}
NEW = {"max_seq_len": 77, "images_per_row": 3, "pack_window": 5, "num_workers": 4, "lmar_every": 9}


def test_a_file_with_the_keys_of_version_0_1_reads_back(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OLD))
    found = read_config(path)
    assert {key: found.to_dict()[key] for key in NEW} == NEW


@pytest.mark.parametrize(("old", "new"), zip(OLD, NEW, strict=True))
def test_a_key_of_version_0_1_names_its_new_spelling(tmp_path, old, new):
    with pytest.raises(UserError, match=f"^config key {old} is now {new}$"):
        set_value(base_config(), old, "1")
    text = "from moresjax.runs.config import base_config\ndef get_config(arg=None):\n"
    name = config_file(
        tmp_path, f"{text}    config = base_config()\n    config.{old} = 1\n    return config\n"
    )
    with pytest.raises(UserError, match=f"config key {old} is now {new}$"):
        load_config(name)
    with pytest.raises(UserError, match=f"config key {old} is now {new}$"):
        resolve({old: 1})


def test_fields_of_parts_of_version_0_1_read_back(tmp_path):
    path = tmp_path / "config.json"
    fields = {"hidden_size": 8, "last_layers": 2}
    pair = {"encoders": [fields, fields], "fusion": "interleave"}
    for vision in (fields, pair):
        path.write_text(json.dumps({"model": {"vision": vision}}))
        found = read_config(path).model.vision
        for each in found.get("encoders", [found]):
            assert each == {"hidden_size": 8, "num_trainable_blocks": 2}


# ---- Plain assignments, and what becomes of them.


def test_a_part_is_assigned_by_name_or_by_fields():
    config = base_config()
    config.model.vision = "clip-l-14-336"
    assert resolve(config).model.vision == "clip-l-14-336"
    config.model.vision = {"hidden_size": 8, "encoders": [{"num_layers": 1}]}
    assert resolve(config).model.vision == {"hidden_size": 8, "encoders": ({"num_layers": 1},)}
    config.model.vision = ""
    config.data = {"name": "llava", "files": "a.json"}
    config.data.image_root = "images"
    config.validation.data = {"name": "digits"}
    config.validation.data.size = 3
    config.optimizer.lr = 1
    config.also_train = ["llm", "connector"]
    found = resolve(config)
    assert found.data == {"name": "llava", "files": "a.json", "image_root": "images"}
    assert found.validation.data == {"name": "digits", "size": 3}
    assert type(found.optimizer.lr) is float
    assert found.also_train == ("llm", "connector")


@pytest.mark.parametrize(
    ("key", "allowed"),
    [("stepz", "steps"), ("optimizer.lrr", "weight_decay"), ("mesh.model", "tensor")],
)
def test_an_unknown_key_in_a_config_is_found_with_the_allowed_ones(tmp_path, key, allowed):
    text = "from moresjax.runs.config import base_config\ndef get_config(arg=None):\n"
    name = config_file(tmp_path, f"{text}    c = base_config()\n    c.{key} = 1\n    return c\n")
    with pytest.raises(UserError, match=f"unknown config key '{key}'.*{allowed}"):
        load_config(name)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"steps": "many"}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr"),
        ({"optimizer": 3}, "optimizer"),
        ({"data": "digits"}, "data"),
        ({"model": {"classes": (1, "a")}}, "model.classes"),
        ({"model": {"llm": 3}}, "model.llm"),
        ({"also_train": 3}, "also_train"),
        ({"tensorboard": 1}, "tensorboard"),
    ],
)
def test_a_value_of_another_type_in_a_config_names_its_key(values, key):
    with pytest.raises(UserError, match=f"config key {key} takes"):
        resolve(values)


def test_a_resolved_configuration_stays_as_it_is():
    config = RunConfig(steps=3)
    assert resolve(config) is config
    assert resolve(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 4


# ---- Packaged configs.


@pytest.mark.parametrize("name", ["digits:stage=finetune", "llava_steering", "mrt", "forkme"])
def test_every_part_of_every_config_is_swapped_by_name(name):
    for llm, vision in (("phi-1.5", "clip-l-14-336"), ("qwen2.5-0.5b", "mof-l-14-336")):
        changes = [f"model.llm={llm}", f"model.vision={vision}", "model.connector=linear"]
        swapped = model_config(load_config(name, changes))
        wanted = mllm_config(llm, vision, "linear")
        assert swapped.llm.hidden_size == wanted.llm.hidden_size
        assert swapped.visual_tokens == wanted.visual_tokens
        assert swapped.connector == "linear"
    changes = ["model.vision=clip-l-14-336", "model.vision.feature_layer=-1"]
    config = load_config(name, [*changes, "model.llm=phi-1.5", "model.llm.num_layers=3"])
    found = model_config(config)
    assert (found.vision.feature_layer, found.vision.hidden_size) == (-1, 1024)
    assert (found.llm.num_layers, found.llm.hidden_size) == (3, 2048)
    several = load_config(name, [changes[0], "model.vision.feature_layer=[-2,6]"])
    assert model_config(several).connector_linears()["0"][0] == 2 * 1024
    assert resolve(json.loads(json.dumps(several.to_dict()))) == several
    with pytest.raises(UserError, match=r"feature_layer=\(9, 25\) .* from -25 to 24"):
        model_config(load_config(name, [changes[0], "model.vision.feature_layer=[9,25]"]))
    with pytest.raises(UserError, match="unknown field of vision encoder 'depth'"):
        model_config(load_config(name, [changes[0], "model.vision.depth=3"]))


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py"])
def test_a_packaged_config_is_found_by_its_name_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = load_config(f"{name}:stage=llm,seed=3", ["steps=7"])
    assert (config.name, config.seed, config.steps) == ("llm", 3, 7)


def test_packaged_configs_are_where_python_imports_them_from():
    assert find_config("digits").samefile(digits.__file__)


def test_a_file_wins_over_the_packaged_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text("def get_config(arg=None):\n    return {'name': 'mine'}\n")
    assert load_config("digits.py").name == "mine"
    assert load_config("digits:stage=llm").name == "llm"


@pytest.mark.parametrize("name", ["digitz", "elsewhere/digits.py", "configs/none.py", "__init__"])
def test_an_unknown_config_names_the_packaged_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name} does not exist.* digits, forkme, laptop, llava_"):
        load_config(name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model.lm = 3\n    return config.nothing", "line 5: AttributeError: .*nothing"),
        ("return 1 / 0", "line 4: ZeroDivisionError: division by zero"),
        ("retrun config", "line 4: SyntaxError: invalid syntax"),
    ],
)
def test_errors_in_a_config_file_are_told_with_their_line(line, message, tmp_path):
    text = "from moresjax.runs.config import base_config\ndef get_config(arg=None):\n"
    (tmp_path / "mine.py").write_text(f"{text}    config = base_config()\n    {line}\n")
    with pytest.raises(UserError, match=f"config file .*mine.py, {message}"):
        load_config(str(tmp_path / "mine.py"))
