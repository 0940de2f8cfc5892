"""What a rank other than 0 does of one nccl channel of its prefill worker: it sends its heads when rank 0 asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from pdray.errors import TransferError, describe_error
from pdray.transfer.channel import FinishAnswer
from pdray.transfer.nccl.communicator import SENDER_RANK, GuardedCommunicator, Transport, run_all
from pdray.transfer.nccl.opening import Opening
from pdray.transfer.nccl.rank_orders import OpenSends
from pdray.transfer.nccl.send_lane import SendLane
from pdray.transfer.nccl.staging import Staging
from pdray.transfer.nccl.threads import PollingThread, Watchdog


class RankSends:
    """Begins to connect. One thread drives all lanes, and a watchdog ends what does not get on.

    Methods belong to the thread of channel orders, but for close().

    Args:
        stagings: one for each lane, this channel's alone until close() has returned.
        timeout_s: sends that do not get on for so long fail.
    """

    def __init__(self, order: OpenSends, stagings: list[Staging], transport: Transport, timeout_s: float) -> None:
        self._order = order
        self._stagings = stagings
        self._transport = transport
        self._timeout_s = timeout_s
        self._name = f"{order.peer}-{order.epoch}"
        self._opening = Opening([partial(transport.connect, each, SENDER_RANK) for each in order.unique_ids])
        self._lanes: list[SendLane] = []
        self._thread: PollingThread | None = None
        self._watchdog: Watchdog | None = None
        self._num_asked = 0
        self._progress_at = 0.0
        self._error: str | None = None
        self._close_lock = threading.Lock()
        self._is_closing = False

    def finish_opening(self) -> bytes | None:
        """A FinishAnswer: once all lanes are connected."""
        communicators = self._opening.finish()
        if communicators is None:
            return None
        if self._is_closing:
            raise TransferError("closed before it was open")
        self._lanes = [self._lane(each, staging) for each, staging in zip(communicators, self._stagings, strict=True)]
        self._watchdog = Watchdog(f"nccl-send-watch-{self._name}", self._expired)
        self._thread = PollingThread(f"nccl-send-{self._name}", self._poll, self._failed)
        return b""

    def _lane(self, communicator: GuardedCommunicator, staging: Staging) -> SendLane:
        order, new_stream = self._order, self._transport.new_stream
        return SendLane(staging, communicator, new_stream, epoch=order.epoch, piece_bytes=order.piece_bytes)

    def send(self, layers: range, blocks: list[int]) -> FinishAnswer:
        """Send these blocks by all lanes; see SendLane.send()."""
        if self._thread is None or self._is_closing:
            raise TransferError(f"the channel to {self._name} is not open")
        self._num_asked += 1
        number = self._num_asked
        self._thread.post(lambda: self._begin(layers, blocks))

        def finish() -> bytes | None:
            if self._error is not None:
                raise TransferError(self._error)
            return b"" if all(lane.num_sent >= number for lane in self._lanes) else None

        return finish

    def begin_closing(self) -> Callable[[], None]:
        """Refuse what follows. Returns what does the rest, on any thread but this one."""
        self._is_closing = True
        return self._close

    def _close(self) -> None:
        """Idempotent; returns when nothing is sent any more. Takes about half a second.

        Raises:
            TransferError: the device still holds what was enqueued.
        """
        with self._close_lock:
            self._error = self._error or "closed"
            self._opening.give_up()
            if self._thread is not None and self._watchdog is not None:
                self._thread.stop()
                self._watchdog.stop()
                for lane in self._lanes:
                    lane.close(self._name)
                self._thread = None

    # the channel's thread

    def _begin(self, layers: range, blocks: list[int]) -> None:
        if not self._is_busy:
            self._progress_at = time.monotonic()
        for lane in self._lanes:
            lane.send(layers, blocks)

    def _poll(self) -> bool:
        got_on = [lane.poll() for lane in self._lanes]
        if any(got_on):
            self._progress_at = time.monotonic()
        self._watch()  # a send can hang
        for lane in self._lanes:
            lane.start()
        self._watch()
        return self._is_busy

    @property
    def _is_busy(self) -> bool:
        return any(lane.is_busy for lane in self._lanes)

    def _watch(self) -> None:
        assert self._watchdog is not None
        self._watchdog.set(self._progress_at + self._timeout_s if self._is_busy else None)

    def _failed(self, error: BaseException) -> None:
        self._fail(describe_error(error))

    def _expired(self) -> None:
        """The watchdog's thread."""
        self._fail(f"a transfer did not get on for {self._timeout_s:g} s (worker_timeout_s)")

    def _fail(self, reason: str) -> None:
        """Abort; then rank 0 is told, and closes the channel."""
        try:
            run_all([lane.communicator.close for lane in self._lanes])
        finally:
            self._error = self._error or reason
