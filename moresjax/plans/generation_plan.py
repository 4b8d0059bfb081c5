"""Plans of generation for a TPU slice: the engine's own programs, compiled ahead of time.

Nothing is allocated: all arrays are shapes. The prefill is compiled for rows that are split over
the chips, the decode loop for the KV cache as the prefill leaves it. Memory is that of
each program; the weights of the vision side, which decoding does not read, stay on the chips
beside it. Numbers of the decode loop are those of one step, which reads, on every chip,

    hbm      weights + KV cache

and a prefill reads the weights and writes the cache. Times are bounds, see there. The engine's
layers are unrolled, so deep models compile for many minutes.
"""

from flax import nnx
from jax.sharding import Mesh

from moresjax.core.errors import UserError
from moresjax.core.layout import RowStructure
from moresjax.generation.engine import Engine
from moresjax.models.flops import StepFlops, generation_flops
from moresjax.plans.program import Plan, Program, bytes_per_chip, weight_bytes
from moresjax.plans.train_plan import abstract_batch, abstract_model, find_mesh
from moresjax.runs.architecture import model_config
from moresjax.runs.run_config import AnyConfig, RunConfig, resolve
from moresjax.runs.sources import with_sources
from moresjax.sharding.mesh import batch_shards, use_mesh

SETTING = ("batch_size", "images_per_row", "quantize", "attention", "tuning")


def plan_generation(
    config: AnyConfig,
    topology: str,
    new: int,
    prompt: int | None = None,
    quick: bool = False,
) -> list[Plan]:
    """Compiles prefill and decode loop of a configuration's model for a slice.

    Args:
      config: A run's configuration: `batch_size` prompts with `images_per_row` images each. Its
        folders are not read.
      topology: `v5e-8` or `v5e:2x4`, see `find_slice`.
      new: New tokens per row.
      prompt: Tokens per prompt, images included; default: what `new` leaves of `max_seq_len`.
      quick: Whether to compile with the least effort (see `program.QUICK`).

    Returns:
      The plan of the prefill and, if that fits, of a decode step.

    Raises:
      UserError: for sizes that do not go together, a configuration that cannot run, or without
        libtpu.
    """
    config = with_sources(resolve(config), ".")
    target, mesh = find_mesh(config, topology)
    prompt = config.max_seq_len - new if prompt is None else prompt
    engine = abstract_engine(config, mesh)
    total = engine.num_virtual_tokens + prompt + new
    _check(config, mesh, prompt, new, total)
    batch = abstract_batch(config, mesh, prompt, RowStructure.SINGLE)
    setting = {"prompt": prompt, "new_tokens": new} | {k: getattr(config, k) for k in SETTING}
    setting["quick"] = quick
    rows, architecture = config.batch_size, model_config(config)
    whole, bare = engine.parameters

    def flops(parameters: nnx.State, length: int, keys: int, images: int) -> StepFlops:
        sizes = {"rows": rows, "length": length, "keys": keys, "images": images}
        return generation_flops(architecture, parameters, **sizes)

    about = {"target": target, "mesh": mesh, "setting": setting}
    with use_mesh(mesh):
        prefill = Program(engine.lower_prefill(batch, new), (whole, batch), quick)
    cache = 0 if prefill.compiled is None else bytes_per_chip(prefill.results.caches)
    about["cache_bytes"] = cache
    plans = [
        prefill.plan(
            "prefill",
            tokens=rows * prompt,
            flops=flops(whole, prompt, engine.num_virtual_tokens + prompt, config.images_per_row),
            hbm=weight_bytes(whole, mesh, {}) + cache,
            **about,
        )
    ]
    if not plans[0].fits:
        return plans
    with use_mesh(mesh):
        decode = Program(engine.lower_steps(prefill.results), (bare, prefill.results), quick)
    step = decode.plan(
        "decode step",
        tokens=rows,
        flops=flops(bare, 1, total, 0),
        hbm=weight_bytes(bare, mesh, {}) + cache,
        trip_count=1,
        **about,
    )
    return [*plans, step]


def abstract_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The engine of a configuration's model, all parameters being shapes with their shardings."""
    return Engine(nnx.merge(*abstract_model(config, mesh)), eos_ids=(0,))


def _check(config: RunConfig, mesh: Mesh, prompt: int, new: int, total: int) -> None:
    """Refuses sizes that cannot work before anything is compiled."""
    architecture, shards = model_config(config), batch_shards(mesh)
    if new < 1 or prompt < 1:
        raise UserError(f"a prompt of {prompt} tokens and {new} new ones: both must be at least 1")
    if total > architecture.llm.max_positions:
        raise UserError(
            f"a prompt of {prompt} tokens and {new} new ones need {total} positions, the model has "
            f"{architecture.llm.max_positions}"
        )
    visual = config.images_per_row * architecture.visual_tokens
    if visual > prompt:
        raise UserError(
            f"{config.images_per_row} images make {visual} tokens, which do not fit a prompt of "
            f"{prompt}"
        )
    if config.batch_size < 1 or config.batch_size % shards:
        raise UserError(
            f"batch_size {config.batch_size} does not divide into {shards} parts of the mesh"
        )
