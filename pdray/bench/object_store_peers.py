"""The receiving end of an object store channel without an engine."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch

from pdray.bench.transfer_peers import PoolSpec
from pdray.transfer.channel import Put
from pdray.transfer.object_store import ObjectStoreReceiver
from pdray.transfer.pending_writes import PendingWrites


class ObjectStorePeer:
    """A Ray actor that takes whatever it is sent, as a decode worker does. BlockSink of its own."""

    def __init__(self, spec: PoolSpec) -> None:
        torch.set_num_threads(1)
        self.pool = spec.allocate()
        self._receiver = ObjectStoreReceiver(self.pool, self, PendingWrites())

    def random(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.empty_like(self.pool, dtype=torch.int16).random_(-(2**15), 2**15, generator=generator)

    def filled(self, seed: int) -> np.ndarray[Any, Any]:
        """A pool as a sender's: [the pool's shape] int16."""
        array: np.ndarray[Any, Any] = self.random(seed).numpy()
        return array

    async def receive_blocks(
        self,
        worker_id: str,
        epoch: int,
        key: Any,
        layers: tuple[int, int],
        blocks: list[int],
        array: np.ndarray[Any, Any],
    ) -> bool:
        return await self._receiver.receive(worker_id, epoch, Put(key, range(*layers), [], blocks), array)

    def may_write(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        return True

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        return True

    def holds(self, seed: int, source: list[int], destination: list[int]) -> bool:
        """As ReceivingPeer.holds()."""
        mine = self.pool.view(torch.int16)[:, destination].clone()
        self.pool[:, destination] = 0
        is_clean = not self.pool.view(torch.int16).any()
        self.pool.zero_()
        return bool(is_clean) and torch.equal(self.random(seed)[:, source], mine)
