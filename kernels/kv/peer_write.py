"""Writing blocks of one KV pool straight into a pool that another process has lent to this one.

The two have the same layout but for heads: where one has fewer, those that it has are written.

Nothing is packed and nobody receives: the lender need not even run. Once the work has passed on the writer's stream,
every kernel that the lender launches later sees the blocks.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BYTES = 8  # that are moved at once


class HeadMove(NamedTuple):
    """Heads of one pool, from ``source`` on, that go to a pool of ``num_targets`` heads, from ``target`` on."""

    source: int
    target: int
    num_heads: int
    num_targets: int


class PeerBlocks(NamedTuple):
    """A pool [num_layers, num_blocks, ...] that this process can address, and may not own.

    Attributes:
        address: of its first byte, a multiple of 16. num_blocks: the dummy block included.
        heads: that are written; the others stay as they are. None: all, and both pools have the same.
    """

    address: int
    num_blocks: int
    heads: HeadMove | None = None


def write_peer_blocks(
    kv: Tensor, layers: range, block_ids: Tensor, peer: PeerBlocks, *, num_programs: int | None = None
) -> None:
    """Copy blocks of some layers into other blocks of the same layers of the peer, on the current stream.

    Neither allocates on the device nor makes the host wait.

    Args:
        kv: the pool to read [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim].
        layers: consecutive layers of it.
        block_ids: [2, n] int32 on the pool's device: blocks to read, and for each the block to write. The latter are
            distinct, and the caller has checked them: nothing here knows what the peer may hold.
        num_programs: how much of the device may work on it (CUDA); default: all of it.
    """
    assert kv.is_contiguous() and block_ids.shape[0] == 2 and peer.address % 16 == 0
    if peer.heads is not None:
        assert peer.heads.num_heads * kv.shape[-1] * kv.element_size() % WORD_BYTES == 0, "heads are moved in words"
    if kv.is_cuda:
        from pdray.kernels.kv.peer_write_triton import triton_write_peer_blocks

        return triton_write_peer_blocks(kv, layers, block_ids, peer, num_programs)
    num_heads = kv.shape[-2]
    move = peer.heads or HeadMove(0, 0, num_heads, num_heads)
    shape = kv.shape[0], peer.num_blocks, *kv.shape[2:-2], move.num_targets, kv.shape[-1]
    num_bytes = math.prod(shape) * kv.element_size()
    memory = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(peer.address), dtype=torch.uint8)
    target = memory.view(kv.dtype).view(shape)[layers.start : layers.stop]
    source_ids, target_ids = block_ids.long()
    data = kv[layers.start : layers.stop].index_select(1, source_ids).narrow(-2, move.source, move.num_heads)
    target.narrow(-2, move.target, move.num_heads).index_copy_(1, target_ids, data)
