"""What a run is refused for, or warned of, before it reads data; and what its sources tell it."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
from run_helpers import TEXT_ONLY, TINY, config_of

from moresjax.cli import main
from moresjax.core.errors import UserError
from moresjax.data.digits import build_tokenizer
from moresjax.data.sources import make_source
from moresjax.inference.load import load
from moresjax.plans.train_plan import plan
from moresjax.runs.architecture import model_config
from moresjax.runs.processor import build_processor
from moresjax.runs.run_config import InitConfig, PartsConfig, RunConfig
from moresjax.runs.sources import check_same_tokenizer, check_sources, with_sources
from moresjax.testing.models import tiny_model
from moresjax.training.checks import check_samples, check_start
from moresjax.training.loop import train
from moresjax.weights.export import export_hf

PRETRAIN = "stage=pretrain"


def start(arg: str, settings: dict, **changes: object) -> None:
    config = dataclasses.replace(config_of(arg, settings), **changes)
    check_start(config, 1, build_processor(config))


# ---- Refused.


@pytest.mark.parametrize(
    ("arg", "settings", "message"),
    [
        (PRETRAIN, {"max_seq_len": 16}, "an image makes 16 visual tokens, which do not fit rows"),
        ("stage=llm", {"model.llm.vocab_size": 36}, "up to id 36, .* must be at least 37"),
        ("stage=vit", {"model.classes": "()"}, "patch_classes needs model.classes"),
        ("stage=siglip", {"batch_size": 1}, "batch_size must be at least 2"),
        (
            "stage=llm",
            {"model.llm.positions": "learned", "model.llm.max_positions": 61},
            "max_seq_len 62 is more than the LLM's 61 learned positions",
        ),
        ("stage=llm", {"model.llm.num_heads": 3}, "hidden_size 8 does not divide into num_heads 3"),
        ("stage=llm", {"model.llm.num_kv_heads": 3}, "num_heads 2 is not a multiple of num_kv_h"),
        ("stage=llm", {"model.llm.head_dim": 3}, "3 of a head's 3 features are no pairs"),
        ("stage=llm", {"model.llm.activation": "swish"}, "unknown activation 'swish'"),
        ("stage=llm", {"model.llm.norm": "batch"}, "unknown norm 'batch'; choose from: rms, layer"),
        ("stage=llm", {"dtype": "int32"}, "unknown dtype 'int32'"),
        (PRETRAIN, {"attention": "splash"}, "attention=splash is a kernel of TPUs, .* is a CPU"),
        (PRETRAIN, {"attention": "cudnn"}, "attention=cudnn is a kernel of GPUs, .* is a CPU"),
        (PRETRAIN, {"model.vision.feature_layer": 4}, "feature_layer=4 .* from -2 to 1"),
        (PRETRAIN, {"model.vision.patch_size": 64}, "32 pixels hold no patch of 64"),
    ],
)
def test_runs_that_cannot_be_right_are_refused(arg, settings, message):
    own = TEXT_ONLY if arg == "stage=llm" else TINY
    with pytest.raises(UserError, match=message):
        start(arg, own | settings)


def test_data_without_a_source_is_refused():
    config = config_of("stage=llm", TEXT_ONLY)
    with pytest.raises(UserError, match="config key data needs a name of a source"):
        check_start(dataclasses.replace(config, data={"files": "mine.json"}), 1)


def test_fields_of_a_part_have_types_and_some_have_no_default():
    config = config_of("stage=llm", TEXT_ONLY)
    for llm, message in (
        ({"hidden_size": "8"}, "hidden_size of the LLM must be int, got '8'"),
        ({"hidden_size": 8}, "LLM needs intermediate_size, num_layers, num_heads, vocab_size"),
        ("", "the run has no LLM: give config key model.llm, or init.llm"),
    ):
        with pytest.raises(UserError, match=message):
            model_config(dataclasses.replace(config, model=PartsConfig(llm=llm)))


@pytest.mark.parametrize(
    ("arg", "settings", "message"),
    [
        ("stage=vit", {"data.task": "instruct"}, "labels of patches, but .*digits gives conversat"),
        (PRETRAIN, {"data.task": "patches"}, "digits gives labels of patches"),
        ("stage=vit", {"model.classes": "(10, 4, 2)"}, r"is \[10, 4, 2\], but .* has 2 labels"),
        ("stage=vit", {"model.classes": "(2, 4)"}, r"is \[2, 4\], but .* up to \["),
    ],
)
def test_samples_that_no_objective_takes_are_refused(arg, settings, message):
    config = config_of(arg, TINY | settings)
    with pytest.raises(UserError, match=message):
        check_samples(config, make_source(**config.data))


def test_all_labels_have_a_class(tmp_path):
    """The first sample alone would pass."""
    labels = [{"image": "a.png", "label": name} for name in "abc"]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    data = {"name": "labels", "files": str(tmp_path / "labels.json"), "image_root": str(tmp_path)}
    config = config_of("stage=vit", TINY | {"model.classes": "(2,)"})
    with pytest.raises(UserError, match=r"model.classes is \[2\], but .* are 3: a, b, c"):
        check_samples(dataclasses.replace(config, data=data), make_source(**data))


def test_commands_look_at_a_run_that_has_not_begun(tmp_path, monkeypatch, capsys):
    """Paths with a leading dot start from the directory that the run will have."""
    words = tmp_path / "runs" / "words"
    build_tokenizer().save_pretrained(words)
    command = ["data", "check", "--config", "digits:stage=llm", "--config.data.size=2"]
    command += ["--config.tokenizer=../words", "--workers", "1"]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "neither 'digits' nor a folder" in capsys.readouterr().err
    assert main([*command, "--workdir", "runs/llm"]) == 0
    assert "2 samples, 2 of them text only" in capsys.readouterr().out


# ---- Warned of.

UNSAID = {f"init.{part}": "" for part in ("llm", "vision", "connector")}
BOTH = "('vision', 'connector')"


@pytest.mark.parametrize(
    ("arg", "settings", "told"),
    [
        (PRETRAIN, {}, []),  # it says `random`
        (
            PRETRAIN,
            UNSAID,
            [
                "the LLM has random weights and does not train: give init.llm=RUN or FOLDER, train "
                "it (also_train=llm), or say init.llm=random if it is meant",
                "the vision encoder has random weights and does not train",
            ],
        ),
        (PRETRAIN, UNSAID | {"tuning": "full", "also_train": BOTH}, []),
        (
            PRETRAIN,
            {"also_train": BOTH, "model.vision.feature_layer": -2, "model.vision.num_layers": 3},
            ["feature_layer=-2 leaves the last 1 of 3 blocks"],
        ),
        (
            PRETRAIN,
            {"model.llm.max_positions": 20},
            ["rows of max_seq_len 25 tokens are longer than the 20 positions"],
        ),
        (
            PRETRAIN,
            {"tuning": "mores:rank=1,positions=image", "images_per_row": 0},
            ["mores edits tokens of images only (positions=image); this run has none"],
        ),
        (PRETRAIN, {"validation.share": 0.5}, ["nothing measures them: give validation.every"]),
    ],
)
def test_runs_that_are_probably_not_meant_are_told(arg, settings, told, caplog):
    with caplog.at_level(logging.WARNING):
        start(arg, TINY | settings)
    assert len(caplog.messages) == len(told)
    for message, wanted in zip(caplog.messages, told, strict=True):
        assert wanted in message


def test_tokenizers_without_an_end_or_an_image_are_told(tmp_path, caplog):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    start("stage=llm", TEXT_ONLY, tokenizer=str(tmp_path))
    end, image = caplog.messages
    assert "no end token (eos_token)" in end
    assert "vocab_size 37 has no row for an <image> token" in image


def test_a_plan_checks_a_run_too():
    with pytest.raises(UserError, match="an image makes 16 visual tokens"):
        plan(config_of(PRETRAIN, TINY | {"max_seq_len": 10}), "v5e-8")


# ---- What sources say.


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A text run, and a connector that was trained on it with template plain."""
    root = tmp_path_factory.mktemp("runs")
    short = {"steps": 1, "log_every": 1}
    train(config_of("stage=llm", TEXT_ONLY | short | {"also_train": "llm.norm"}), root / "llm")
    settings = TINY | short | {"init.llm": "../llm", "model.connector": "linear"}
    config = config_of(PRETRAIN, settings)
    parts = dataclasses.replace(config.model, llm="")
    train(dataclasses.replace(config, model=parts, tokenizer=""), root / "pretrain")
    return root


def test_a_run_takes_architecture_and_tokenizer_from_its_sources(runs):
    saved = json.loads((runs / "pretrain" / "config.json").read_text())
    earlier = json.loads((runs / "llm" / "config.json").read_text())
    assert saved["model"]["llm"] == earlier["model"]["llm"]
    assert saved["tokenizer"] == "digits"
    assert saved["init"]["tuning"] == "random"
    config = RunConfig(init=InitConfig(*["../pretrain"] * 3))
    found = with_sources(config, runs / "next")
    assert {key: getattr(found.model, key) for key in ("llm", "vision", "connector")} == {
        key: saved["model"][key] for key in ("llm", "vision", "connector")
    }
    check_sources(found, runs / "next")
    # Some fields change the source's, as far as the weights allow.
    some = dataclasses.replace(config, model=PartsConfig(llm={"max_positions": 9}))
    assert model_config(with_sources(some, runs / "next")).llm.max_positions == 9
    check_sources(with_sources(some, runs / "next"), runs / "next")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.llm.num_heads": 4},
            "init.llm: .*llm has another LLM: its num_heads is 2, the mod",
        ),
        ({"model.llm.activation": "gelu"}, "its activation is silu, the model's gelu"),
        ({"model.llm.rope_theta": 7.0}, "its rope_theta is 100.0, the model's 7.0"),
    ],
)
def test_other_architectures_are_refused_before_anything_is_read(runs, settings, message):
    with pytest.raises(UserError, match=message):
        train(
            config_of(PRETRAIN, TINY | {"init.llm": "../llm", "data.size": -1} | settings),
            runs / "refused",
        )
    assert not (runs / "refused").exists()


def test_a_tokenizer_whose_ids_mean_other_words_is_refused(runs, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    one, two = (f'"{word}": {i}' for word, i in (("two", 25), ("four", 27)))
    assert one in text
    text = text.replace(one, '"two": 27').replace(two, '"four": 25')
    config = dataclasses.replace(
        config_of(PRETRAIN, TINY | {"init.llm": "../llm"}), tokenizer=str(tmp_path)
    )
    check_same_tokenizer(config, runs / "next", tokenizer)
    (tmp_path / "tokenizer.json").write_text(text)
    shuffled = build_processor(config).tokenizer
    with pytest.raises(
        UserError, match=r"2 tokens differ, .*'four' here and 'two' there \(id 25\)"
    ):
        check_same_tokenizer(config, runs / "next", shuffled)


def test_folders_of_hugging_face_say_what_they_are(tmp_path):
    model = tiny_model()
    folder = export_hf(model, tmp_path / "llava")
    build_tokenizer().save_pretrained(folder)
    found = with_sources(RunConfig(init=InitConfig(*[str(folder)] * 3)), tmp_path)
    assert model_config(found).llm.num_kv_heads == model.config.llm.num_kv_heads
    assert model_config(found).visual_tokens == model.config.visual_tokens
    assert found.model.connector == "mlp2x_gelu"
    assert found.tokenizer == str(folder)
    assert not isinstance(found.model.llm, str)
    other = dataclasses.replace(found.model, llm={**found.model.llm, "rope_theta": 5.0})
    with pytest.raises(UserError, match=r"llava has another LLM: its rope_theta is 10000\.0"):
        check_sources(dataclasses.replace(found, model=other), tmp_path)


# ---- Template plain.


def test_a_run_with_captions_is_asked_with_the_template_before(runs, tmp_path, caplog):
    model = load(runs / "pretrain")
    assert model.prompts.processor.template.keep_question
    [message] = caplog.messages
    assert (
        "with template plain, which drops every question; it is asked with template bare" in message
    )
    caplog.clear()
    assert not load(runs / "pretrain", template="plain").prompts.processor.template.keep_question
    assert not caplog.messages
    shutil.copytree(runs / "pretrain", tmp_path / "alone")
    file = tmp_path / "alone" / "config.json"
    file.write_text(file.read_text().replace("../llm", str(runs / "llm")))
    config = json.loads(file.read_text())
    config["template"] = "bare"
    file.write_text(json.dumps(config))
    load(tmp_path / "alone")
    assert not caplog.messages
