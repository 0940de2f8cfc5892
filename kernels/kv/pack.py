"""Packing blocks of the KV pool into memory that is already there, and unpacking them.

Unlike gather_blocks() and scatter_blocks(), neither allocates on the device nor makes the host wait: a channel calls
them while a transfer is in flight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_blocks(kv: Tensor, layers: range, block_ids: Tensor, out: Tensor) -> None:
    """Copy blocks of some layers out of the pool, on the current stream.

    Args:
        kv: the pool [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim].
        layers: consecutive layers of it.
        block_ids: [n] int64 on the pool's device.
        out: [len(layers), n, 2, block_size, num_kv_heads, head_dim], contiguous; written.
    """
    source = kv[layers.start : layers.stop]
    if kv.is_cuda:
        from pdray.kernels.kv.blocks_triton import copy_pieces

        return copy_pieces(source, out, block_ids, scatter=False)
    torch.index_select(source, 1, block_ids, out=out)


def unpack_blocks(kv: Tensor, layers: range, block_ids: Tensor, data: Tensor) -> None:
    """Write what pack_blocks() made into blocks of the same layers of this pool, on the current stream."""
    target = kv[layers.start : layers.stop]
    if kv.is_cuda:
        from pdray.kernels.kv.blocks_triton import triton_scatter_blocks

        return triton_scatter_blocks(target, block_ids, data)
    target.index_copy_(1, block_ids, data)
