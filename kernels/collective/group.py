"""What the ranks of one worker do together: the contract of its three operations."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class RankGroup(ABC):
    """Processes that compute one model together, each a part of it.

    All ranks call the same methods in the same order, with tensors of the same shape and dtype, from one thread each; a
    call that one of them leaves out blocks the others. On CUDA everything is launched on the current stream, nothing
    waits, and all of it can be captured. A rank's death is not a result: see whoever watches the processes.

    Attributes:
        rank: this process's, from 0. size: number of ranks.
    """

    rank: int
    size: int

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, the same bits on each. The memory of ``x``, contiguous, may hold the result."""

    @abstractmethod
    def broadcast(self, x: Tensor) -> None:
        """Overwrite ``x``, contiguous, with that of rank 0."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor] | None:
        """All ranks' ``x``, contiguous, in their order, on rank 0; None on the others."""
