"""The Triton counterparts of what blocks.py and pack.py move: one program for each piece of a block."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.kv.pack import HeadRange

PIECE = 4096  # elements of a block that one program copies


@triton.jit(do_not_specialize=["first_layer", "first_id", "num_blocks"])
def copy_kernel(
    pool_ptr,
    flat_ptr,
    ids_ptr,
    stride_layer,  # of the pool
    first_layer,
    flat_offset,
    first_id,
    num_blocks,
    NUMEL: tl.constexpr,  # elements of a block that are copied
    PIECE: tl.constexpr,
    SCATTER: tl.constexpr,
    RUN: tl.constexpr,  # of each of its rows, of as many as that has in the pool, and after how many
    ROW: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Block i of one layer, from pool block ids[i] (gather) or into it (scatter)."""
    PIECES: tl.constexpr = (NUMEL + PIECE - 1) // PIECE
    program = tl.program_id(0)  # y and z end at 65,535, and a prompt may have more blocks
    piece = program % PIECES
    i = (program // PIECES % num_blocks).to(tl.int64)
    layer = (program // PIECES // num_blocks).to(tl.int64)
    block = tl.load(ids_ptr + first_id + i)
    element = piece * PIECE + tl.arange(0, PIECE)
    mask = element < NUMEL
    in_block = element if RUN == ROW else element // RUN * ROW + SKIP + element % RUN
    in_pool = pool_ptr + (first_layer + layer) * stride_layer + block * (NUMEL // RUN * ROW) + in_block
    in_flat = flat_ptr + flat_offset + (layer * num_blocks + i) * NUMEL + element
    if SCATTER:
        tl.store(in_pool, tl.load(in_flat, mask=mask), mask=mask)
    else:
        tl.store(in_flat, tl.load(in_pool, mask=mask), mask=mask)


def triton_gather_blocks(layers: Tensor, block_ids: Tensor) -> Tensor:
    """layers [L, num_blocks, ...], block_ids [n] int64 → [L, n, ...], contiguous."""
    data = torch.empty(len(layers), len(block_ids), *layers.shape[2:], dtype=layers.dtype, device=layers.device)
    copy_pieces(layers, data, block_ids, len(block_ids), len(layers), scatter=False)
    return data


def triton_scatter_blocks(layers: Tensor, block_ids: Tensor, data: Tensor) -> None:
    """Write data [L, n, ...] into layers [L, num_blocks, ...]."""
    copy_pieces(layers, data.contiguous(), block_ids, len(block_ids), len(layers), scatter=True)


def copy_pieces(
    pool: Tensor,
    flat: Tensor,
    ids: Tensor,
    num_blocks: int,
    num_layers: int,
    *,
    first_layer: int = 0,
    flat_offset: int = 0,
    first_id: int = 0,
    heads: HeadRange | None = None,
    scatter: bool,
) -> None:
    """Blocks of a pool [L, num_pool_blocks, ..., num_heads, head_dim] to or from a contiguous [num_layers, num_blocks,
    ...].

    Args:
        heads: that are copied, and that ``flat`` has; None: all.
        flat: holds it from element flat_offset on, which is a multiple of 16. ids: [n] int64, from first_id on.
    """
    if not num_blocks or not num_layers:
        return
    numel = run = row = pool.stride(1)
    skip = 0
    if heads is not None and heads.num_heads < pool.shape[-2]:
        head_dim, row = pool.shape[-1], pool.shape[-2] * pool.shape[-1]
        run, skip = heads.num_heads * head_dim, heads.start * head_dim
        numel = numel // row * run
    assert flat_offset % 16 == 0, flat_offset
    copy_kernel[(triton.cdiv(numel, PIECE) * num_blocks * num_layers,)](
        pool, flat, ids, pool.stride(0), first_layer, flat_offset, first_id, num_blocks,
        NUMEL=numel, PIECE=PIECE, SCATTER=scatter, RUN=run, ROW=row, SKIP=skip,
    )  # fmt: skip
