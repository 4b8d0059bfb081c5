"""A run with a small model, for plans."""

from moresjax.runs.config import base_config
from moresjax.runs.run_config import RunConfig, resolve
from moresjax.sharding.mesh import mesh_preset

# Two layers, wide enough that every kernel is split.
CUT_LLM = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_layers": 2,
    "num_heads": 4,
}
# For train steps, which take longest to compile.
NARROW_LLM = CUT_LLM | {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512}
CUT_VISION = {
    "image_size": 56,
    "patch_size": 14,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_layers": 2,
    "num_heads": 2,
}


def cut(tuning: str, preset: str = "fsdp", llm: dict = CUT_LLM, **changes) -> RunConfig:
    """A run of the small model, split over the eight chips of a v5e-8."""
    config = base_config()
    config.dtype, config.remat, config.tuning = "bfloat16", True, tuning
    config.batch_size, config.max_seq_len, config.images_per_row = 16, 128, 1
    config.mesh.update(mesh_preset(preset, 8))
    config.model.llm, config.model.vision = llm, CUT_VISION
    config.update(changes)
    return resolve(config)
