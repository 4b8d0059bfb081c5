"""What the configuration of a block may be."""

from moresjax.core.errors import UserError, choice_error
from moresjax.models.layers import ACTIVATIONS, DTYPES, NORMS


def check_heads(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuses heads that do not divide.

    Args:
      hidden_size: D.
      num_heads: Query heads.
      num_kv_heads: Key and value heads.
      head_dim: Features of a head; 0: an equal share of `hidden_size`.

    Raises:
      UserError: Names the two numbers.
    """
    if not head_dim and hidden_size % num_heads:
        raise UserError(
            f"hidden_size {hidden_size} does not divide into num_heads {num_heads}; give head_dim"
        )
    if num_heads % num_kv_heads:
        raise UserError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")


def check_kinds(norm: str, activation: str, dtype: str) -> None:
    """Refuses names of a norm, an activation or a dtype that does not exist.

    Raises:
      UserError: Names those there are.
    """
    checked = {"norm": (norm, NORMS), "activation": (activation, ACTIVATIONS)}
    for what, (value, choices) in (checked | {"dtype": (dtype, DTYPES)}).items():
        if value not in choices:
            raise choice_error(what, value, choices)
