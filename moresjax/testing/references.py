"""Random models, adapters and prompts, read by `transformers` and `peft` and by this package.

A case is equal, or refused with a `UserError`, or it differs; a difference without a word is what
the command `benchmarks/same_as_references.py` looks for.
"""

# Models of transformers are modules, whose attributes no type checker knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedConfig
from transformers.initialization import no_init_weights

from moresjax.core.errors import UserError
from moresjax.inference.model import Model
from moresjax.models.mllm import MLLM
from moresjax.testing.random_adapters import RIGHT_ONLY, add_adapter
from moresjax.testing.random_models import IMAGE_ID, PAD, SIDE, Draws, random_model
from moresjax.weights.hf import load_pretrained
from moresjax.weights.peft import import_peft

# The largest difference of two logits beside the largest logit of the reference. Both sides round
# to 24 bits in another order of additions; tests of families allow the same.
TOLERANCE = 1e-4
# Rounding grows where a model divides by a small norm. There the reference itself, in fp32, is
# about as far from its result in fp64 as we are.
ROUNDING = 10.0
LENGTH = 14
Kind = Literal["equal", "refused", "void", "DIFFERENT", "crash"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      number: The number of the model, which repeats it with its adapters and prompts.
      kind: Equal, refused, different or crashed.
      what: Model and adapter in words.
      detail: The sentence of the refusal, the difference, or the exception.
    """

    number: int
    kind: Kind
    what: str
    detail: str = ""


def make_reference(config: PreTrainedConfig, rng: Draws) -> torch.nn.Module:
    """A model of `transformers` with random parameters, none of which is as it starts."""
    config._attn_implementation = "eager"
    is_llava = config.model_type == "llava"
    with no_init_weights():
        model = (
            LlavaForConditionalGeneration(config)
            if is_llava
            else AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        )
    model.tie_weights()
    draws = torch.Generator().manual_seed(rng.getrandbits(32))
    offset = "gemma" in str(getattr(config, "text_config", config).model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.2 if parameter.ndim > 1 else 0.3
            scale = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            own = "vision" not in name and offset  # Gemma adds one to its scales
            parameter.normal_(float(scale and not own), std, generator=draws)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
    return model.eval()


def make_prompt(
    config: PreTrainedConfig, mllm: MLLM, rng: Draws, *, may_pad_left: bool = True
) -> dict[str, np.ndarray]:
    """Two rows of unequal length with 0 to 2 images each, padded on either side."""
    visual_tokens = mllm.config.visual_tokens
    draws = np.random.default_rng(rng.getrandbits(32))
    is_llava = config.model_type == "llava"
    length = LENGTH
    left = may_pad_left and rng.random() < 0.5
    ids, mask = np.full((2, length), PAD, np.int64), np.zeros((2, length), np.int64)
    images = 0
    for number in range(2):
        row: list[int] = []
        if is_llava:
            for _ in range(rng.choice((0, 1, 1, 2))):
                if len(row) + visual_tokens + 3 > length:
                    break
                words = draws.integers(3, IMAGE_ID, rng.choice((0, 1, 2))).tolist()
                row += words + [IMAGE_ID] * visual_tokens
                images += 1
        rest = rng.randint(1, max(length - len(row), 1))
        row += draws.integers(3, IMAGE_ID, rest).tolist()
        where = slice(length - len(row), None) if left else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images:
        inputs["pixel_values"] = draws.standard_normal((images, 3, SIDE, SIDE)).astype(np.float32)
    return inputs


def reference_logits(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of `transformers` or `peft`, without those of virtual tokens."""
    dtype = next(model.parameters()).dtype
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
    with torch.no_grad():
        logits = model(**tensors).logits.double().numpy()
    return logits[:, -inputs["input_ids"].shape[1] :]


def distance(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference at tokens that are no padding, beside the largest logit."""
    real = mask.astype(bool)
    scale = max(float(np.abs(theirs[real]).max()), 1.0)
    return float(np.abs(ours - theirs)[real].max()) / scale


def check_model(
    number: int, folder: Path, seed: int = 0, *, few_sizes: bool = False, adapters: int = 2
) -> list[Outcome]:
    """Runs the cases of one random model: a prompt by itself, and prompts with adapters.

    Args:
      number: The number of the model.
      folder: An empty folder to write the model and the adapters to.
      seed: The seed of all models.
      few_sizes: Whether all models shall have the same sizes.
      adapters: The number of adapters to try.
    """
    rng = Draws(f"{seed} {number}", few_sizes)
    config = random_model(rng)
    text = getattr(config, "text_config", config)
    name = text.model_type
    if text is not config:
        name = f"llava of {name} and {config.vision_config.model_type}"
    model = make_reference(config, rng)
    model.save_pretrained(folder / "model")
    with _case(number, name, folder) as found:
        mllm = load_pretrained(folder / "model")
    if found:
        return found
    found += compare(number, name, model, mllm, make_prompt(config, mllm, rng), folder)
    for i in range(adapters):
        made = add_adapter(copy.deepcopy(model), rng)
        if made is None:
            continue
        adapted, what = made
        may_pad_left = not what.startswith(RIGHT_ONLY)
        inputs = make_prompt(config, mllm, rng, may_pad_left=may_pad_left)
        where = folder / f"adapter {i}"
        adapted.save_pretrained(where)
        ours = nnx.clone(mllm)
        with _case(number, f"{name} with {what}", folder) as refused:
            import_peft(where, ours)
        found += refused or compare(number, f"{name} with {what}", adapted, ours, inputs, folder)
    return found


@contextlib.contextmanager
def _case(number: int, what: str, folder: Path) -> Iterator[list[Outcome]]:
    """A list that takes the refusal or the crash of what is done with it, if there is one."""
    found: list[Outcome] = []
    try:
        yield found
    except UserError as error:
        found.append(Outcome(number, "refused", what, str(error).replace(f"{folder}/", "")))
    except Exception as error:  # any other is a finding
        found.append(Outcome(number, "crash", what, f"{type(error).__name__}: {error}"[:300]))


def compare(
    number: int,
    what: str,
    model: torch.nn.Module,
    mllm: MLLM,
    inputs: dict[str, np.ndarray],
    folder: Path,
) -> list[Outcome]:
    """The outcome of one prompt for a model of the reference and ours."""
    with _case(number, what, folder) as found:
        ours = np.asarray(Model(mllm, None).logits(**inputs, image_token_id=IMAGE_ID))
    if found:
        return found
    mask = inputs["attention_mask"]
    try:
        theirs = reference_logits(model, inputs)
    except Exception as error:  # the reference cannot use what it wrote
        return [Outcome(number, "void", what, f"{type(error).__name__}: {error}"[:300])]
    difference = distance(ours, theirs, mask)
    if difference <= TOLERANCE:
        return [Outcome(number, "equal", what)]
    exact = reference_logits(copy.deepcopy(model).double(), inputs)
    own = distance(theirs, exact, mask)
    if distance(ours, exact, mask) <= ROUNDING * own:
        return [Outcome(number, "equal", what, f"the reference is {own:.1e} from fp64")]
    return [Outcome(number, "DIFFERENT", what, f"logits differ by {difference:.1e} of the largest")]


def check_cases(
    cases: int, seed: int = 0, first: int = 0, *, few_sizes: bool = False
) -> Iterator[Outcome]:
    """Runs models until there were so many cases; JAX runs them operation by operation.

    A compiled program for each would take a second, and no two models have the same shapes.
    """
    done, number = 0, first
    with jax.disable_jit():
        while done < cases:
            with tempfile.TemporaryDirectory() as folder:
                for outcome in check_model(number, Path(folder), seed, few_sizes=few_sizes):
                    if done < cases:
                        yield outcome
                    done += 1
            number += 1
