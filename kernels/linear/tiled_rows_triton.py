"""Matrix products of 17 rows and more: tiles through shared memory, with the norm before and the gate behind.

For the products of a decode step, which last no longer than it takes to read their weight. What keeps a library's
kernel above that is what is around it: it starts only when the kernel before has ended, and norm and gate are kernels
of their own. Here a program asks for its first columns of the weight before it waits for the kernel before, so that
they are in the cache by then; the columns are split between programs until every processor has some; the last of a
tile's programs adds their results up.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.linear.few_rows_triton import finish, workspace


class Tiling(NamedTuple):
    """rows: of the input in a program. block_n: weight rows of a program, gated: half of them up's. block_k: columns
    at a time. split_k: programs that share the columns. stages: tiles in flight. ahead: cache lines of each weight row
    that are asked for before the wait, a power of 2; or 0.
    """

    rows: int
    block_n: int
    block_k: int
    split_k: int
    stages: int
    num_warps: int
    ahead: int


@triton.jit
def ask_for(address):
    """Bring the cache lines at these addresses, int64, into the L2 cache. Nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def tiled_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,  # float32 [row tiles, tiles, SPLIT_K, ROWS * BLOCK_N + ROWS]
    counter_ptr,  # int32 [row tiles, tiles]: programs that have stored their part; 0 between kernels
    num_rows,
    eps,
    N: tl.constexpr,  # of out
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    dtype = x_ptr.dtype.element_ty
    part = tl.program_id(0)
    tile = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    TILES: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)  # of this program
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLIT_K) == 0
    EVEN: tl.constexpr = EVEN_K and N % WIDTH == 0
    row = tl.arange(0, BLOCK_N)
    n = tile * WIDTH + row % WIDTH
    w_ptr = weight_ptr + ((row // WIDTH * N + n).to(tl.int64) * K)[:, None]
    first_k = part * TILES * BLOCK_K
    if DEPENDENT and AHEAD > 0:
        line = first_k + tl.arange(0, AHEAD) * 64  # elements of a cache line
        inside = weight_ptr + (tl.minimum(row // WIDTH * N + n, weight_rows(N, GATED) - 1).to(tl.int64) * K)[:, None]
        ask_for((inside + tl.minimum(line, K - 1)[None, :]).to(tl.int64))
    begin(DEPENDENT)

    m = tl.arange(0, ROWS)
    rows_ptr = x_ptr + ((first_row + m).to(tl.int64) * K)[:, None]
    x_rows = (first_row + m < num_rows)[:, None]
    w_rows = (n < N)[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        k = first_k + i * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            w = tl.load(w_ptr + k[None, :])
        else:
            w = tl.load(w_ptr + k[None, :], mask=w_rows & (k < K)[None, :], other=0.0)
        if EVEN_K:
            x = tl.load(rows_ptr + k[None, :], mask=x_rows, other=0.0)
        else:
            x = tl.load(rows_ptr + k[None, :], mask=x_rows & (k < K)[None, :], other=0.0)
        if HAS_NORM:
            norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * norm.to(tl.float32)[None, :]).to(dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    out_ptr += first_row.to(tl.int64) * N
    if HAS_RESIDUAL:
        residual_ptr += first_row.to(tl.int64) * N
    if SPLIT_K == 1:
        finish(
            acc, squares, tile, bias_ptr, residual_ptr, out_ptr, num_rows - first_row, eps,
            N, K, ROWS, BLOCK_N, HAS_NORM, HAS_RESIDUAL, HAS_BIAS, GATED,
        )  # fmt: skip
    else:
        SIZE: tl.constexpr = ROWS * BLOCK_N + ROWS
        place = tl.program_id(2) * tl.num_programs(1) + tile
        at = m[:, None] * BLOCK_N + row[None, :]
        partial_ptr += place * (SPLIT_K * SIZE)
        tl.store(partial_ptr + part * SIZE + at, acc)
        if HAS_NORM:
            tl.store(partial_ptr + part * SIZE + ROWS * BLOCK_N + m, squares)
        tl.debug_barrier()  # one thread's release below is for the stores of all
        if tl.atomic_add(counter_ptr + place, 1, sem="acq_rel") == SPLIT_K - 1:
            acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
            squares = tl.zeros([ROWS], tl.float32)
            for other in tl.static_range(SPLIT_K):
                acc += tl.load(partial_ptr + other * SIZE + at, cache_modifier=".cg")
                if HAS_NORM:
                    squares += tl.load(partial_ptr + other * SIZE + ROWS * BLOCK_N + m, cache_modifier=".cg")
            tl.store(counter_ptr + place, 0)
            finish(
                acc, squares, tile, bias_ptr, residual_ptr, out_ptr, num_rows - first_row, eps,
                N, K, ROWS, BLOCK_N, HAS_NORM, HAS_RESIDUAL, HAS_BIAS, GATED,
            )  # fmt: skip


@triton.jit
def weight_rows(N: tl.constexpr, GATED: tl.constexpr):
    """Rows of the weight of a product with N columns."""
    return 2 * N if GATED else N


def triton_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, tiling: Tiling
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
    tiling: Tiling,
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
    tiling: Tiling,
) -> Tensor:
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    assert x.is_contiguous() and weight.is_contiguous() and (residual is None or residual.is_contiguous())
    tiles, row_tiles = triton.cdiv(n, tiling.block_n // (2 if gated else 1)), triton.cdiv(m, tiling.rows)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    partial = counter = None
    if tiling.split_k > 1:
        places = tiles * row_tiles
        partial, counter = workspace(x.device, places, places * tiling.split_k * tiling.rows * (tiling.block_n + 1))
    tiled_kernel[(tiling.split_k, tiles, row_tiles)](
        x, norm_weight, weight, bias, residual, out, partial, counter, m, eps,
        N=n, K=k, ROWS=tiling.rows, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, SPLIT_K=tiling.split_k,
        STAGES=tiling.stages, AHEAD=tiling.ahead, HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None, GATED=gated, num_warps=tiling.num_warps, **dependent_launch(x.device),
    )  # fmt: skip
    return out
