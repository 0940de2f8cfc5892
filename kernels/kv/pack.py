"""Packing blocks of the KV pool into memory that is already there, and unpacking them.

Unlike gather_blocks() and scatter_blocks(), neither allocates on the device nor makes the host wait: a channel calls
them while a transfer is in flight. Both take whole buffers and places in them: a view costs the host as much as a call.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class HeadRange(NamedTuple):
    """``num_heads`` heads of a pool, from ``start`` on."""

    start: int
    num_heads: int


class PackedBlocks(NamedTuple):
    """Some blocks of some layers, side by side in a flat buffer: [num_layers, num_blocks, 2, block_size, num_heads,
    head_dim].

    Attributes:
        flat: [num_elements], of the pool's dtype and on its device. offset: of their first element there.
        ids: [n] int64, on the device. first_id: of the first block's id there. num_blocks: how many.
        heads: of the pool, that are there; None: all.
    """

    flat: Tensor
    offset: int
    ids: Tensor
    first_id: int
    num_blocks: int
    heads: HeadRange | None = None


def pack_blocks(kv: Tensor, layers: range, packed: PackedBlocks) -> None:
    """Copy blocks of some layers out of the pool, on the current stream.

    Args:
        kv: the pool [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim].
        layers: consecutive layers of it.
        packed: where they go; written.
    """
    _copy(kv, layers, packed, scatter=False)


def unpack_blocks(kv: Tensor, layers: range, packed: PackedBlocks) -> None:
    """Write what pack_blocks() made into blocks of the same layers of this pool, on the current stream."""
    _copy(kv, layers, packed, scatter=True)


def _copy(kv: Tensor, layers: range, packed: PackedBlocks, *, scatter: bool) -> None:
    flat, offset, ids, first_id, num_blocks, heads = packed
    if kv.is_cuda:
        from pdray.kernels.kv.blocks_triton import copy_pieces

        return copy_pieces(
            kv, flat, ids, num_blocks, len(layers),
            first_layer=layers.start, flat_offset=offset, first_id=first_id, heads=heads, scatter=scatter,
        )  # fmt: skip
    heads = heads or HeadRange(0, kv.shape[-2])
    pool = kv[layers.start : layers.stop].narrow(-2, *heads)
    shape = (len(layers), num_blocks, *pool.shape[2:])
    data = flat[offset : offset + math.prod(shape)].view(shape)
    block_ids = ids[first_id : first_id + num_blocks]
    if scatter:
        pool.index_copy_(1, block_ids, data)
    else:
        data.copy_(pool.index_select(1, block_ids))
