"""The Triton counterparts of gather_blocks and scatter_blocks: one program for each piece of a block."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096  # elements of a block that one program copies


@triton.jit
def copy_kernel(
    source_ptr,
    destination_ptr,
    block_ids_ptr,
    source_stride_layer,
    destination_stride_layer,
    num_blocks,
    NUMEL: tl.constexpr,  # elements of a block
    PIECE: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Block i of one layer, from pool block block_ids[i] (gather) or into it (scatter)."""
    PIECES: tl.constexpr = (NUMEL + PIECE - 1) // PIECE
    program = tl.program_id(0)  # y and z end at 65,535, and a prompt may have more blocks
    piece = program % PIECES
    i = (program // PIECES % num_blocks).to(tl.int64)
    layer = (program // PIECES // num_blocks).to(tl.int64)
    block = tl.load(block_ids_ptr + i)
    source, destination = block, i
    if SCATTER:
        source, destination = i, block
    element = piece * PIECE + tl.arange(0, PIECE)
    mask = element < NUMEL
    data = tl.load(source_ptr + layer * source_stride_layer + source * NUMEL + element, mask=mask)
    tl.store(destination_ptr + layer * destination_stride_layer + destination * NUMEL + element, data, mask=mask)


def triton_gather_blocks(layers: Tensor, block_ids: Tensor) -> Tensor:
    """layers [L, num_blocks, ...], block_ids [n] int64 → [L, n, ...], contiguous."""
    data = torch.empty(len(layers), len(block_ids), *layers.shape[2:], dtype=layers.dtype, device=layers.device)
    copy_pieces(layers, data, block_ids, scatter=False)
    return data


def triton_scatter_blocks(layers: Tensor, block_ids: Tensor, data: Tensor) -> None:
    """Write data [L, n, ...] into layers [L, num_blocks, ...]."""
    copy_pieces(data.contiguous(), layers, block_ids, scatter=True)


def copy_pieces(source: Tensor, destination: Tensor, block_ids: Tensor, *, scatter: bool) -> None:
    """Blocks of a pool [L, num_blocks, ...] to or from [L, n, ...], either of which may be a part of a larger one."""
    assert source[0].is_contiguous() and destination[0].is_contiguous()
    numel = source[0, 0].numel()
    if len(block_ids) == 0 or len(source) == 0:
        return
    copy_kernel[(triton.cdiv(numel, PIECE) * len(block_ids) * len(source),)](
        source, destination, block_ids, source.stride(0), destination.stride(0), len(block_ids),
        NUMEL=numel, PIECE=PIECE, SCATTER=scatter,
    )  # fmt: skip
