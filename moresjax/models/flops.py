"""Floating-point operations of a train step, a prefill or a decode step, from shapes.

Axis legend: S tokens per row, N query heads, H head size.

Compilers count the body of a loop over layers once, so the numbers are analytic. Per token and
parameter of a matrix: 2 in the forward pass, 2 more where a gradient passes to what lies before
it, 2 more for its own gradient. A frozen LLM thus costs 4 per parameter, a trained one 6, an
encoder with nothing trained in it 2. Attention costs `4 S N H` per token and layer forward and
twice that backward: over the whole square, as it is computed. `hardware` adds the forward pass
that blocks with remat repeat. Generation is a forward pass with logits of one token per row.
"""

import dataclasses
import math
from collections.abc import Iterator

from flax import nnx

from moresjax.core.parameter_names import named_parameters, path_name
from moresjax.models.block import BlockConfig
from moresjax.models.fusion import FusedVisionConfig
from moresjax.models.mllm import MLLMConfig

# By the start of a parameter's name: the shape of the blocks (None: no blocks), tokens per row.
Towers = dict[str, tuple[BlockConfig | None, int]]


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
    trained = set(named_parameters(trainable))
    towers = _towers(config, images, length)
    model = again = 0.0
    for name, place, tower, work in _products(config, nnx.merge_state(trainable, frozen), towers):
        passes = _passes(tower, trained)
        model += work * (1 + passes + (name in trained))
        again += work * (passes and ".block" in place)
    for tower, work in _attention(towers, images, keys=length):
        passes = _passes(tower, trained)
        model += work * (1 + 2 * passes)
        again += work * passes
    return StepFlops(rows * model, rows * (model + again * config.llm.remat))


def generation_flops(
    config: MLLMConfig, parameters: nnx.State, *, rows: int, length: int, keys: int, images: int
) -> StepFlops:
    """Operations of a forward pass with logits of one token per row.

    Args:
      config: The architecture.
      parameters: The parameters of the program (`Engine.parameters`).
      rows: The number of rows.
      length: New tokens per row: the whole prompt in a prefill, one in a decode step.
      keys: Tokens that each new token attends to: `length` in a prefill, the whole cache in a
        decode step.
      images: Images per row.
    """
    towers = _towers(config, images, length)
    total = sum(work for _, work in _attention(towers, images, keys))
    for name, _, _, work in _products(config, parameters, towers):
        logits = name.startswith(("llm.head", "llm.embed"))
        total += work / length if logits else work
    return StepFlops(rows * total, rows * total)


def _products(
    config: MLLMConfig, parameters: nnx.State, towers: Towers
) -> Iterator[tuple[str, str, str, float]]:
    """Every parameter that tokens are multiplied with.

    Yields:
      Its name, the site or name that says where it is, its tower, and the operations of a forward
      pass over a row.
    """
    for path, variable in nnx.to_flat_state(parameters):
        name = path_name(path)
        tuning = name.startswith("tuning.params.")
        place = str(path[3]) if tuning else name
        tower = next((t for t in towers if place.startswith(t)), None)
        if tower is None or ".tail." in name or not (tuning or _multiplies(name, config)):
            continue
        yield name, place, tower, 2.0 * math.prod(variable.shape) * towers[tower][1]


def _attention(towers: Towers, images: int, keys: int) -> Iterator[tuple[str, float]]:
    """Towers and the operations of their attention over a row.

    A token of the LLM sees `keys` tokens.
    """
    for tower, (blocks, tokens) in towers.items():
        if blocks is None:
            continue
        seen = tokens / images if tower.startswith("vision") else keys  # an image sees itself only
        yield tower, 4.0 * tokens * seen * blocks.num_heads * blocks.head_dim * _layers(blocks)


def _towers(config: MLLMConfig, images: int, length: int) -> Towers:
    """The towers of a model and their tokens per row."""
    towers: Towers = {"llm": (config.llm, length)}
    if config.vision is None or not images:
        return towers
    if isinstance(config.vision, FusedVisionConfig):
        encoders = {f"vision.encoders.{i}": e for i, e in enumerate(config.vision.encoders)}
    else:
        encoders = {"vision": config.vision}
    for name, encoder in encoders.items():
        towers[name] = (encoder, images * (encoder.num_patches + encoder.prefix_tokens))
    return towers | {"connector": (None, images * config.visual_tokens)}


def _layers(blocks: BlockConfig) -> int:
    """Blocks that run."""
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
