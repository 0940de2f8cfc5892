"""The Triton counterpart of embed: one program for each token."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch


@triton.jit
def embed_kernel(
    ids_ptr,
    table_ptr,
    sampled_ptr,
    out_ptr,
    own_start,
    own_stop,
    IS_SHARD: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(ids_ptr + token)
    late = tl.load(sampled_ptr + (-1 - token_id), mask=token_id < 0, other=0)
    token_id = tl.where(token_id < 0, late, token_id)
    element = tl.arange(0, PADDED_WIDTH)
    mask = element < WIDTH
    if IS_SHARD:
        first = tl.where((token_id >= own_start) & (token_id < own_stop), 0, WIDTH)  # nothing of others' rows
        row = tl.load(table_ptr + (token_id - own_start) * WIDTH + element, mask=mask & (element >= first), other=0.0)
    else:
        row = tl.load(table_ptr + token_id * WIDTH + element, mask=mask)
    tl.store(out_ptr + token * WIDTH + element, row, mask=mask)


def triton_embed(input_ids: Tensor, table: Tensor, sampled: Tensor, own: tuple[int, int] | None = None) -> Tensor:
    """See embedding.embed; everything contiguous, on the current stream."""
    assert input_ids.is_contiguous() and table.is_contiguous() and sampled.is_contiguous()
    num_tokens, width = len(input_ids), table.shape[1]
    out = torch.empty((num_tokens, width), dtype=table.dtype, device=table.device)
    padded = triton.next_power_of_2(width)
    start, stop = own or (0, 0)
    if num_tokens:
        # No launch_pdl: the step's first kernel starts when all before it has ended, so that what follows may read what
        # the step found (lengths, block tables, the KV of earlier tokens) without waiting for a kernel of the step.
        embed_kernel[(num_tokens,)](
            input_ids, table, sampled, out, start, stop,
            IS_SHARD=own is not None, WIDTH=width, PADDED_WIDTH=padded, num_warps=4 if padded <= 2048 else 8,
            DEPENDENT=dependent_launch(table.device)["DEPENDENT"],
        )  # fmt: skip
    return out
