"""Matrix products of up to 64 rows: tiles that the GPU's copy engine (TMA) brings in, with the gate behind.

For products of a decode step that last no longer than it takes to read their weight. A library's kernel starts when the
one before has ended, and leaves the gate to another. Here a program asks for its first columns of the weight before it
waits for the kernel before, so that the cache has them by then. Where the weight has too few rows to occupy the GPU,
programs split K: the last of a tile's programs adds their results up.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pdray.kernels.crossover import TILED_GATED_MANY_COLUMNS, TILED_ROWS_MAX
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.linear.few_rows_triton import workspace


class Tiling(NamedTuple):
    """rows: of the input in a program, 64 or more for the fast MMA. block_n: columns of the result of a program.
    block_k: columns of the input at a time. split_k: programs that share them. stages: tiles in flight. ahead: cache
    lines of each weight row that are asked for before the wait, a power of 2; or 0.
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
def finish(
    out,  # [ROWS, BLOCK_N] float32, the product
    up,  # the same of up's weights, where GATED
    tile,
    first_row,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Applies what follows the product, and stores."""
    dtype = out_ptr.dtype.element_ty
    m = first_row + tl.arange(0, ROWS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < num_rows)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        gate = out.to(dtype).to(tl.float32)
        out = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        out = out.to(dtype).to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def tiled_kernel(
    x_desc,  # [num_rows, K] in tiles of [ROWS, BLOCK_K]
    weight_desc,  # [N, K], gated [2 N, K], in tiles of [BLOCK_N, BLOCK_K]
    weight_ptr,  # the same
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,  # float32 [row tiles, tiles, SPLIT_K, ROWS * BLOCK_N], gated twice that
    counter_ptr,  # int32 [row tiles, tiles]: programs that have stored their part; 0 between kernels
    num_rows,
    N: tl.constexpr,  # of out
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(0)
    tile = tl.program_id(1)
    first_row = tl.program_id(2) * ROWS
    TILES: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)  # of this program
    first_k = part * TILES * BLOCK_K
    if DEPENDENT and AHEAD > 0:
        n = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        line = tl.minimum(first_k + tl.arange(0, AHEAD) * 64, K - 1)  # 64 elements are a cache line
        address = weight_ptr + n[:, None] * K + line[None, :]
        ask_for(address.to(tl.int64))
        if GATED:
            ask_for((address + N * K).to(tl.int64))
    begin(DEPENDENT)
    out = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for i in range(TILES):  # what is outside the tensors is read as 0; columns from N on are not stored
        k = first_k + i * BLOCK_K
        x = x_desc.load([first_row, k])
        w = weight_desc.load([tile * BLOCK_N, k])
        out = tl.dot(x, w.T, out)
        if GATED:
            w = weight_desc.load([N + tile * BLOCK_N, k])
            up = tl.dot(x, w.T, up)

    if SPLIT_K == 1:
        finish(
            out, up, tile, first_row, bias_ptr, residual_ptr, out_ptr, num_rows,
            N, ROWS, BLOCK_N, HAS_RESIDUAL, HAS_BIAS, GATED,
        )  # fmt: skip
    else:
        PIECE: tl.constexpr = ROWS * BLOCK_N
        SIZE: tl.constexpr = 2 * PIECE if GATED else PIECE
        place = tl.program_id(2) * tl.num_programs(1) + tile
        at = tl.arange(0, ROWS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        partial_ptr += place * (SPLIT_K * SIZE)
        tl.store(partial_ptr + part * SIZE + at, out)
        if GATED:
            tl.store(partial_ptr + part * SIZE + PIECE + at, up)
        tl.debug_barrier()  # one thread's release below is for the stores of all
        if tl.atomic_add(counter_ptr + place, 1, sem="acq_rel") == SPLIT_K - 1:
            out = tl.zeros([ROWS, BLOCK_N], tl.float32)
            up = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLIT_K):
                out += tl.load(partial_ptr + other * SIZE + at, cache_modifier=".cg")
                if GATED:
                    up += tl.load(partial_ptr + other * SIZE + PIECE + at, cache_modifier=".cg")
            tl.store(counter_ptr + place, 0)
            finish(
                out, up, tile, first_row, bias_ptr, residual_ptr, out_ptr, num_rows,
                N, ROWS, BLOCK_N, HAS_RESIDUAL, HAS_BIAS, GATED,
            )  # fmt: skip


def choose_tiling(n: int, k: int, gated: bool) -> Tiling:
    """n: columns of the result. Found by a sweep on one H100, with the projections of Qwen3-0.6B and 8B."""
    if gated:
        return Tiling(64, 64, 128, 1, 3, 4, 0) if n >= TILED_GATED_MANY_COLUMNS else Tiling(64, 32, 128, 1, 3, 4, 8)
    return Tiling(64, 32, 64, 1 if n >= 4096 else 4, 7, 4, 8)


def triton_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """x [M, K] @ weight [N, K]^T + bias [N], rounded, + residual [M, N], all contiguous, on the current stream."""
    return _launch(x, weight, bias, residual, False, tiling)


def triton_gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tiling: Tiling | None = None) -> Tensor:
    """silu_and_mul() of x [M, K] @ weight [2 N, K]^T + bias [2 N], rounded as one by one: [M, N]."""
    return _launch(x, weight, bias, None, True, tiling)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool, tiling: Tiling | None
) -> Tensor:
    (m, k), n = x.shape, len(weight) // (2 if gated else 1)
    assert x.is_contiguous() and weight.is_contiguous() and (residual is None or residual.is_contiguous())
    assert m >= 1 and k % 8 == 0, "rows must begin at multiples of 16 bytes"
    assert tiling is not None or m <= TILED_ROWS_MAX
    tiling = tiling or choose_tiling(n, k, gated)
    tiles, row_tiles = triton.cdiv(n, tiling.block_n), triton.cdiv(m, tiling.rows)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    partial = counter = None
    if tiling.split_k > 1:
        places = tiles * row_tiles
        size = tiling.rows * tiling.block_n * (2 if gated else 1)
        partial, counter = workspace(x.device, places, places * tiling.split_k * size)
    tiled_kernel[(tiling.split_k, tiles, row_tiles)](
        TensorDescriptor.from_tensor(x, [tiling.rows, tiling.block_k]),
        TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k]),
        weight, bias, residual, out, partial, counter, m,
        N=n, K=k, ROWS=tiling.rows, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, SPLIT_K=tiling.split_k,
        AHEAD=tiling.ahead, HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, GATED=gated,
        num_warps=tiling.num_warps, num_stages=tiling.stages, **dependent_launch(x.device),
    )  # fmt: skip
    return out
