"""The knobs of the generation engine."""

import dataclasses

from moresjax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Trade-offs between speed, memory and compilations; no knob changes a generated token.

    >>> EngineConfig(prefills_per_batch=2).decode_chunk
    16

    Attributes:
      prefills_per_batch: A batch of B rows is refilled `B / prefills_per_batch` prompts at a time.
      decode_chunk: The decode steps between two looks at which rows have said a stop string; that
        many tokens may follow a stop string.
      initial_new_tokens: The new tokens per row that the KV caches have room for at first.
      cache_growth: The factor by which that room grows whenever it is used up.
      logits_bytes: The bytes of fp32 logits of scored tokens that are in memory at a time, on each
        device. One token of every row is computed at least.
      min_prefix_tokens: A text prefix shorter than this is read with each prompt.
      min_saved_tokens: A text prefix is read once only if that saves at least this many tokens in
        total; below, another program is not worth its compilation.
      min_prompts_per_image: Images are read before their prompts if there are at least this many
        prompts per distinct set of images.
      batches_per_chunk: An evaluation prepares the questions of so many batches at a time. Answers
        are kept one by one, but at the end of every chunk the batch runs empty.
      scored_batches_per_chunk: The same for scores, which are kept chunk by chunk.

    Raises:
      UserError: A knob is out of range.
    """

    prefills_per_batch: int = 4
    decode_chunk: int = 16
    initial_new_tokens: int = 128
    cache_growth: int = 4
    logits_bytes: int = 2**28
    min_prefix_tokens: int = 8
    min_saved_tokens: int = 256
    min_prompts_per_image: float = 1.5
    batches_per_chunk: int = 64
    scored_batches_per_chunk: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 2 if field.name == "cache_growth" else 1
            if (value := getattr(self, field.name)) < least:
                raise UserError(f"{field.name} must be at least {least}, got {value}")


DEFAULT_ENGINE_CONFIG = EngineConfig()
