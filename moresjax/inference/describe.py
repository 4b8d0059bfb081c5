"""A model told in a few lines: its parts, what trains in it, and where it is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moresjax.models.count import count_parameters
from moresjax.models.fusion import AnyVisionConfig, FusedVisionConfig

if TYPE_CHECKING:
    from moresjax.inference.loaded_model import LoadedModel


def describe_model(model: "LoadedModel") -> str:
    """The `repr` of a model: sizes and parameters of its parts, tuning, adapters and mesh."""
    config = model.config
    held = model.mllm.tuning.held
    # Adapters of several methods may not fit together as one tuning.
    spec = "none" if held else model.tuning
    report = count_parameters(config, spec, also_train=())
    counts = {name: f"{count.total:,d} parameters" for name, count in report.components.items()}
    llm = config.llm
    lines = [
        f"llm: {llm.num_layers} layers, {llm.hidden_size} features, {llm.num_heads} heads, "
        f"{llm.vocab_size} tokens, {counts['llm']}"
    ]
    if config.vision is not None:
        lines += [
            f"vision: {_vision(config.vision)}, {counts['vision']}",
            f"connector: {config.connector}, {config.visual_tokens} visual tokens per image, "
            f"{counts.get('connector', 'no parameters')}",
        ]
    trained = f", {report.trainable:,d} trainable parameters" if report.trainable else ""
    lines.append(f"tuning: {model.tuning}{trained}")
    if held:
        lines.append(f"adapters: {', '.join(model.adapters) or 'none'}")
        own = {name: each.tuning.spec for name, each in held.source.adapters.items()}
        lines += [f"  {name}: {tuning}" for name, tuning in own.items()]
    if model.mesh is not None:
        axes = " x ".join(f"{name}={size}" for name, size in model.mesh.shape.items())
        lines.append(f"mesh: {axes}, {model.mesh.devices.flat[0].platform}")
    return "\n  ".join(["Model", *lines])


def _vision(config: AnyVisionConfig) -> str:
    if isinstance(config, FusedVisionConfig):
        each = [_vision(encoder) for encoder in config.encoders if not isinstance(encoder, Mapping)]
        return f"{' and '.join(each)} ({config.fusion})"
    return (
        f"{config.num_layers} layers, {config.hidden_size} features, "
        f"{config.image_size} x {config.image_size} pixels"
    )
