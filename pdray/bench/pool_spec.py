"""The pool at either end of a channel that is measured, or checked, without engines."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool

BLOCK_SIZE = 16


class PoolSpec(NamedTuple):
    """A pool of bfloat16, the channel kind before it, and who its owner is.

    Attributes:
        block_bytes: of one layer.
        kind: of channel. staging_bytes: transfer_staging_bytes.
        num_heads: of keys and values. num_ranks: that share them; see pdray.bench.transfer_ranks. num_peer_ranks: at
            the other end.
        timeout_s: of sessions and transfers.
    """

    name: str
    num_layers: int
    num_blocks: int
    block_bytes: int
    secret: bytes
    kind: str = "nccl"
    staging_bytes: int | None = None
    timeout_s: float = 2.0
    device: str = "cuda"
    num_heads: int = 1
    num_ranks: int = 1
    num_peer_ranks: int = 1

    @property
    def head_dim(self) -> int:
        return self.block_bytes // (2 * BLOCK_SIZE * self.num_heads * torch.bfloat16.itemsize)

    def allocate(self, spare_bytes: int) -> KVPool:
        """Of one rank."""
        layout = KVLayout(self.num_layers, BLOCK_SIZE, self.num_heads, self.head_dim, torch.bfloat16)
        return KVPool.allocate(layout, self.num_blocks, torch.device(self.device), spare_bytes=spare_bytes)
