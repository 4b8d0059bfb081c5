"""Random models, adapters and prompts, read by `transformers` and `peft` and by this package.

A case is equal in logits and greedy tokens, or refused with a `UserError`, or it differs; a
difference without a word is what the command `benchmarks/same_as_references.py` looks for.
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
from moresjax.generation.engine import Engine
from moresjax.generation.hf_inputs import hf_batch
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
Inputs = dict[str, np.ndarray]
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


def make_prompts(
    config: PreTrainedConfig, mllm: MLLM, rng: Draws, count: int, *, may_pad_left: bool = True
) -> Inputs:
    """Rows of unequal length with 0 to 2 images each, all padded on the same side."""
    visual_tokens = mllm.config.visual_tokens
    draws = np.random.default_rng(rng.getrandbits(32))
    is_llava = config.model_type == "llava"
    length = LENGTH
    left = may_pad_left and rng.random() < 0.5
    ids, mask = np.full((count, length), PAD, np.int64), np.zeros((count, length), np.int64)
    images = 0
    for number in range(count):
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


def reference_logits(model: torch.nn.Module, inputs: Inputs) -> np.ndarray:
    """Logits of `transformers` or `peft`, without those of virtual tokens."""
    with torch.no_grad():
        logits = model(**_tensors(model, inputs)).logits.double().numpy()
    return logits[:, -inputs["input_ids"].shape[1] :]


def reference_tokens(
    model: torch.nn.Module, inputs: Inputs, new: int, *, may_pad_left: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens `[B, N]` of `transformers` or `peft`, and the logits that chose them.

    Args:
      model: The model.
      inputs: The prompts, padded on either side.
      new: N.
      may_pad_left: Whether the model pads rows on the left; otherwise they go one by one.
    """
    if not may_pad_left and len(inputs["input_ids"]) > 1:
        rows = [reference_tokens(model, each, new) for each in _one_by_one(inputs)]
        return np.concatenate([ids for ids, _ in rows]), np.concatenate([x for _, x in rows])
    inputs = {**inputs, **_padded_left(inputs)}
    with torch.no_grad():
        out = model.generate(
            **_tensors(model, inputs),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[:, -new:].numpy(), torch.stack(out.logits, 1).double().numpy()


def recomputed_tokens(
    model: torch.nn.Module, inputs: Inputs, new: int
) -> tuple[np.ndarray, np.ndarray]:
    """`reference_tokens` of one row without padding, by forward passes over all of it.

    Beside virtual tokens `generate` of `peft` contradicts its own forward pass. There are fewer
    tokens after one that stands for an image, which a prompt cannot have as a word.
    """
    steps: list[np.ndarray] = []
    for _ in range(new):
        steps.append(reference_logits(model, inputs)[:, -1:])
        token = steps[-1].argmax(-1)
        if token == IMAGE_ID:
            break
        ids = np.concatenate([inputs["input_ids"], token], 1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = np.concatenate(steps, 1)
    return logits.argmax(-1), logits


def _padded_left(inputs: Inputs) -> Inputs:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    order = np.argsort(mask, axis=1, kind="stable")
    return {
        "input_ids": np.take_along_axis(ids, order, 1),
        "attention_mask": np.take_along_axis(mask, order, 1),
    }


def _tensors(model: torch.nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
    return tensors


def _one_by_one(inputs: Inputs) -> Iterator[Inputs]:
    """Every row without padding, with its own images."""
    mask, pixels = inputs["attention_mask"] > 0, inputs.get("pixel_values")
    counts = ((inputs["input_ids"] == IMAGE_ID) & mask).sum(1)
    per_image = 1 if pixels is None else int(counts.sum()) // len(pixels)
    ends = np.cumsum(counts) // per_image
    for row, real, count, end in zip(inputs["input_ids"], mask, counts, ends, strict=True):
        ids = row[None, real]
        own = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if pixels is not None and count:
            own["pixel_values"] = pixels[end - count // per_image : end]
        yield own


def distance(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The largest difference of each row at tokens that are no padding, beside the largest logit.

    Args:
      ours: Logits `[B, S, V]`.
      theirs: The same of the reference.
      mask: 0 for padding `[B, S]`.
    """
    real = mask.astype(bool)
    scale = max(float(np.abs(theirs[real]).max()), 1.0)
    return np.where(real[..., None], np.abs(ours - theirs), 0).max((1, 2)) / scale


def other_token(
    ours: np.ndarray, theirs: np.ndarray, logits: np.ndarray, allowed: float
) -> str | None:
    """What is wrong with a row's greedy tokens; None for the same up to a tie.

    Where two logits of the reference are nearer to each other than both sides' rounding, either may
    be chosen, and what follows says nothing.

    Args:
      ours: Our tokens `[N]`.
      theirs: The reference's tokens.
      logits: The reference's logits `[N, V]` that chose them.
      allowed: The rounding of a logit, beside the largest logit.
    """
    different = np.flatnonzero(ours != theirs)
    if not len(different):
        return None
    step = different[0]
    at = logits[step]
    margin = (at[theirs[step]] - at[ours[step]]) / max(float(np.abs(at).max()), 1.0)
    if margin <= 2 * allowed:
        return None
    return f"token {step} is {ours[step]}, not {theirs[step]}, which leads by {margin:.1e}"


def check_model(
    number: int,
    folder: Path,
    seed: int = 0,
    *,
    few_sizes: bool = False,
    adapters: int = 3,
    prompts: int = 6,
    new: int = 3,
) -> list[Outcome]:
    """Runs the cases of one random model: prompts for it alone, and for it with each adapter.

    Args:
      number: The number of the model.
      folder: An empty folder to write the model and the adapters to.
      seed: The seed of all models.
      few_sizes: Whether all models shall have the same sizes.
      adapters: The number of adapters to try.
      prompts: The number of prompts for the model and for each adapter.
      new: How many greedy tokens are compared.
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
    inputs = make_prompts(config, mllm, rng, prompts)
    found += compare(number, name, model, mllm, inputs, folder, new=new)
    for i in range(adapters):
        made = add_adapter(copy.deepcopy(model), rng)
        if made is None:
            continue
        adapted, what = made
        left = not what.startswith(RIGHT_ONLY)
        inputs = make_prompts(config, mllm, rng, prompts, may_pad_left=left)
        where = folder / f"adapter {i}"
        adapted.save_pretrained(where)
        ours, what = nnx.clone(mllm), f"{name} with {what}"
        with _case(number, what, folder) as refused:
            import_peft(where, ours)
        options = {"new": new, "may_pad_left": left}
        found += refused or compare(number, what, adapted, ours, inputs, folder, **options)
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
    inputs: Inputs,
    folder: Path,
    *,
    new: int,
    may_pad_left: bool = True,
) -> list[Outcome]:
    """The outcome of every prompt for a model of the reference and ours."""
    with _case(number, what, folder) as found:
        ours = np.asarray(Model(mllm, None).logits(**inputs, image_token_id=IMAGE_ID))
        batch = hf_batch(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs.get("pixel_values"),
            IMAGE_ID,
            mllm.config.visual_tokens,
        )
        engine = Engine(mllm, eos_ids=(), pad_id=PAD)
        our_tokens = np.asarray(engine.generate(batch, new).tokens)
    if found:
        return found
    try:
        theirs = reference_logits(model, inputs)
        tokens, logits = reference_tokens(model, inputs, new, may_pad_left=may_pad_left)
    except Exception as error:  # the reference cannot use what it wrote
        return [Outcome(number, "void", what, f"{type(error).__name__}: {error}"[:300])]
    mask, remark = inputs["attention_mask"], ""
    differences = distance(ours, theirs, mask)
    allowed = np.full(len(differences), TOLERANCE)
    if not (differences <= TOLERANCE).all():  # or one is no number
        exact = reference_logits(copy.deepcopy(model).double(), inputs)
        own = distance(theirs, exact, mask).max()
        differences = distance(ours, exact, mask)
        allowed = np.maximum(allowed, ROUNDING * own)
        remark = f"the reference is {own:.1e} from fp64"
    for row, (difference, each) in enumerate(zip(differences, _one_by_one(inputs), strict=True)):
        said = remark
        wrong = other_token(our_tokens[row], tokens[row], logits[row], allowed[row])
        if wrong:
            (own_tokens,), (own_logits,) = recomputed_tokens(model, each, new)
            own = our_tokens[row, : len(own_tokens)]
            wrong = other_token(own, own_tokens, own_logits, allowed[row])
            said = "`generate` of the reference contradicts its forward pass"
        if not difference <= allowed[row]:
            wrong = f"logits differ by {difference:.1e} of the largest"
        found.append(Outcome(number, "DIFFERENT" if wrong else "equal", what, wrong or said))
    return found


def check_cases(
    cases: int, seed: int = 0, first: int = 0, *, few_sizes: bool = False, new: int = 3
) -> Iterator[Outcome]:
    """Runs models until there were so many cases; JAX runs them operation by operation.

    A compiled program for each would take a second, and no two models have the same shapes.
    """
    done, number = 0, first
    with jax.disable_jit():
        while done < cases:
            with tempfile.TemporaryDirectory() as folder:
                options = {"few_sizes": few_sizes, "new": new}
                for outcome in check_model(number, Path(folder), seed, **options):
                    if done < cases:
                        yield outcome
                    done += 1
            number += 1
