"""silu(gate) * up of a prompt's tokens, in the kernel that computes both products.

Apart, the products are written, and read by another kernel. With tiles of 128 x 128 of both and the copy engine (TMA),
this kernel takes little longer than cuBLAS's alone: on one H100, 16,384 tokens of Qwen3-0.6B, 313 us where both take
380. With 8B, where the gate is less than a tenth, it gained nothing in a whole step.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pdray.kernels.crossover import GATED_PROMPT_MAX_COLUMNS, GATED_PROMPT_MIN_OCCUPANCY
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.processors import num_processors


class Tiling(NamedTuple):
    """block_m: tokens of a tile. block_n: columns of its result. block_k: columns of x at a time. group: tiles of
    tokens that follow each other with the same weights, which the L2 cache holds meanwhile.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    stages: int = 3
    num_warps: int = 8
    group: int = 8


BEST = Tiling()


@triton.jit(do_not_specialize=["num_rows"])
def gated_prompt_kernel(
    x_desc,  # [M, K]
    weight_desc,  # [2 N, K], gate above up
    out_desc,  # [M, N]
    num_rows,  # M
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    WIDE: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # tiles in a row of tiles
    high = tl.cdiv(num_rows, BLOCK_M)
    dtype = out_desc.dtype
    for tile in range(tl.program_id(0), high * WIDE, tl.num_programs(0)):
        first = tile // (GROUP * WIDE) * GROUP
        rows = tl.minimum(high - first, GROUP)
        m = (first + tile % (GROUP * WIDE) % rows) * BLOCK_M
        n = tile % (GROUP * WIDE) // rows * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):  # what is outside the tensors is read as 0, and not written
            x = x_desc.load([m, k])
            gate = tl.dot(x, weight_desc.load([n, k]).T, gate)
            up = tl.dot(x, weight_desc.load([N + n, k]).T, up)
        rounded = gate.to(dtype).to(tl.float32)
        activated = (rounded / (1.0 + tl.exp(-rounded))).to(dtype).to(tl.float32)
        out_desc.store([m, n], (activated * up.to(dtype).to(tl.float32)).to(dtype))


def is_gated_prompt(x: Tensor, weight: Tensor) -> bool:
    """Whether triton_gated_prompt() is ahead of the products and a kernel behind them."""
    if x.shape[1] > GATED_PROMPT_MAX_COLUMNS:
        return False
    tiles = triton.cdiv(len(x), BEST.block_m) * triton.cdiv(len(weight) // 2, BEST.block_n)
    return occupancy(tiles, num_processors(x.device)) >= GATED_PROMPT_MIN_OCCUPANCY


def occupancy(tiles: int, num_processors: int) -> float:
    """Share of the processors' time in which they have one of these tiles."""
    return tiles / (triton.cdiv(tiles, num_processors) * num_processors)


def triton_gated_prompt(x: Tensor, weight: Tensor, tiling: Tiling = BEST, num_programs: int | None = None) -> Tensor:
    """silu_and_mul() of x [M, K] @ weight [2 N, K]^T, rounded as one by one: [M, N]. All contiguous.

    Args:
        num_programs: that share the tiles; default: one a processor.
    """
    assert x.is_contiguous() and weight.is_contiguous()
    assert x.shape[1] % 8 == 0 and len(weight) % 16 == 0, "rows must begin at multiples of 16 bytes"
    (m, k), n = x.shape, len(weight) // 2
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    gated_prompt_kernel[(min(tiles, num_programs or num_processors(x.device)),)](
        TensorDescriptor.from_tensor(x, [tiling.block_m, tiling.block_k]),
        TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k]),
        TensorDescriptor.from_tensor(out, [tiling.block_m, tiling.block_n]),
        m,
        N=n, K=k, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, GROUP=tiling.group,
        num_warps=tiling.num_warps, num_stages=tiling.stages, **dependent_launch(x.device),
    )  # fmt: skip
    return out
