"""What tuning methods add to the time of generation, measured on a model at hand."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from moresjax.core.errors import UserError
from moresjax.core.row import Row
from moresjax.generation.engine import Engine
from moresjax.inference.model import Model

NO_TUNING, OWN = "none", "as it is"
WARM = 2  # rounds that compile and are not counted
NO_END = (-1,)  # a token that never comes: all rows generate all tokens


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Seconds of one tuning in every round, per sample, and of no tuning in the same rounds.

    Attributes:
      prefill: Seconds of reading the prompts.
      decode: Seconds of the new tokens after the first.
      plain: Seconds of both without tuning.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        """In every round the seconds that the tuning added."""
        triples = zip(self.prefill, self.decode, self.plain, strict=True)
        return [prefill + decode - plain for prefill, decode, plain in triples]

    @property
    def added(self) -> float:
        """The median over rounds of the seconds that the tuning added."""
        return statistics.median(self.differences)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between which half of the rounds' differences lie."""
        low, high = np.quantile(self.differences, (0.25, 0.75))
        return float(low), float(high)


def measure_overhead(
    model: Model, tunings: Sequence[str], rows: Sequence[Row], new_tokens: int, *, rounds: int = 9
) -> dict[str, Overhead]:
    """Times generation without tuning, with the model's own, and with others of random values.

    Every round goes through all of them, so that a slow moment of the machine meets each. Nothing
    is merged into the weights.

    >>> from moresjax.testing import talking_model
    >>> model = talking_model()
    >>> rows = model.prompts.rows(["is there a two ?"], [()])
    >>> list(measure_overhead(model, ("none", "ia3"), rows, 2, rounds=1))
    ['none', 'ia3']

    Args:
      model: The model; it is not changed.
      tunings: Tuning specs to try.
      rows: Prompts that are read at a time.
      new_tokens: Tokens that every one of them generates.
      rounds: How often everything is measured.

    Returns:
      By spec; `none` is always there, and `as it is` for a model with a tuning.

    Raises:
      UserError: No round or prompt, fewer than two tokens, or a spec that does not fit the model.
    """
    if rounds < 1 or new_tokens < 2 or not rows:
        raise UserError(
            "overhead needs at least one round, one prompt and two new tokens, got "
            f"{rounds}, {len(rows)} and {new_tokens}"
        )
    batch = model.service.batch(rows, max(map(len, rows)))
    engines = {}
    model.mllm.llm.unstack()  # once: the engines then share the layers
    own = [OWN] if model.tuning != NO_TUNING else []
    for spec in dict.fromkeys([NO_TUNING, *own, *tunings]):
        copy = nnx.clone(model.mllm)
        if spec != OWN:
            copy.attach(spec)
        engines[spec] = Engine(copy, eos_ids=NO_END, mesh=model.mesh)
    seconds: dict[str, list[tuple[float, float]]] = {spec: [] for spec in engines}
    for number in range(-WARM, rounds):
        for spec, engine in engines.items():
            start = time.perf_counter()
            state = jax.block_until_ready(engine.prefill(batch, new_tokens))
            middle = time.perf_counter()
            jax.block_until_ready(engine.decode(state))
            if number >= 0:
                end = time.perf_counter()
                seconds[spec].append(((middle - start) / len(rows), (end - middle) / len(rows)))
    plain = tuple(prefill + decode for prefill, decode in seconds[NO_TUNING])
    return {
        spec: Overhead(tuple(one for one, _ in own), tuple(other for _, other in own), plain)
        for spec, own in seconds.items()
    }
