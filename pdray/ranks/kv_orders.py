"""KV orders: what rank 0 has the other ranks copy out of, or into, their pools. One at a time for each rank."""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection

import msgspec
import torch

from pdray.background import start_thread
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.engine.ranks.shared_memory import SharedMemory
from pdray.errors import describe_error
from pdray.transfer.pool_blocks import PoolBlocks

PIECE_BYTES = 8 * 2**20  # of one rank's staging memory; at least one block of all layers


class KVOrder(msgspec.Struct, frozen=True, array_like=True):
    """Copy blocks of layers [first_layer, last_layer) between the pool and this rank's staging memory.

    They lie there as gather_blocks() returns them.

    Attributes:
        writes: into the pool; else out of it.
    """

    writes: bool
    first_layer: int
    last_layer: int
    block_ids: list[int]


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(KVOrder).decode


class Staging:
    """Host memory through which the blocks of all ranks but 0 pass; each rank has a piece of it.

    Args:
        memory: of which every rank takes this after the same others.
        layout: of one rank.
    """

    def __init__(self, memory: SharedMemory, layout: KVLayout, num_ranks: int) -> None:
        self._layout = layout
        num_bytes = max(PIECE_BYTES, layout.block_bytes)
        self._pieces = memory.take((num_ranks - 1) * num_bytes).view(num_ranks - 1, num_bytes)

    def max_blocks(self, num_layers: int) -> int:
        """Blocks of so many layers that one order can name."""
        return self._pieces.shape[1] // (num_layers * self._layout.layer_block_bytes)

    def of(self, rank: int, num_layers: int, num_blocks: int) -> torch.Tensor:
        """[num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim] of that rank."""
        shape = num_layers, num_blocks, *self._layout.block_shape
        num_bytes = num_layers * num_blocks * self._layout.layer_block_bytes
        return self._pieces[rank - 1, :num_bytes].view(self._layout.dtype).view(shape)


class KVFollower:
    """Carries out KV orders on a thread of its own, beside the steps of this rank.

    It waits for no step: rank 0 asks for what a step has stored only once the ranks' sums in the same layer have been
    made, and says that blocks are written before it launches a step that reads them.

    Args:
        connection: orders come by it, and are answered: nothing, or why it could not be.
    """

    def __init__(self, rank: int, pool: KVPool, staging: Staging, connection: Connection) -> None:
        self._rank = rank
        self._blocks = PoolBlocks(pool.tensor)
        self._staging = staging
        self._connection = connection
        self._thread = start_thread("kv-orders", self._follow, self._failed)

    def _follow(self) -> None:
        try:
            while True:
                order = decode(self._connection.recv_bytes())
                self._connection.send_bytes(self._carry_out(order).encode())
        except (EOFError, OSError):
            pass  # rank 0 is gone, or takes its leave

    def _carry_out(self, order: KVOrder) -> str:
        layers = range(order.first_layer, order.last_layer)
        piece = self._staging.of(self._rank, len(layers), len(order.block_ids))
        try:
            if order.writes:
                self._blocks.write(layers, order.block_ids, piece)
            else:
                piece.copy_(self._blocks.read(layers, order.block_ids))
        except Exception as error:
            traceback.print_exc()
            return describe_error(error)
        return ""

    @staticmethod
    def _failed(error: BaseException) -> None:
        """A rank without this thread is none: rank 0 would wait for its answers."""
        print(f"error: KV orders are not followed any more: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
