"""Sums of two ranks that take no multiprocessor while they wait: copy engines carry each rank's part to the other.

A product fills the device, and a kernel that sums beside it would take multiprocessors away from it. Here each rank has
its part copied into the other's memory, and one addition of both parts follows when the sum is waited for.
Each rank counts, in a word of the other's memory, the parts that it has copied there; the stream that adds waits for
that word, and no other does. Nobody says that a place is free again: see NUM_PLACES.
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

NUM_PENDING = 2  # sums that have begun and were not added, at most
# Sum n + 4 has the place of sum n. Who begins it has added sum n + 2, whose other part was sent after its sender had
# added sum n: by then the place is free.
NUM_PLACES = 2 * NUM_PENDING
COUNTED, SPARE, THEIR_SPARE = 0, 4, 8  # bytes: where a rank's words lie
NUM_WORDS, WORD = 3, 4
WAIT_AT_LEAST, WRITE_DEFAULT = 0, 0  # of cuda.h: CU_STREAM_WAIT_VALUE_GEQ (cyclic), CU_STREAM_WRITE_VALUE_DEFAULT


class _CopiedSum(PendingSum):
    """Both ranks' parts, the other's on its way.

    It holds nothing that holds it: a step's parts would live until garbage is collected, which a rank does rarely.

    Args:
        arrive: makes the current stream wait for the other rank's part, and returns it. added: to be called then, once
            what reads it is launched.
    """

    def __init__(self, own: Tensor, arrive: Callable[[], Tensor], added: Callable[[], None]) -> None:
        def add() -> Tensor:
            own.add_(arrive())
            added()
            return own

        super().__init__(add)
        self._own, self._arrive, self._added = own, arrive, added

    def arrive(self) -> None:
        """See PendingSum."""
        self._arrive()

    def normed(self, weight: Tensor, eps: float) -> Tensor:
        """See PendingSum."""
        if self._total is not None:
            return rms_norm(self._total, weight, eps)
        normed = rms_norm(self._own, weight, eps, self._arrive())
        self._added()
        self._total = self._own
        return normed


class CopiedSums:
    """Begins sums on a stream of its own, which waits for no other rank. Both ranks call in the same order.

    See open_copied_sums(). Sums are added in the order in which they have begun, on one stream, or on several of which
    each waits for the one before.

    Args:
        driver: cuda.bindings.driver, or what stands for it.
        places: [NUM_PLACES, num_bytes] uint8, which the other rank fills. words: address of this rank's NUM_WORDS: how
            many parts have come, and two to spare.
        their_places, their_words: the other rank's, as this one can write them.
    """

    def __init__(self, driver: Any, places: Tensor, words: int, their_places: int, their_words: int) -> None:
        self._driver = driver
        self._places = places
        self._words = words
        self._their_places, self._their_words = their_places, their_words
        # Of a high priority, so that it shares no queue of the device with a stream that computes: CUDA has few for
        # each priority, and what waits in one holds up all that is behind it.
        self._stream = torch.cuda.Stream(places.device, priority=-1)
        self._num_begun = self._num_added = 0

    def takes(self, x: Tensor) -> bool:
        """Whether it fits a place. None does while a graph is captured, which would count the same part again."""
        fits = 0 < x.numel() * x.element_size() <= self._places.shape[1]
        return fits and not torch.cuda.is_current_stream_capturing()

    def begin(self, x: Tensor) -> PendingSum:
        """See RankGroup.begin_sum; ``x`` is one that takes() takes, and no more than NUM_PENDING are pending."""
        number, num_bytes = self._num_begun, x.numel() * x.element_size()
        assert number - self._num_added < NUM_PENDING, f"{NUM_PENDING} sums are pending: add the first"
        self._num_begun += 1
        place, stream = number % NUM_PLACES, self._stream
        stream.wait_stream(torch.cuda.current_stream())
        theirs = self._their_places + place * self._places.shape[1]
        _check(self._driver.cuMemcpyAsync(theirs, x.data_ptr(), num_bytes, stream.cuda_stream))
        self._write(stream, self._their_words + COUNTED, number + 1)
        sent = stream.record_event()
        part = self._places[place, :num_bytes].view(x.dtype).view(x.shape)

        def arrive() -> Tensor:
            current = torch.cuda.current_stream()
            current.wait_event(sent)  # before x is overwritten, or its memory
            self._await(current, self._words + COUNTED, number + 1)
            return part

        def added() -> None:
            assert number == self._num_added, f"sum {number} was added before sum {self._num_added}"
            self._num_added += 1

        return _CopiedSum(x, arrive, added)

    def obstacle(self) -> str:
        """What the driver says to all that a sum launches; "": nothing. It needs no other rank, and waits."""
        stream = self._stream
        try:
            self._write(stream, self._their_words + THEIR_SPARE, 1)
            self._write(stream, self._words + SPARE, 1)
            self._await(stream, self._words + SPARE, 1)
            _check(self._driver.cuMemcpyAsync(self._their_places, self._places.data_ptr(), WORD, stream.cuda_stream))
            stream.synchronize()
        except RuntimeError as error:
            return str(error)
        return ""

    def _await(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        _check(self._driver.cuStreamWaitValue32(stream.cuda_stream, address, value % 2**32, WAIT_AT_LEAST))

    def _write(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        _check(self._driver.cuStreamWriteValue32(stream.cuda_stream, address, value % 2**32, WRITE_DEFAULT))


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
    places, words = PeerMemory(NUM_PLACES * num_bytes, device), PeerMemory(NUM_WORDS * WORD, device)
    mapped = map_everywhere(group, [places, words], obstacle)
    if isinstance(mapped, str):
        return mapped
    other = 1 - group.rank
    own = places.tensor.view(NUM_PLACES, num_bytes)
    sums = CopiedSums(driver, own, words.address, mapped[0][other], mapped[1][other])
    return agree(group, sums.obstacle(), device) or sums


def _check(result: Any) -> None:
    if int(result[0]):
        raise RuntimeError(f"a stream cannot wait for, or write, another rank's memory: {result[0]}")
