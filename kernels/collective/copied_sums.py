"""Sums of two ranks that take no multiprocessor while they wait: copy engines carry each rank's part to the other.

A product fills the device, and a kernel that sums beside it would take multiprocessors away from it. Here each rank has
its part copied into the other's memory, and one addition of both parts follows when the sum is waited for.
The ranks tell each other by two words for each place: that it is full, and that it is free again. A stream waits for
a word to be 1 and sets it to 0; the other rank sets it to 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdray.kernels.collective.group import PendingSum, RankGroup
from pdray.kernels.collective.peer_memory import PeerMemory, agree, map_everywhere
from pdray.kernels.elementwise.rms_norm import rms_norm

NUM_PLACES = 2  # sums that have begun and were not waited for, at most
WAIT_EQUAL, WRITE_DEFAULT = 1, 0  # of cuda.h: CU_STREAM_WAIT_VALUE_EQ, CU_STREAM_WRITE_VALUE_DEFAULT
WORD = 4  # bytes


class _CopiedSum(PendingSum):
    """Both ranks' parts, the other's on its way.

    Args:
        arrive: makes the current stream wait for the other rank's part, and returns it. release: lets its place go.
    """

    def __init__(self, own: Tensor, arrive: Callable[[], Tensor], release: Callable[[], None]) -> None:
        super().__init__(self._add)
        self._own, self._arrive, self._release = own, arrive, release

    def _add(self) -> Tensor:
        self._own.add_(self._arrive())
        self._release()
        return self._own

    def arrive(self) -> None:
        """See PendingSum."""
        self._arrive()

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """See PendingSum."""
        if self._total is not None:
            return rms_norm(self._total, weight, eps)
        normed = rms_norm(self._own, weight, eps, self._arrive())
        self._release()
        self._total = self._own
        return normed


class CopiedSums:
    """Begins sums on streams of its own. Both ranks call in the same order; see open_copied_sums().

    Args:
        driver: cuda.bindings.driver, or what stands for it.
        places: [NUM_PLACES, num_bytes] uint8, which the other rank fills. flags: address of this rank's words: "full"
            of each place, "free" of each of the other's, and two to spare.
        their_places, their_flags: the other rank's, as this one can write them.
    """

    def __init__(self, driver: Any, places: Tensor, flags: int, their_places: int, their_flags: int) -> None:
        self._driver = driver
        self._places = places
        self._flags = flags
        self._their_places, self._their_flags = their_places, their_flags
        self._streams = [torch.cuda.Stream(places.device) for _ in range(NUM_PLACES)]
        self._turn = 0

    def takes(self, x: Tensor) -> bool:
        """Whether it fits a place. None does while a graph is captured."""
        fits = 0 < x.numel() * x.element_size() <= self._places.shape[1]
        return fits and not torch.cuda.is_current_stream_capturing()

    def begin(self, x: Tensor) -> PendingSum:
        """See RankGroup.begin_sum; ``x`` is one that takes() takes, and no more than NUM_PLACES are pending."""
        place, num_bytes = self._turn, x.numel() * x.element_size()
        self._turn = (place + 1) % NUM_PLACES
        stream, full, free = self._streams[place], WORD * place, WORD * (NUM_PLACES + place)
        stream.wait_stream(torch.cuda.current_stream())
        self._await(stream, self._flags + free)
        theirs = self._their_places + place * self._places.shape[1]
        _check(self._driver.cuMemcpyAsync(theirs, x.data_ptr(), num_bytes, stream.cuda_stream))
        self._write(stream, self._their_flags + full, 1)
        self._await(stream, self._flags + full)
        arrived = stream.record_event()
        part = self._places[place, :num_bytes].view(x.dtype).view(x.shape)

        def arrive() -> Tensor:
            torch.cuda.current_stream().wait_event(arrived)
            return part

        def release() -> None:
            self._write(torch.cuda.current_stream(), self._their_flags + free, 1)

        return _CopiedSum(x, arrive, release)

    def obstacle(self) -> str:
        """What the driver says to all that a sum launches; "": nothing. It needs no other rank, and waits."""
        stream, spare = self._streams[0], WORD * 2 * NUM_PLACES
        try:
            self._write(stream, self._their_flags + spare + WORD, 1)
            self._write(stream, self._flags + spare, 1)
            self._await(stream, self._flags + spare)
            _check(self._driver.cuMemcpyAsync(self._their_places, self._places.data_ptr(), WORD, stream.cuda_stream))
            stream.synchronize()
        except RuntimeError as error:
            return str(error)
        return ""

    def _await(self, stream: torch.cuda.Stream, address: int) -> None:
        _check(self._driver.cuStreamWaitValue32(stream.cuda_stream, address, 1, WAIT_EQUAL))
        self._write(stream, address, 0)

    def _write(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        _check(self._driver.cuStreamWriteValue32(stream.cuda_stream, address, value, WRITE_DEFAULT))


def open_copied_sums(group: RankGroup, num_bytes: int, device: torch.device) -> CopiedSums | str:
    """Exchange memory with the other rank; the same outcome on both. Launches on the current stream, and waits for it.

    Args:
        num_bytes: of the largest sum.

    Returns:
        Why it cannot be, if there are more than two ranks, or they cannot write each other's memory.
    """
    if group.size != 2:
        return f"{group.size} ranks: copies would carry more than NCCL does"
    driver, obstacle = None, ""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        obstacle = f"no cuda.bindings ({error}); install pdray[cuda13] or pdray[cuda12]"
    words = torch.tensor([0] * NUM_PLACES + [1] * NUM_PLACES + [0, 0], dtype=torch.int32, device=device)
    places, flags = PeerMemory(NUM_PLACES * num_bytes, device), PeerMemory(len(words) * WORD, device)
    flags.tensor.view(torch.int32).copy_(words)
    mapped = map_everywhere(group, [places, flags], obstacle)
    if isinstance(mapped, str):
        return mapped
    other = 1 - group.rank
    own = places.tensor.view(NUM_PLACES, num_bytes)
    sums = CopiedSums(driver, own, flags.address, mapped[0][other], mapped[1][other])
    return agree(group, sums.obstacle(), device) or sums


def _check(result: Any) -> None:
    if int(result[0]):
        raise RuntimeError(f"a stream cannot wait for, or write, another rank's memory: {result[0]}")
