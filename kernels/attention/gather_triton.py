"""Copies the cached keys and values of some sequences together, for kernels that read contiguous ones."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch

PIECE = 2048  # elements that a program copies at a time


@triton.jit(
    do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "starts_ptr"]
)
def gather_kv_kernel(
    kv_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    starts_ptr,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a token's keys
    PIECE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One block of one sequence: its keys, then its values."""
    place = tl.program_id(0)
    sequence = tl.program_id(1)
    block = tl.load(table_ptr + sequence.to(tl.int64) * stride_table + place).to(tl.int64)
    num_tokens = tl.minimum(tl.load(seq_lens_ptr + sequence) - place * BLOCK_SIZE, BLOCK_SIZE)
    first = tl.load(starts_ptr + sequence).to(tl.int64) + place * BLOCK_SIZE
    begin(DEPENDENT)
    if num_tokens > 0:
        source = kv_ptr + block * (2 * BLOCK_SIZE * WIDTH)
        for start in range(0, num_tokens * WIDTH, PIECE):
            at = start + tl.arange(0, PIECE)
            mask = at < num_tokens * WIDTH
            keys = tl.load(source + at, mask=mask)
            values = tl.load(source + BLOCK_SIZE * WIDTH + at, mask=mask)
            tl.store(k_ptr + first * WIDTH + at, keys, mask=mask)
            tl.store(v_ptr + first * WIDTH + at, values, mask=mask)


def triton_gather_kv(
    kv_layer: Tensor, block_tables: Tensor, seq_lens: Tensor, starts: Tensor, kv_lens: list[int]
) -> tuple[Tensor, Tensor]:
    """Keys and values of B sequences, one sequence behind the other, each [sum of kv_lens, num_kv_heads, d].

    Args:
        kv_layer: [num_blocks, 2, block_size, num_kv_heads, d], contiguous.
        block_tables: [B, max_blocks] int32. seq_lens: [B] int32, and kv_lens the same for the host.
        starts: [B + 1] int32, where each sequence begins in the result.
    """
    assert kv_layer.is_contiguous()
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    k, v = torch.empty(2, sum(kv_lens), num_kv_heads, head_dim, dtype=kv_layer.dtype, device=kv_layer.device)
    gather_kv_kernel[(triton.cdiv(max(kv_lens), block_size), len(kv_lens))](
        kv_layer, k, v, block_tables, seq_lens, starts, block_tables.stride(0),
        BLOCK_SIZE=block_size, WIDTH=num_kv_heads * head_dim, PIECE=PIECE, num_warps=4,
        **dependent_launch(kv_layer.device),
    )  # fmt: skip
    return k, v
