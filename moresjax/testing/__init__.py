"""Helpers for tests, examples and plug-ins.

`models` and `batches` make tiny models and batches without files. `benchmark_files` and
`llava_files` write small datasets in the benchmarks' official formats. `hf_llms`, `hf_encoders` and
`hf_llavas` make tiny random models of `transformers`, `hf_adapters` adapts them with `peft`; all
need torch.
"""

from moresjax.testing.batches import row_layout, stack_layout, tiny_batch
from moresjax.testing.models import (
    TINY_LLM,
    TINY_VISION,
    digits_processor,
    talking_model,
    terse_model,
    tiny_config,
    tiny_model,
)

__all__ = [
    "TINY_LLM",
    "TINY_VISION",
    "digits_processor",
    "row_layout",
    "stack_layout",
    "talking_model",
    "terse_model",
    "tiny_batch",
    "tiny_config",
    "tiny_model",
]
