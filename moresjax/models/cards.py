"""One line about every named size."""

import dataclasses
import math

from moresjax.core.parameter_names import named_parameters
from moresjax.models.decoder import DecoderConfig
from moresjax.models.mllm import MLLM, MLLMConfig
from moresjax.models.zoo import ENCODERS, LLMS, MODELS, mllm_config

# Any LLM will do to count an encoder, and any encoder to count an LLM.
_COUNTED_WITH = "opt-125m"


@dataclasses.dataclass(frozen=True)
class Card:
    """What a name stands for.

    Attributes:
      kind: `llm`, `vision` or `model`.
      name: the name in configs and on the command line.
      parameters: the exact number of parameters.
      text: the shape in words.
    """

    kind: str
    name: str
    parameters: int
    text: str


def zoo_cards() -> list[Card]:
    """Cards of all named LLMs, encoders and whole models."""
    cards = [Card("llm", n, _count(mllm_config(n), "llm"), _llm_text(c)) for n, c in LLMS.items()]
    for name, config in ENCODERS.items():
        size = _count(mllm_config(_COUNTED_WITH, name), "vision")
        text = f"{config.num_tokens} tokens of {config.num_features} at {config.image_size} px"
        cards.append(Card("vision", name, size, text))
    for name, parts in MODELS.items():
        cards.append(Card("model", name, _count(mllm_config(name)), " + ".join(parts)))
    return cards


def _llm_text(config: DecoderConfig) -> str:
    heads = f"{config.num_heads}/{config.num_kv_heads} heads"
    return (
        f"{config.num_layers} layers of {config.hidden_size}, {heads}, {config.vocab_size:,} words"
    )


def _count(config: MLLMConfig, part: str = "") -> int:
    """Parameters of a part, from shapes."""
    shapes = {name: variable.shape for name, variable in named_parameters(MLLM(config)).items()}
    prefix = f"{part}." if part else ""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
