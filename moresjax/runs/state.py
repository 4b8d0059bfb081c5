"""What a run trains: the only thing that is differentiated, updated, donated and saved."""

import optax
from flax import nnx
from jaxtyping import Array, Int

from moresjax.core.types import pytree_dataclass


@pytree_dataclass
class TrainState:
    """The state of a training run between two steps.

    Attributes:
      step: number of optimizer steps taken.
      trainable: parameters that train, in fp32.
      opt_state: state of the optimizer for them.
    """

    step: Int[Array, ""]
    trainable: nnx.State
    opt_state: optax.OptState
