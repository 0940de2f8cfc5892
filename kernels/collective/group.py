"""What the ranks of one worker do together: the contract of its three operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from pdray.kernels.crossover import HALVES_MIN_BYTES
from pdray.kernels.elementwise.rms_norm import rms_norm


class PendingSum:
    """A sum that the ranks are making. Until it was waited for, nothing may touch its tensor, nor end its life.

    Args:
        finish: returns the sum; on CUDA, launches what makes the current stream wait for it.
    """

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish
        self._total: Tensor | None = None

    @classmethod
    def made(cls, total: Tensor) -> PendingSum:
        """One that nobody needs to wait for."""
        return cls(lambda: total)

    def wait(self) -> Tensor:
        """The sum. On CUDA the stream waits, not the host."""
        if self._total is None:
            self._total = self._finish()
        return self._total

    def arrive(self) -> None:
        """Launch nothing more before all ranks have made their parts."""
        self.wait()

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """rms_norm() of the sum, which the first one to wait may make in the same go."""
        return rms_norm(self.wait(), weight, eps)


class RankGroup(ABC):
    """Processes that compute one model together, each a part of it.

    All ranks call the same methods in the same order, with tensors of the same shape and dtype, from one thread each; a
    call that one of them leaves out blocks the others. On CUDA everything is launched on the current stream, nothing
    waits, and all of it can be captured. A rank's death is not a result: see whoever watches the processes.

    Attributes:
        rank: this process's, from 0. size: number of ranks.
        halves_bytes: rows whose sums have so many are computed in two halves, each while the other's sum is made; the
            same on all ranks, which would otherwise call other methods.
    """

    rank: int
    size: int
    halves_bytes: int = HALVES_MIN_BYTES

    @abstractmethod
    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, the same bits on each. The memory of ``x``, contiguous, may hold the result."""

    def reserve(self, num_bytes: int) -> None:  # noqa: B027
        """Prepare for begin_sum() of so many bytes; for all ranks at once, before the first. May take device memory."""

    def begin_sum(self, x: Tensor) -> PendingSum:
        """sum(), of which the current stream has only the beginning: what is launched next runs beside it."""
        return PendingSum.made(self.sum(x))

    @abstractmethod
    def broadcast(self, x: Tensor) -> None:
        """Overwrite ``x``, contiguous, with that of rank 0."""

    @abstractmethod
    def gather(self, x: Tensor) -> list[Tensor] | None:
        """All ranks' ``x``, contiguous, in their order, on rank 0; None on the others."""
