"""Collective operations of processes on CPU, by torch's Gloo over loopback."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, FileStore, GatherOptions, ProcessGroupGloo

from pdray.kernels.collective.group import PendingSum, RankGroup

LOOPBACK = "127.0.0.1"
TIMEOUT_S = 600.0  # of one operation: a rank that is gone closes its connections, which is an error at once


class GlooGroup(RankGroup):
    """See RankGroup.

    Sums are made of all ranks' parts in their order: an element's rounding depends on nothing but its parts, whatever
    else is in the batch. Between two ranks that is also as much traffic as an all-reduce, in one round instead of two.

    Args:
        store_file: of one group, and new: the ranks find each other by it.

    Raises:
        RuntimeError: from every method: another rank is gone.
    """

    def __init__(self, rank: int, size: int, store_file: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.size = rank, size
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = timedelta(seconds=timeout_s)
        self._group: Any = ProcessGroupGloo(FileStore(store_file, size), rank, size, options)

    def sum(self, x: Tensor) -> Tensor:
        """See RankGroup."""
        return self.begin_sum(x).wait()

    def begin_sum(self, x: Tensor) -> PendingSum:
        """See RankGroup."""
        if not x.numel() or self.size == 1:
            return PendingSum.made(x)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        exchange = self._group.allgather([parts], [x])

        def finish() -> Tensor:
            exchange.wait()
            total = torch.add(parts[0], parts[1], out=x)
            for part in parts[2:]:
                total += part
            return total

        return PendingSum(finish)

    def broadcast(self, x: Tensor) -> None:
        """See RankGroup."""
        self._group.broadcast([x], BroadcastOptions()).wait()

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """See RankGroup."""
        is_first = self.rank == 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if is_first else []
        self._group.gather([parts] if is_first else [], [x], GatherOptions()).wait()
        return parts if is_first else None
