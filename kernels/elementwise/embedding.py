"""Rows of the embedding table, for tokens of which some were drawn by the step before and are known to the GPU only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pending_id(draw: int) -> int:
    """The id below 0 that stands for a token drawn by the step before, until the host knows it.

    embed() looks it up; nothing else reads such an id.
    """
    return -1 - draw


def embed(input_ids: Tensor, table: Tensor, sampled: Tensor, own: tuple[int, int] | None = None) -> Tensor:
    """table's row of each token.

    Args:
        input_ids: [T] int64; pending_id(i) stands for ``sampled[i]``.
        table: [V, H].
        sampled: [R] int64; may be empty where no id is below 0.
        own: the table has the rows of ids from own[0] to own[1] alone, and others get zeros; None: it has all.

    Returns:
        [T, H], table's dtype.
    """
    if table.is_cuda:
        from pdray.kernels.elementwise.embedding_triton import triton_embed

        return triton_embed(input_ids, table, sampled, own)
    late = input_ids < 0
    if len(sampled):
        input_ids = sampled[(-1 - input_ids).clamp(min=0)].where(late, input_ids)
    if own is None:
        return F.embedding(input_ids, table)
    is_own = (input_ids >= own[0]) & (input_ids < own[1])
    return F.embedding((input_ids - own[0]) * is_own, table).masked_fill_(~is_own[:, None], 0.0)
