"""What is measured during a run: speed, validation, attention. None changes the run."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
from run_helpers import MEASURED, RATES, TINY, assert_equal_weights, config_of, logged, rewind

from moresjax.analysis.attention import AttentionProbe, summarize
from moresjax.core.errors import UserError
from moresjax.core.layout import TokenKind
from moresjax.data.digits import DigitsSource
from moresjax.data.pipeline import one_epoch, to_device_batch
from moresjax.data.subset import train_val_split
from moresjax.generation.engine import Engine
from moresjax.hardware.chips import CHIPS, GIB
from moresjax.models.flops import train_flops
from moresjax.models.mllm import MLLM
from moresjax.runs.architecture import model_config
from moresjax.runs.data import build_iterator, build_sources
from moresjax.runs.processor import build_processor
from moresjax.runs.workdir import load_workdir
from moresjax.sharding.mesh import make_mesh
from moresjax.training import throughput
from moresjax.training.evaluators import Evaluators
from moresjax.training.loop import train
from moresjax.training.objectives import next_token
from moresjax.training.step import split_model
from moresjax.training.throughput import ThroughputMeter

TUNED = "stage=finetune,tuning=mores:rank=1,positions=image"


def monitored(**changes):
    """A run with images that is validated on 11 of its samples and watched."""
    settings = TINY | {"steps": 4, "log_every": 2, "checkpoint.every": 2, "data.size": 44}
    settings |= {"validation.share": 0.25, "validation.every": 3, "lmar_every": 3}
    return config_of(TUNED, settings | changes)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "watched"
    return workdir, train(monitored(), workdir)


# ---- Speed.


def test_logged_steps_say_how_fast_they_were_and_what_they_took(watched):
    lines = [line for line in logged(watched[0]) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert set(line) >= RATES
        assert "mfu_4n6n" not in line  # nobody knows the peak of this CPU
        assert 0.01 < line["host_memory_gib"] < 1024
    # Rates of an interval of steps of one shape: all are counts over the same seconds.
    first, second = (line["flops_per_second"] * line["step_seconds"] for line in lines)
    assert first == pytest.approx(second)
    # The first interval has one step, as the first one compiles.
    ratio = lines[0]["label_tokens_per_second"] * lines[0]["step_seconds"]
    assert ratio == pytest.approx(lines[0]["labels"])
    ratio = lines[0]["tokens_per_second"] * lines[0]["step_seconds"]
    assert ratio == pytest.approx(lines[0]["tokens"])


@pytest.fixture
def parts():
    """A configuration and its model as shapes, in two parts."""
    config = monitored()
    model = MLLM(model_config(config), config.tuning)
    return config, *split_model(model, config.also_train)[1:]


def test_mfu_is_model_flops_over_seconds_and_the_peak_of_all_chips(parts, monkeypatch):
    config, trainable, frozen = parts
    clock = types.SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(throughput, "time", clock)
    meter = ThroughputMeter(config, trainable, frozen, "TPU v5 lite")
    assert not RATES & set(meter.read())
    batch = next_batch(config)
    flops = meter.flops(batch)
    sizes = {"rows": 8, "length": 64, "images": 1}
    assert flops == train_flops(model_config(config), trainable, frozen, **sizes).model
    text = meter.flops(dataclasses.replace(batch, pixels=None))
    assert 0 < text < flops

    meter.start()
    for _ in range(4):
        clock.now += 0.25
        meter.add(100.0, 10.0, flops)
    with meter.paused():
        clock.now += 1000.0
    found = meter.read()
    assert found["step_seconds"] == 0.25
    assert found["tokens_per_second"] == 400
    assert found["label_tokens_per_second"] == 40
    assert found["flops_per_second"] == 4 * flops
    assert found["mfu_4n6n"] == pytest.approx(4 * flops / (8 * CHIPS["v5e"].flops))
    assert not RATES & set(meter.read())  # a new interval, without a step


def test_memory_is_that_of_the_fullest_device_where_it_is_counted(monkeypatch):
    def device(peak):
        return types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(GIB), device(3 * GIB)])
    assert throughput.peak_memory() == {"memory_gib": 3.0}


# ---- Held-out samples.


def test_held_out_samples_never_train():
    source = DigitsSource("instruct", size=50)
    training, validation = train_val_split(source, 0.1, seed=3)
    names = [
        [part[i]["id"] if isinstance(part[i], dict) else part[i].id for i in range(len(part))]
        for part in (training, validation)
    ]
    assert len(names[1]) == 5
    assert sorted(names[0] + names[1]) == sorted(source[i].id for i in range(50))
    again = train_val_split(source, 0.1, seed=3)[1]
    np.testing.assert_array_equal(again.indices, validation.indices)
    assert set(train_val_split(source, 0.1, seed=4)[1].indices) != set(validation.indices)


def test_weights_of_files_hold_for_what_is_left_of_them():
    @dataclasses.dataclass(frozen=True)
    class Mixed(DigitsSource):
        mixture_weights = ((slice(0, 20), 3.0), (slice(20, 50), 1.0))
        sizes = np.arange(100).reshape(50, 2)

    training, validation = train_val_split(Mixed("instruct", size=50), 0.5, seed=0)
    for part in (training, validation):
        (first, heavy), (second, light) = part.mixture_weights
        assert (heavy, light) == (3.0, 1.0)
        assert (part.indices[first] < 20).all()
        assert (part.indices[second] >= 20).all()
        assert first.stop == second.start
        np.testing.assert_array_equal(part.sizes, Mixed.sizes[part.indices])
    assert not hasattr(train_val_split(DigitsSource("instruct", size=50), 0.5, 0)[0], "sizes")


# ---- Validation.


def next_batch(config):
    processor = build_processor(config)
    stacked = next(build_iterator(config, processor))
    stacked.pop("id")
    return to_device_batch(stacked, processor)


def test_validation_is_the_mean_over_all_labels_of_the_held_out_samples(watched):
    workdir, result = watched
    found = [line for line in logged(workdir) if "validation_loss" in line]
    assert [line["step"] for line in found] == [3, 4]  # every third step and the last
    assert result.metrics["validation_loss"] == found[-1]["validation_loss"]

    model, processor = load_workdir(workdir)
    _, held_out = build_sources(monitored())
    rows = [processor.row(held_out[i]) for i in range(len(held_out))]
    assert len(rows) == 11  # not a multiple of the 8 rows of a batch
    sums = np.zeros(3)
    objective = jax.jit(lambda batch: next_token(model, batch))
    for row in rows:  # each sample alone
        loss = objective(processor.batch([processor.pad(row, 64, 1)]))
        sums += [float(loss.total), float(loss.correct), float(loss.weight)]
    assert found[-1]["validation_loss"] == pytest.approx(sums[0] / sums[2], abs=1e-5)
    assert found[-1]["validation_accuracy"] == pytest.approx(sums[1] / sums[2])


def test_a_watched_run_goes_on_to_the_same_weights_and_numbers(watched, tmp_path):
    workdir = shutil.copytree(watched[0], tmp_path / "run")
    rewind(workdir, 2)
    train(monitored(), workdir)
    assert_equal_weights(workdir, watched[0])
    for line, wanted in zip(logged(workdir), logged(watched[0]), strict=True):
        assert set(line) == set(wanted)
        same = set(line) - MEASURED
        assert {k: line[k] for k in same} == {k: wanted[k] for k in same}


def test_watching_does_not_change_a_run(watched, tmp_path):
    train(monitored(**{"validation.every": 0, "lmar_every": 0}), tmp_path / "run")
    assert_equal_weights(tmp_path / "run", watched[0])
    assert all("loss" in line for line in logged(tmp_path / "run"))


def test_a_source_of_its_own_is_validated_on_up_to_a_number_of_batches():
    config = monitored(**{"validation.share": 0.0})
    data = {"name": "digits", "task": "instruct", "split": "val", "size": 30}
    validation = dataclasses.replace(config.validation, data=data)
    config = dataclasses.replace(config, validation=validation)
    training, validation = build_sources(config)
    assert (training.split, validation.split) == ("train", "val")
    processor = build_processor(config)

    def shown(batches):
        options = {"batch_size": 8, "max_seq_len": 64, "images_per_row": 1, "max_batches": batches}
        return [batch["id"].tolist() for batch in one_epoch(validation, processor, **options)]

    assert shown(2) == shown(0)[:2]
    names = [name for batch in shown(0) for name in batch]
    assert sorted(names) == sorted(["", "", *(validation[i].id for i in range(30))])


# ---- Attention to the image.


def test_lmar_is_what_the_analysis_of_generated_answers_says(watched):
    """With the model's own greedy answers as the data's, both read the same tokens."""
    workdir, _ = watched
    config = monitored()
    mllm, processor = load_workdir(workdir)
    _, held_out = build_sources(config)

    def one_turn(i, **answer):
        turn = dataclasses.replace(held_out[i].turns[0], **answer)
        return dataclasses.replace(held_out[i], turns=(turn,), independent=False)

    prompts = []
    for i in range(len(held_out)):
        row = processor.row(one_turn(i))
        end = int(np.argmax(row.kind == TokenKind.ANSWER))
        prompts.append(row[:end])
    length, new = max(map(len, prompts)), 3
    engine = Engine(mllm, eos_ids=(-1,), probes=(AttentionProbe(),))
    batch = processor.batch([processor.pad(p, length, 1) for p in prompts])
    generation = engine.generate(batch, new)
    stats = {k: np.asarray(x) for k, x in generation.stats["attention"].items()}
    has_image = np.ones(len(prompts), bool)
    counts = np.asarray(generation.length)
    wanted = summarize(stats["mass"], stats["score"], counts, has_image).lmar_of_means["text"]

    words = {id: word for word, id in processor.tokenizer.get_vocab().items()}

    @dataclasses.dataclass(frozen=True)
    class Answered:
        def __len__(self):
            return len(prompts)

        def __getitem__(self, i):
            text = " ".join(words[int(t)] for t in np.asarray(generation.tokens)[i])
            return one_turn(i, answer=text)

    graphdef, trainable, frozen = split_model(mllm, config.also_train)
    # The generated answers have no end, and may have control tokens.
    silent = dataclasses.replace(processor.without_end, split_special_tokens=False)
    evaluators = Evaluators(config, silent, make_mesh(), held_out, Answered())
    found = evaluators.measure(6, graphdef, trainable, frozen)
    layers = [found[f"lmar/{layer:02d}"] for layer in range(len(wanted))]
    np.testing.assert_allclose(layers, wanted, rtol=1e-4)
    assert found["lmar"] == pytest.approx(np.mean(wanted), rel=1e-4)


def test_lmar_is_logged_per_layer(watched):
    found = [line for line in logged(watched[0]) if "lmar" in line]
    assert [line["step"] for line in found] == [3, 4]
    assert {key for key in found[0] if key.startswith("lmar")} == {"lmar", "lmar/00"}


# ---- Settings that cannot be.


@pytest.mark.parametrize(
    ("arg", "settings", "message"),
    [
        (TUNED, {"validation.every": 2}, "nothing to validate on"),
        (TUNED, {"validation.every": -1}, r"validation\.every must be at least 0, got -1"),
        (TUNED, {"lmar_every": -2}, "lmar_every must be at least 0, got -2"),
        (TUNED, {"validation.share": 1.0}, r"validation\.share must be .* got 1\.0"),
        ("stage=llm", {"validation.share": 0.001, "data.size": 40}, "of 40 samples is 0"),
        (TUNED, {"validation.share": 0.1, "validation.data.name": "digits"}, "give one"),
        ("stage=llm", {"lmar_every": 2}, "attention to images; this run has none"),
        (
            "stage=vit",
            {"validation.share": 0.1, "validation.every": 2},
            "a language model, not objective patch_classes",
        ),
    ],
)
def test_evaluators_that_cannot_work_are_refused(arg, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(config_of(arg, TINY | settings if "vit" in arg else settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
