"""The receiving end of an object store channel without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pdray.bench.transfer_peers import PoolSpec
from pdray.kernels.kv_store import scatter_blocks
from pdray.transfer.object_store import array_to_blocks


class ObjectStoreReceiver:
    """A Ray actor that takes whatever it is sent, as a decode worker does."""

    def __init__(self, spec: PoolSpec) -> None:
        torch.set_num_threads(1)
        self.pool = spec.allocate()

    def random(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.empty_like(self.pool, dtype=torch.int16).random_(-(2**15), 2**15, generator=generator)

    def filled(self, seed: int) -> np.ndarray[Any, Any]:
        """A pool as a sender's: [the pool's shape] int16."""
        array: np.ndarray[Any, Any] = self.random(seed).numpy()
        return array

    def receive_blocks(
        self,
        worker_id: str,
        epoch: int,
        key: Any,
        layers: tuple[int, int],
        blocks: list[int],
        array: np.ndarray[Any, Any],
    ) -> bool:
        scatter_blocks(self.pool, range(*layers), blocks, array_to_blocks(array, self.pool.dtype))
        return True

    def holds(self, seed: int, source: list[int], destination: list[int]) -> bool:
        """As ReceivingPeer.holds()."""
        mine = self.pool.view(torch.int16)[:, destination].clone()
        self.pool[:, destination] = 0
        is_clean = not self.pool.view(torch.int16).any()
        self.pool.zero_()
        return bool(is_clean) and torch.equal(self.random(seed)[:, source], mine)
