"""A run's length in samples or epochs, and the recipes' numbers of samples."""

import dataclasses
import math

import numpy as np
import pytest

from moresjax.core.errors import UserError
from moresjax.core.layout import TokenLayout, count_documents
from moresjax.data import pipeline
from moresjax.data.digits import build_tokenizer
from moresjax.data.pipeline import bucket_plan, make_iterator
from moresjax.data.processor import Processor
from moresjax.data.rows import PADDING_SAMPLE
from moresjax.data.sources import make_source
from moresjax.data.templates import get_template
from moresjax.runs.budget import check_budget, with_steps
from moresjax.runs.config import load_config
from moresjax.runs.run_config import RunConfig

PRETRAIN, MIX, VISION_FLAN, SCIENCEQA = 558_128, 665_298, 191_105, 6_218


@dataclasses.dataclass
class Lengths:
    """The lengths of so many samples as those of the 665k mix are spread, without the samples."""

    count: int
    images: float = 0.94

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raise AssertionError("no sample is read")

    @property
    def sizes(self):
        rng = np.random.default_rng(0)
        words = rng.lognormal(math.log(110), 0.7, self.count).astype(int)
        return np.stack([words, rng.random(self.count) < self.images], axis=1).astype(int)


def shown(arguments, source):
    """Samples per step, the last step of an epoch aside, and samples in all; by the run's plan."""
    config = load_config(arguments)
    steps = with_steps(config, source, lambda: None).steps
    if config.batching == "pad":
        return config.batch_size, steps * config.batch_size
    assert config.batching == "bucket"
    plan = bucket_plan(source, config.batch_size, config.pack_window, config.seed)
    counts = [sum(x != PADDING_SAMPLE for x in plan(step)) for step in range(steps)]
    return int(np.median(counts)), sum(counts)


@pytest.mark.parametrize("size", ["3b", "7b", "13b"])
def test_llava_steering_shows_the_papers_samples(size):
    each, total = shown(f"llava_steering:size={size},stage=pretrain", Lengths(PRETRAIN))
    assert each == 256
    assert abs(total - PRETRAIN) < 256
    each, total = shown(f"llava_steering:size={size},stage=finetune", Lengths(MIX))
    assert (each, total) == (128, MIX)


@pytest.mark.parametrize("size", ["3b", "7b", "13b"])
@pytest.mark.parametrize("samples", [1000, 5000, 10_000])
def test_a_task_is_shown_ten_times(size, samples):
    arguments = f"llava_steering:size={size},stage=task,task=scienceqa,samples={samples}"
    count = min(samples, SCIENCEQA)
    assert shown(arguments, Lengths(count, images=1)) == (128, 10 * count)


@pytest.mark.parametrize("tuning", ["mrt-paper", "lora"])
def test_mrt_shows_its_samples_three_times(tuning):
    each, total = shown(f"mrt:tuning={tuning}", Lengths(VISION_FLAN))
    assert each == 128
    assert abs(total - 3 * VISION_FLAN) < 128


@pytest.mark.parametrize("measured", [16, 2])
def test_packed_rows_show_as_many_samples_as_are_asked_for(monkeypatch, measured):
    monkeypatch.setattr(pipeline, "MEASURED_WINDOWS", measured)
    source = make_source("digits", task="text", size=600)
    processor = Processor(build_tokenizer(), get_template("bare"))
    options = {"batch_size": 2, "max_seq_len": 288, "batching": "pack", "pack_window": 50}
    config = RunConfig(**options, images_per_row=0, epochs=1.5)
    steps = with_steps(config, source, lambda: processor).steps
    batches = make_iterator(source, processor, **options)
    found = 0
    for batch in (next(batches) for _ in range(steps)):
        layout = TokenLayout.stacked(batch)
        found += int(count_documents(layout))
    assert found == pytest.approx(1.5 * 600, rel=0.02)
    assert found > 3 * 2 * steps  # several samples share a row


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "none of them"), ({"steps": 3, "epochs": 1.0}, "steps=3 and epochs=1.0")],
)
def test_a_length_is_said_once(given, found):
    with pytest.raises(UserError, match=f"give one of steps, samples, epochs.* got {found}"):
        check_budget(RunConfig(**given))


def test_an_override_takes_the_place_of_the_files_length():
    config = load_config("llava_steering", ["samples=500"])
    assert (config.steps, config.samples, config.epochs) == (0, 500, 0)
    config = load_config("digits:stage=llm", ["epochs=2"])
    assert (config.steps, config.samples, config.epochs) == (0, 0, 2.0)
    with pytest.raises(UserError, match=r"give one of .* got steps and epochs"):
        load_config("digits", ["epochs=2", "steps=3"])


def test_a_length_in_steps_stays_as_it_is():
    config = RunConfig(steps=7)
    assert with_steps(config, Lengths(10), lambda: None) is config
