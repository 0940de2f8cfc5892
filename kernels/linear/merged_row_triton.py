"""The output product of one row of attention that was split: each program merges the splits' results as it reads them.

A kernel less in each layer than with a merge of its own. Every program reads all results, so that it is for one row.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.attention.projected_decode_triton import SplitResults, tokens_per_split
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.linear.one_row_triton import Tiles as RowTiles


@triton.jit
def merged_row_kernel(
    partial_ptr,  # [HEADS, SPLITS, HEAD_DIM] float32
    lse_ptr,  # [HEADS, SPLITS] float32, base 2
    seq_lens_ptr,  # [1]
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    heads = tl.arange(0, BLOCK_H)[None, :, None]
    w_ptr = weight_ptr + n.to(tl.int64)[:, None, None] * (HEADS * HEAD_DIM) + heads * HEAD_DIM + dims
    inside = (n < N)[:, None, None] & (dims < HEAD_DIM)
    weights = ()
    for first in tl.static_range(0, HEADS, BLOCK_H):
        mask = inside & (first + heads < HEADS)
        weights = weights + (tl.load(w_ptr + first * HEAD_DIM, mask=mask, other=0.0),)
    cached = tl.maximum(tl.load(seq_lens_ptr) - 1, 0)
    num_used = tl.maximum(tl.cdiv(cached, tokens_per_split(cached, SPLITS, SPLIT_TOKENS)), 1)
    begin(DEPENDENT)
    dtype = out_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_H, BLOCK_D], tl.float32)
    for i in tl.static_range((HEADS + BLOCK_H - 1) // BLOCK_H):
        head = i * BLOCK_H + heads
        row = head * SPLITS
        largest = tl.full([1, BLOCK_H, 1], float("-inf"), tl.float32)
        logs = ()
        parts = ()
        for split in tl.static_range(SPLITS):
            has_head = head < tl.where(split < num_used, HEADS, 0)
            log = tl.load(lse_ptr + row + split, mask=has_head, other=float("-inf"))
            part_ptr = partial_ptr + (row + split) * HEAD_DIM + dims
            parts = parts + (tl.load(part_ptr, mask=has_head & (dims < HEAD_DIM), other=0.0),)
            logs = logs + (log,)
            largest = tl.maximum(largest, log)
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.zeros([1, BLOCK_H, 1], tl.float32)
        x = tl.zeros([1, BLOCK_H, BLOCK_D], tl.float32)
        for split in tl.static_range(SPLITS):  # in their order, so that the same step gives the same bits
            share = tl.exp2(logs[split] - base)
            total += share
            x += share * parts[split]
        x = (x / tl.where(total > 0, total, 1.0)).to(dtype)
        acc += weights[i].to(tl.float32) * x.to(tl.float32)
    out = tl.sum(tl.sum(acc, 2), 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    out = out.to(dtype).to(tl.float32) + tl.load(residual_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, out.to(dtype), mask=n < N)


def triton_merged_linear(
    results: SplitResults, weight: Tensor, bias: Tensor | None, residual: Tensor, tiles: RowTiles | None = None
) -> Tensor:
    """merge(results) @ weight [N, K]^T + bias [N] + residual [1, N], of one row; all contiguous."""
    (batch, num_heads, num_splits, head_dim), n = results.partial.shape, len(weight)
    assert weight.is_contiguous() and batch == 1 and weight.shape[1] == num_heads * head_dim
    block_d = triton.next_power_of_2(head_dim)
    tiles = tiles or RowTiles(8, 1024, 8)
    out = torch.empty(1, n, dtype=residual.dtype, device=residual.device)
    merged_row_kernel[(triton.cdiv(n, tiles.block_n),)](
        results.partial, results.lse, results.seq_lens, weight, bias, residual, out,
        N=n, HEADS=num_heads, HEAD_DIM=head_dim, SPLITS=num_splits, SPLIT_TOKENS=results.split_tokens,
        BLOCK_N=tiles.block_n, BLOCK_H=max(1, tiles.block_k // block_d), BLOCK_D=block_d, HAS_BIAS=bias is not None,
        num_warps=tiles.num_warps, **dependent_launch(residual.device),
    )  # fmt: skip
    return out
