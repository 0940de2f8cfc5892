"""Collective operations of processes with a GPU each: by NCCL, and small sums by a kernel of ours."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pdray.kernels.collective.copied_sums import CopiedSums, open_copied_sums
from pdray.kernels.collective.group import PendingSum, RankGroup
from pdray.kernels.collective.one_shot import OneShot, open_one_shot
from pdray.kernels.crossover import ONE_SHOT_MAX_BYTES

logger = logging.getLogger(__name__)

TYPES = {torch.int64: 4, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # of nccl.h; cupy does not name all
SUM = 0


def make_unique_id() -> Any:
    """Names a new group: for one rank to make, and all to have. bytes, or of cupy before 14 numbers."""
    from cupy.cuda import nccl

    return nccl.get_unique_id()


class NcclGroup(RankGroup):
    """See RankGroup. The constructor blocks until all ranks are there, forever if one never comes.

    Args:
        one_shot_bytes: what a rank sends for a sum that is made by one kernel, at most, where the ranks can write each
            other's memory. 0: all sums are NCCL's, those by copies too.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        unique_id: Any,
        device: torch.device,
        one_shot_bytes: int = ONE_SHOT_MAX_BYTES,
    ) -> None:
        from cupy.cuda import nccl

        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
        self.rank, self.size = rank, size
        self._grouped = nccl.groupStart, nccl.groupEnd
        self._inner: Any = nccl.NcclCommunicator(size, unique_id, rank)
        # Its kernels come before those that run beside them: a product would fill the device.
        self._beside = torch.cuda.Stream(device, priority=-1)
        self._one_shot: OneShot | None = None
        self._copied: CopiedSums | None = None
        self._device, self._may_write_others = device, one_shot_bytes > 0
        if one_shot_bytes and size > 1:
            opened = open_one_shot(self, one_shot_bytes // (size - 1), device)
            if isinstance(opened, str):
                logger.warning("rank %d: all sums are NCCL's: %s", rank, opened)
            else:
                self._one_shot = opened

    def sum(self, x: Tensor) -> Tensor:
        """See RankGroup."""
        assert x.is_contiguous()
        if self._one_shot is not None and self._one_shot.takes(x):
            self._one_shot.sum(x)
        elif x.numel():
            self._all_reduce(x, _stream())
        return x

    def reserve(self, num_bytes: int) -> None:
        """See RankGroup."""
        if not self._may_write_others:
            return
        opened = open_copied_sums(self, num_bytes, self._device)
        if isinstance(opened, str):
            logger.info("rank %d: sums beside other work are NCCL's: %s", self.rank, opened)
        else:
            self._copied = opened

    def begin_sum(self, x: Tensor) -> PendingSum:
        """See RankGroup."""
        assert x.is_contiguous()
        if self._copied is not None and self._copied.takes(x):
            return self._copied.begin(x)
        if not x.numel():
            return PendingSum.made(x)
        self._beside.wait_stream(torch.cuda.current_stream())
        self._all_reduce(x, int(self._beside.cuda_stream))
        summed = self._beside.record_event()

        def finish() -> Tensor:
            torch.cuda.current_stream().wait_event(summed)
            return x

        return PendingSum(finish)

    def _all_reduce(self, x: Tensor, stream: int) -> None:
        pointer = x.data_ptr()
        self._inner.allReduce(pointer, pointer, x.numel(), TYPES[x.dtype], SUM, stream)

    def broadcast(self, x: Tensor) -> None:
        """See RankGroup."""
        assert x.is_contiguous()
        pointer = x.data_ptr()
        self._inner.broadcast(pointer, pointer, x.numel(), TYPES[x.dtype], 0, _stream())

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """See RankGroup."""
        assert x.is_contiguous()
        count, kind, stream = x.numel(), TYPES[x.dtype], _stream()
        if self.rank:
            self._inner.send(x.data_ptr(), count, kind, 0, stream)
            return None
        others = [torch.empty_like(x) for _ in range(1, self.size)]
        start, end = self._grouped
        start()
        for rank, part in enumerate(others, 1):
            self._inner.recv(part.data_ptr(), count, kind, rank, stream)
        end()
        return [x, *others]


def _stream() -> int:
    """The current one, as NCCL knows it."""
    return int(torch.cuda.current_stream().cuda_stream)
