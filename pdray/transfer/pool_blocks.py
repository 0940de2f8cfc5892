"""Blocks of a worker with all their heads, on the host: what a channel that goes by the host reads and writes."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch

from pdray.kernels.kv.blocks import gather_blocks, scatter_blocks
from pdray.transfer.streams import CudaStream


class WholeBlocks(Protocol):
    """For any thread but the event loop's: both methods wait for the device, on a stream of its own."""

    def read(self, layers: range, block_ids: list[int], ready: Any = None) -> torch.Tensor:
        """[len(layers), len(block_ids), 2, block_size, num_kv_heads, head_dim] on the host, of the pool's dtype.

        Args:
            ready: on CUDA, the event after which the blocks are final; None: they are.
        """
        ...

    def write(self, layers: range, block_ids: list[int], data: torch.Tensor) -> None:
        """What read() returned for as many blocks. They are in the pool when it returns.

        Raises:
            ValueError: the data has another shape or dtype.
        """
        ...


class PoolBlocks:
    """WholeBlocks of one process's pool.

    Args:
        kv: the pool [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim].
    """

    def __init__(self, kv: torch.Tensor) -> None:
        self._kv = kv
        self._stream = CudaStream(kv.device) if kv.is_cuda else None
        self._lock = threading.Lock()  # a stream is one thread's at a time

    def read(self, layers: range, block_ids: list[int], ready: Any = None) -> torch.Tensor:
        """See WholeBlocks."""
        if self._stream is None:
            return gather_blocks(self._kv, layers, block_ids)
        blocks: list[torch.Tensor] = []
        with self._lock:
            if ready is not None:
                self._stream.wait(ready)
            self._stream.run(lambda: blocks.append(gather_blocks(self._kv, layers, block_ids).cpu()))
        return blocks[0]

    def write(self, layers: range, block_ids: list[int], data: torch.Tensor) -> None:
        """See WholeBlocks."""
        if self._stream is None:
            return scatter_blocks(self._kv, layers, block_ids, data)
        with self._lock:
            self._stream.run(lambda: scatter_blocks(self._kv, layers, block_ids, data))
            self._stream.synchronize()
