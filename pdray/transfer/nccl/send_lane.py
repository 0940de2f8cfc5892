"""What one rank sends to one rank of a receiver: through one communicator, from one staging.

Everything of a put is enqueued at once: its pieces are packed into slots of the staging on one stream and sent on
another, each slot again as soon as the device has sent what it held. Lanes wait for nothing of each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from pdray.transfer.nccl.communicator import GuardedCommunicator
from pdray.transfer.nccl.staging import PROBE_BYTES, Slot, Staging
from pdray.transfer.ring import Region
from pdray.transfer.streams import Event, Stream, drain


class _Sending(NamedTuple):
    """Attributes:
    ids: that nothing needs after it. is_last: of what one call of send() has asked for.
    """

    done: Event
    ids: Region | None
    is_last: bool


class SendLane:
    """One thread at a time; no method but close() waits for the device.

    Args:
        staging: this lane's alone until close() has returned.
        new_stream: makes one; twice.
        piece_bytes: as the receiver was told (OpenCommunicators): both sides cut puts alike.

    Attributes:
        num_sent: calls of send() of which all has been sent.
    """

    def __init__(
        self,
        staging: Staging,
        communicator: GuardedCommunicator,
        new_stream: Callable[[], Stream],
        *,
        epoch: int,
        piece_bytes: int,
    ) -> None:
        assert piece_bytes <= staging.piece_bytes
        self.staging = staging
        self.communicator = communicator
        self.num_sent = 0
        self._epoch = epoch
        self._piece_bytes = piece_bytes
        self._pack_stream, self._send_stream = new_stream(), new_stream()
        self._to_send: deque[Iterator[None]] = deque()
        self._sending: deque[_Sending] = deque()  # by piece

    @property
    def is_busy(self) -> bool:
        """Whether something is to be sent, or on its way."""
        return bool(self._sending or self._to_send)

    def send(self, layers: range, blocks: list[int]) -> None:
        """Send these blocks after all before; none: a probe. start() does it."""
        self._to_send.append(self._send_blocks(layers, blocks) if blocks else self._send_probe())

    def start(self) -> None:
        """Enqueue all that is to be sent, or as much as there is room for block ids.

        Raises:
            Exception: NCCL's, or TransferError where the communicator is closed.
        """
        while self._to_send and next(self._to_send[0], self) is self:
            self._to_send.popleft()

    def poll(self) -> bool:
        """See what has been sent. Returns whether it got on."""
        got_on = False
        while self._sending and self._sending[0].done.query():
            sent = self._sending.popleft()
            if sent.ids is not None:
                self.staging.ids.free(sent.ids)
            self.num_sent += sent.is_last
            got_on = True
        return got_on

    def close(self, name: str) -> None:
        """Afterwards the staging is free for another. The communicator must have been closed, and no call be under way.

        Raises:
            TransferError: the device still holds what was enqueued: it cannot be trusted with another channel.
        """
        drain([self._pack_stream, self._send_stream], name)
        self.staging.reset()

    def _send_blocks(self, layers: range, blocks: list[int]) -> Iterator[None]:
        """Yields while there is no room."""
        staging, stream = self.staging, self._pack_stream
        for span in staging.split(layers, len(blocks), self._piece_bytes):
            while (ids := staging.allocate_ids(span)) is None:
                yield
            stream.run(partial(staging.load_ids, ids, span, blocks))
            for piece in span.pieces:
                slot, ends = staging.next_slot(), piece is span.pieces[-1]
                self._fill(slot, partial(staging.pack, slot, piece, span, ids))
                is_last = ends and span.stop == len(blocks)
                self._send(slot, staging.num_bytes(piece), ids if ends else None, is_last=is_last)

    def _send_probe(self) -> Iterator[None]:
        slot = self.staging.next_slot()
        self._fill(slot, partial(self.staging.write_probe, slot, self._epoch))
        self._send(slot, PROBE_BYTES, None, is_last=True)
        yield from ()

    def _fill(self, slot: Slot, work: Callable[[], None]) -> None:
        if slot.free_after is not None:
            self._pack_stream.wait(slot.free_after)
        self._pack_stream.run(work)

    def _send(self, slot: Slot, num_bytes: int, ids: Region | None, *, is_last: bool) -> None:
        """What the slot holds once it is filled."""
        self._send_stream.wait(self._pack_stream.record())
        self.communicator.send(self.staging.pointer(slot), num_bytes, self._send_stream)
        slot.free_after = self._send_stream.record()
        self._sending.append(_Sending(slot.free_after, ids, is_last))
