"""Floating-point operations of a train step, from shapes.

Axis legend: S tokens per row, N query heads, H head size.

Compilers count the body of a loop over layers once, so the numbers are analytic. Per token and
parameter of a matrix: 2 in the forward pass, 2 more where a gradient passes to what lies before
it, 2 more for its own gradient. A frozen LLM thus costs 4 per parameter, a trained one 6, an
encoder with nothing trained in it 2. Attention costs `4 S N H` per token and layer forward and
twice that backward: over the whole square, as it is computed. `hardware` adds the forward pass
that blocks with remat repeat.
"""

import dataclasses
import math

from flax import nnx

from moresjax.models.mllm import MLLMConfig
from moresjax.paths import path_name


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one step on all chips.

    Attributes:
      model: what the mathematics asks for, the numerator of MFU.
      hardware: with what is computed twice to save memory.
    """

    model: float
    hardware: float


def train_flops(
    config: MLLMConfig,
    trainable: nnx.State,
    frozen: nnx.State,
    *,
    rows: int,
    length: int,
    images: int,
) -> StepFlops:
    """Operations of a train step over `rows` rows of `length` tokens with `images` images each."""
    trained = {path_name(path) for path, _ in nnx.to_flat_state(trainable)}
    towers = _towers(config, images, length)
    model = again = 0.0
    for path, variable in nnx.to_flat_state(nnx.merge_state(trainable, frozen)):
        name = path_name(path)
        tuning = name.startswith("tuning.theta.")
        place = str(path[3]) if tuning else name
        tower = next((t for t in towers if place.startswith(t)), None)
        if tower is None or ".tail." in name or not (tuning or _multiplies(name, config)):
            continue
        tokens = rows * towers[tower][1]
        work = 2.0 * math.prod(variable.shape) * tokens
        passes = _passes(tower, trained)
        model += work * (1 + passes + (name in trained))
        again += work * (passes and ".block" in place)
    for tower, (blocks, tokens) in towers.items():
        if blocks is None:
            continue
        work = 4.0 * tokens**2 * blocks.num_heads * blocks.head_dim * _layers(blocks) * rows
        if tower.startswith("vision"):
            work /= images  # images do not see each other
        passes = _passes(tower, trained)
        model += work * (1 + 2 * passes)
        again += work * passes
    return StepFlops(model, model + again * config.llm.remat)


def _towers(config: MLLMConfig, images: int, length: int) -> dict:
    """By the start of a parameter's name: the blocks' shape (None: no blocks), tokens per row."""
    towers = {"llm": (config.llm, length)}
    if config.vision is None or not images:
        return towers
    if config.vision.is_pair:
        encoders = {f"vision.encoders.{i}": e for i, e in enumerate(config.vision.encoders)}
    else:
        encoders = {"vision": config.vision}
    for name, encoder in encoders.items():
        towers[name] = (encoder, images * (encoder.num_patches + encoder.prefix_tokens))
    return towers | {"connector": (None, images * config.visual_tokens)}


def _layers(blocks) -> int:
    return getattr(blocks, "used_layers", blocks.num_layers)


def _multiplies(name: str, config: MLLMConfig) -> bool:
    """Whether a parameter is a matrix that activations are multiplied with; tables are read."""
    if name == "llm.embed.table":
        return config.llm.tie_embeddings
    return name.endswith(".kernel")


def _passes(tower: str, trained: set[str]) -> bool:
    """Whether gradients pass through a part: whether it, or what comes before it, trains."""
    if tower == "llm":
        return True
    before = ("vision",) if tower.startswith("vision") else ("vision", "connector")
    sites = [n.split(".", 3)[-1] if n.startswith("tuning.") else n for n in trained]
    return any(site.startswith(before) for site in sites)
