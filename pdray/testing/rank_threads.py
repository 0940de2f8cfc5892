"""Ranks as threads of one process, for tests of what each of them computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from pdray.kernels.collective.group import PendingSum, RankGroup
from pdray.testing.patience import PATIENCE_S

T = TypeVar("T")


class ThreadGroup(RankGroup):
    """One rank of several threads; see run_ranks()."""

    def __init__(self, rank: int, size: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._slots = slots
        self._barrier = barrier

    def sum(self, x: Tensor) -> Tensor:
        """See RankGroup."""
        return torch.stack(self._exchange(x)).sum(0)

    def begin_sum(self, x: Tensor) -> PendingSum:
        """See RankGroup. Nothing is there before somebody waits."""
        part = x.clone()
        x.fill_(torch.nan)
        return PendingSum(lambda: self.sum(part))

    def broadcast(self, x: Tensor) -> None:
        """See RankGroup."""
        x.copy_(self._exchange(x)[0])

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """See RankGroup."""
        parts = self._exchange(x)
        return parts if self.rank == 0 else None

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(PATIENCE_S)
        parts = list(self._slots)
        self._barrier.wait(PATIENCE_S)
        assert len({part.shape for part in parts}) == 1, "ranks differ in what they do"
        return parts

    def abort(self) -> None:
        """Let no other rank wait for this one."""
        self._barrier.abort()


def run_ranks(size: int, run: Callable[[RankGroup], T]) -> list[T]:
    """What ``run`` returns on each of so many ranks. Raises what it raises on one of them."""
    slots, barrier = [torch.empty(0)] * size, threading.Barrier(size)

    def of_rank(rank: int) -> T:
        group = ThreadGroup(rank, size, slots, barrier)
        try:
            return run(group)
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(size) as executor:
        futures = [executor.submit(of_rank, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
