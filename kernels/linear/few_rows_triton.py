"""Matrix products of 2 to 16 rows: as fast as the weight can be read, with the norm before and the gate behind.

A program holds the next tiles of its weight rows in registers, the first of them loaded before anything that depends
on the kernel before: that hides most of a small weight's latency. The warps of a program split a tile's columns among
them, so that each value of x and of the weight goes through shared memory once and chains of MMAs are short. Where the
weight has too few rows to occupy the GPU, programs split K too: the last of a tile's programs adds their results up.

RMSNorm's factor of a row is applied to the product, because the squares are added up while x is read for it.

With 32 rows no tiles beat cuBLAS by much, with 64 none came near.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.crossover import FEW_ROWS_MAX, FEW_ROWS_SPLIT_MAX_COLUMNS
from pdray.kernels.dependent_launch import begin, dependent_launch


class Tiling(NamedTuple):
    """block_n: weight rows of a program, gated: half of them up's. block_k: columns at a time, a part for each warp.
    split_k: programs that share the columns. prefetch: tiles in flight. weight_first: the weight is the MMA's M side,
    which is 16 or more; its N side can be 8.
    """

    block_n: int
    block_k: int
    split_k: int
    prefetch: int
    num_warps: int
    weight_first: bool


@triton.jit
def load_tile(row_ptr, row_mask, k, K: tl.constexpr, EVEN: tl.constexpr):
    """The rows [1, R, 1] of pointers at columns k [S, 1, C] -> [S, R, C]."""
    mask = row_mask
    if not EVEN:
        mask = mask & (k < K)
    return tl.load(row_ptr + k, mask=mask, other=0.0)


@triton.jit
def load_norm(norm_ptr, k, K: tl.constexpr, HAS_NORM: tl.constexpr):
    """[S, 1, C]"""
    norm = k
    if HAS_NORM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
    return norm


@triton.jit
def finish(
    out,  # [ROWS, BLOCK_N] float32, the product
    squares,  # [ROWS] sums of x^2
    tile,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Applies what follows the product, and stores."""
    dtype = out_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if HAS_NORM:
        out *= tl.rsqrt(squares / K + eps)[:, None]
    m = tl.arange(0, ROWS)
    n = tile * WIDTH + tl.arange(0, WIDTH)
    if GATED:
        out, up = tl.split(out.reshape(ROWS, 2, WIDTH).permute(0, 2, 1))
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate = out.to(dtype).to(tl.float32)
        out = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    mask = (m < num_rows)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    if HAS_RESIDUAL:
        out = out.to(dtype).to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(dtype), mask=mask)


@triton.jit
def few_row_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,  # float32 [tiles, SPLIT_K, ROWS * BLOCK_N + ROWS]
    counter_ptr,  # int32 [tiles]: programs that have stored their part; 0 between kernels
    num_rows,
    eps,
    N: tl.constexpr,  # of out
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    part = tl.program_id(0)
    tile = tl.program_id(1)
    TILES: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)  # of this program
    EVEN: tl.constexpr = K % (BLOCK_K * SPLIT_K) == 0
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    COLUMNS: tl.constexpr = BLOCK_K // NUM_WARPS
    row = tl.arange(0, BLOCK_N)
    n = tile * WIDTH + row % WIDTH
    w_ptr = weight_ptr + ((row // WIDTH * N + n).to(tl.int64) * K)[None, :, None]
    w_mask = (n < N)[None, :, None]
    m = tl.arange(0, ROWS)
    rows_ptr = x_ptr + (m * K)[None, :, None]
    x_mask = (m < num_rows)[None, :, None]
    k = part * TILES * BLOCK_K
    k += (tl.arange(0, NUM_WARPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])[:, None, :]

    weights = ()
    norms = ()
    for i in tl.static_range(min(PREFETCH, TILES)):
        weights = weights + (load_tile(w_ptr, w_mask, k + i * BLOCK_K, K, EVEN),)
        norms = norms + (load_norm(norm_ptr, k + i * BLOCK_K, K, HAS_NORM),)
    begin(DEPENDENT)
    x_next = load_tile(rows_ptr, x_mask, k, K, EVEN)
    squares = tl.zeros([NUM_WARPS, ROWS], tl.float32)
    if WEIGHT_FIRST:
        acc = tl.zeros([NUM_WARPS, BLOCK_N, ROWS], tl.float32)
    else:
        acc = tl.zeros([NUM_WARPS, ROWS, BLOCK_N], tl.float32)
    for i in tl.static_range(TILES):
        x = x_next
        if i + PREFETCH < TILES:
            weights = weights + (load_tile(w_ptr, w_mask, k + (i + PREFETCH) * BLOCK_K, K, EVEN),)
            norms = norms + (load_norm(norm_ptr, k + (i + PREFETCH) * BLOCK_K, K, HAS_NORM),)
        if i + 1 < TILES:
            x_next = load_tile(rows_ptr, x_mask, k + (i + 1) * BLOCK_K, K, EVEN)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
            x = (wide * norms[i].to(tl.float32)).to(dtype)
        if WEIGHT_FIRST:
            acc = tl.dot(weights[i], x.permute(0, 2, 1), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weights[i].permute(0, 2, 1), acc, input_precision="ieee")

    out = tl.sum(acc, 0)
    if WEIGHT_FIRST:
        out = tl.trans(out)
    total = tl.sum(squares, 0)
    if SPLIT_K == 1:
        finish(
            out, total, tile, bias_ptr, residual_ptr, out_ptr, num_rows, eps,
            N, K, ROWS, BLOCK_N, HAS_NORM, HAS_RESIDUAL, HAS_BIAS, GATED,
        )  # fmt: skip
    else:
        SIZE: tl.constexpr = ROWS * BLOCK_N + ROWS
        at = m[:, None] * BLOCK_N + row[None, :]
        partial_ptr += tile * SPLIT_K * SIZE
        tl.store(partial_ptr + part * SIZE + at, out)
        if HAS_NORM:
            tl.store(partial_ptr + part * SIZE + ROWS * BLOCK_N + m, total)
        tl.debug_barrier()  # one thread's release below is for the stores of all
        if tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1:
            out = tl.zeros([ROWS, BLOCK_N], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            for other in tl.static_range(SPLIT_K):
                out += tl.load(partial_ptr + other * SIZE + at, cache_modifier=".cg")
                if HAS_NORM:
                    total += tl.load(partial_ptr + other * SIZE + ROWS * BLOCK_N + m, cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)
            finish(
                out, total, tile, bias_ptr, residual_ptr, out_ptr, num_rows, eps,
                N, K, ROWS, BLOCK_N, HAS_NORM, HAS_RESIDUAL, HAS_BIAS, GATED,
            )  # fmt: skip


def choose_tiling(rows: int, n: int, gated: bool) -> Tiling:
    """n: columns of the result. Found by a sweep on one H100, with the projections of Qwen3-0.6B."""
    if gated:
        return Tiling(16, 256, 1, 3, 4, weight_first=True)
    if n <= FEW_ROWS_SPLIT_MAX_COLUMNS:
        return Tiling(16, 512, 2, 3, 4, weight_first=rows <= 8)
    return Tiling(16, 512, 1, 2, 4, weight_first=True)


def triton_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """x [M, K] @ weight [N, K]^T + bias [N], rounded, + residual [M, N], all contiguous, on the current stream."""
    return _launch(x, None, 0.0, weight, bias, residual, False, tiling)


def triton_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """See norm_linear.norm_linear, all contiguous. The norm's factor of a row is not rounded."""
    return _launch(x, norm_weight, eps, weight, bias, None, gated, tiling)


def _launch(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
    tiling: Tiling | None,
) -> Tensor:
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    assert x.is_contiguous() and weight.is_contiguous() and (residual is None or residual.is_contiguous())
    assert 2 <= m <= FEW_ROWS_MAX and k % 16 == 0
    tiling = tiling or choose_tiling(m, n, gated)
    rows = 8 if tiling.weight_first and m <= 8 else 16
    tiles = triton.cdiv(n, tiling.block_n // (2 if gated else 1))
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    partial = counter = None
    if tiling.split_k > 1:
        partial, counter = workspace(x.device, tiles, tiles * tiling.split_k * rows * (tiling.block_n + 1))
    few_row_kernel[(tiling.split_k, tiles)](
        x, norm_weight, weight, bias, residual, out, partial, counter, m, eps,
        N=n, K=k, ROWS=rows, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, NUM_WARPS=tiling.num_warps,
        SPLIT_K=tiling.split_k, PREFETCH=tiling.prefetch, WEIGHT_FIRST=tiling.weight_first,
        HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, GATED=gated,
        num_warps=tiling.num_warps, **dependent_launch(x.device),
    )  # fmt: skip
    return out


_workspaces: dict[tuple[torch.device, int, int, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, tiles: int, num_floats: int) -> tuple[Tensor, Tensor]:
    """Partial results, and counters at 0. Kernels of one stream share them, because they run one after another; for
    ever, because a graph may hold them.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, tiles, num_floats)
    if key not in _workspaces:
        assert not stream or not torch.cuda.is_current_stream_capturing(), "a graph would own the workspace"
        counter = torch.zeros(tiles, dtype=torch.int32, device=device)
        _workspaces[key] = torch.empty(num_floats, device=device), counter
    return _workspaces[key]
