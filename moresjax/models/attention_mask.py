"""What a pass of the LLM attends by: a kernel's runs, a mask worked out in chunks, or a mask.

Axis legend: B rows, Q queries, S keys.
"""

from jaxtyping import Array, Bool

from moresjax.core.layout import Batch, LazyMask
from moresjax.models.attention import query_chunks
from moresjax.models.fused_attention import FusedConfig, Runs, chunk_runs, kernel_for, visible_runs


def attention_mask(
    batch: Batch,
    seen: LazyMask,
    config: FusedConfig,
    first: int | None,
    *,
    gaps: bool = False,
    dense: bool = False,
) -> Bool[Array, "B Q S"] | LazyMask | Runs:
    """The form in which attention takes what the queries see.

    What the chosen kernel cannot say is read in chunks of queries, and so is everything with
    `attention="chunked"`; up to `attention.PAIRS` pairs (1024 queries and keys) by a dense mask.
    `attention="xla"` always has the dense mask.

    Args:
      batch: The batch.
      seen: What the queries see.
      config: The configuration of the LLM.
      first: The column of the first query, when the queries are all keys from there on; None when
        a cache holds the keys before them.
      gaps: Whether rows may lack some of the virtual tokens before the batch.
      dense: Asks for the mask of all pairs.
    """
    if dense:
        return seen.dense()
    if first is None:
        runs = chunk_runs(batch, seen, config)
    else:
        runs = visible_runs(batch, config, seen.layout, first, gaps=gaps)
    if runs is not None:
        return runs
    if kernel_for(config) != "xla" and query_chunks(seen.shape) > 1:
        return seen
    return seen.dense()
