"""Writing blocks of one KV pool straight into a pool of the same layout that another process has lent to this one.

Nothing is packed and nobody receives: the lender need not even run. Once the work has passed on the writer's stream,
every kernel that the lender launches later sees the blocks.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor


class PeerBlocks(NamedTuple):
    """A pool [num_layers, num_blocks, ...] that this process can address, and may not own.

    Attributes:
        address: of its first byte, a multiple of 16. num_blocks: the dummy block included.
    """

    address: int
    num_blocks: int


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
    if kv.is_cuda:
        from pdray.kernels.kv.peer_write_triton import triton_write_peer_blocks

        return triton_write_peer_blocks(kv, layers, block_ids, peer, num_programs)
    num_bytes = kv.shape[0] * peer.num_blocks * kv[0, 0].numel() * kv.element_size()
    memory = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(peer.address), dtype=torch.uint8)
    target = memory.view(kv.dtype).view(kv.shape[0], peer.num_blocks, *kv.shape[2:])
    source_ids, target_ids = block_ids.long()
    picked = slice(layers.start, layers.stop)
    target[picked].index_copy_(1, target_ids, kv[picked].index_select(1, source_ids))
