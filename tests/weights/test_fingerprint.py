"""Fingerprints: whatever changes what a model answers gives another one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.parameter_names import path_name
from moresjax.data.digits import build_tokenizer
from moresjax.data.images import ImageProcessor
from moresjax.data.processor import GenerationDefaults, Processor
from moresjax.data.processor_facts import processor_facts
from moresjax.data.region_providers import RegionProvider
from moresjax.data.templates import Template
from moresjax.evaluation.run import evaluate
from moresjax.models.mllm import MLLM
from moresjax.testing.models import talking_model, tiny_config, tiny_model
from moresjax.tuning.multi_adapter import stack_adapters
from moresjax.weights.fingerprint import exact_fingerprint, fingerprint

# Learned parameters, given vectors, shared arrays and layer masks.
SPEC = "steer:positions=generated/vera:rank=2/mores:rank=1,layers=0"


def changed(value: np.ndarray) -> np.ndarray:
    return ~value if value.dtype == bool else value + 1


def fingerprints_of_changes(mllm: MLLM) -> dict[str, tuple[str, str]]:
    """Both fingerprints after a change of one variable, by its name."""
    found = {"": (fingerprint(mllm), exact_fingerprint(mllm))}
    for path, variable in nnx.iter_graph(mllm):
        if isinstance(variable, nnx.Variable):
            value = np.asarray(variable.get_value())
            variable.set_value(jnp.asarray(changed(value)))
            found[path_name(path)] = fingerprint(mllm), exact_fingerprint(mllm)
            variable.set_value(jnp.asarray(value))
    assert (fingerprint(mllm), exact_fingerprint(mllm)) == found[""]
    return found


def test_every_variable_of_a_tuned_model_has_a_part_in_both_fingerprints():
    found = fingerprints_of_changes(tiny_model(SPEC))
    kinds = {name.split(".")[1] for name in found if name.startswith("tuning.")}
    assert kinds == {"params", "layer_masks", "shared"}
    for each in zip(*found.values(), strict=True):
        assert len(set(each)) == len(found)


def test_adapters_that_are_held_at_once_are_told_apart():
    spec = "steer:positions=generated"
    tunings = [tiny_model(f"{spec},layers={layers}").tuning for layers in ("all", "1", "all")]
    for number, tuning in enumerate(tunings):
        tuning.params["steer"]["llm.block.out"]["vector"][...] += number
    found = []
    for names in ({"a": 0, "b": 1}, {"a": 0, "b": 2}, {"a": 0, "c": 1}, {"b": 1, "a": 0}):
        model = tiny_model()
        model.tuning = stack_adapters({name: tunings[i] for name, i in names.items()})
        found.append(fingerprint(model))
    assert len(set(found)) == len(found)


def test_an_exact_fingerprint_knows_single_values_and_precisions():
    model = tiny_model("mores:rank=1", hidden_size=256, num_heads=4)
    names = [(fingerprint(model), exact_fingerprint(model))]
    rotation = model.tuning.params["mores"]["llm.block.out"]["rotate"]
    value = rotation[...]
    rotation[...] = value.at[1, 3, 0].add(1e-6)  # less than bf16 holds, at one place of 768
    names.append((fingerprint(model), exact_fingerprint(model)))
    rotation[...] = value
    kernel = model.llm.blocks.attn.q.kernel
    kernel[...] = kernel[...].astype(jnp.bfloat16)
    names.append((fingerprint(model), exact_fingerprint(model)))
    assert len({name for name, _ in names}) == 1  # as version 0.1 had it
    assert len({name for _, name in names}) == 3


def test_the_dtype_and_the_selector_have_a_part():
    llm = tiny_config().llm
    found = {fingerprint(tiny_model(f"mores:positions={p}")) for p in ("image", "image:f4", "all")}
    for dtype in ("float32", "bfloat16"):
        assert dtype == llm.dtype or fingerprint(tiny_model(dtype=dtype)) not in found
        found.add(fingerprint(tiny_model(dtype=dtype)))
    assert len(found) == 5


def test_every_setting_of_a_processor_is_in_its_hash():
    image = ImageProcessor(12)
    others = {
        "size": 16,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.1, 0.2, 0.3),
        "aspect": "pad",
        "reference": Saved(),
    }
    template, texts = Template(), {"end": "</s>", "next_user": "Q", "keep_question": False}
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    changes = [{"image": dataclasses.replace(image, **{n: x})} for n, x in others.items()]
    for field in dataclasses.fields(Template):
        value = texts.get(field.name, "other")
        changes.append({"template": dataclasses.replace(template, **{field.name: value})})
    changes += [{}, {"tokenizer": tokenizer}, {"visual_tokens": 4}, {"image": None}]
    generation = {"eos_ids": (5,), "repetition_penalty": 1.2}
    changes.append({"split_special_tokens": False})
    for named in ({}, {"a": []}, {"b": []}):
        provider = RegionProvider("file" if named else "all", named=named, text="some")
        changes.append({"regions": provider, "centres": ((0.5, 0.5),)})
    changes += [{"generation": GenerationDefaults(**{n: x})} for n, x in generation.items()]
    # A new setting needs a value above, and a part in the hash.
    assert {field.name for field in dataclasses.fields(ImageProcessor)} == {*others}
    assert {field.name for field in dataclasses.fields(GenerationDefaults)} == {*generation}
    known = {"tokenizer", "template", "image", "visual_tokens", "generation"}
    # The size of the vocabulary refuses tokens and changes none.
    known |= {"split_special_tokens", "vocab_size", "regions"}
    # The model's tuning and connector decide about these, and are in its own fingerprint.
    known |= {"marks", "centres"}
    assert {field.name for field in dataclasses.fields(Processor)} == known
    processor = Processor(build_tokenizer(), template, image, 9)
    found = {processor_facts(dataclasses.replace(processor, **each))["hash"] for each in changes}
    assert len(found) == len(changes)


class Saved:
    """Stands for an image processor of `transformers`."""

    def to_dict(self) -> dict:
        return {"do_resize": False}

    def __call__(self, **images) -> dict:
        raise NotImplementedError("no image is opened here")


@pytest.mark.parametrize("leaf", ["vector", "alpha"])
def test_an_evaluation_does_not_go_on_with_another_steering_vector(leaf, tmp_path):
    model = talking_model("steer:positions=generated")
    options = {"limit": 1, "batch_size": 8, "out": tmp_path}
    first = evaluate(model, ["digits"], **options)
    assert evaluate(model, ["digits"], **options).predictions == first.predictions
    constant = model.mllm.tuning.params["steer"]["llm.block.out"][leaf]
    constant[...] = constant[...] + 0.001
    with pytest.raises(UserError, match="holds predictions of another model"):
        evaluate(model, ["digits"], **options)


def test_an_evaluation_does_not_go_on_at_another_step_of_the_run(tmp_path):
    model = talking_model("mores:rank=1")
    options = {"limit": 1, "batch_size": 8, "out": tmp_path}
    evaluate(model, ["digits"], **options)
    rotation = model.mllm.tuning.params["mores"]["llm.block.out"]["rotate"]
    rotation[...] = rotation[...] * (1 + 1e-6)
    with pytest.raises(UserError, match="of this model with other weights, such as"):
        evaluate(model, ["digits"], **options)
