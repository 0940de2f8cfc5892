"""What a rank other than 0 does of the nccl channels of its decode worker: it receives its heads when rank 0 asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pdray.errors import TransferError
from pdray.transfer.channel import FinishAnswer
from pdray.transfer.nccl.communicator import RECEIVER_RANK, Transport, run_all
from pdray.transfer.nccl.opening import Opening
from pdray.transfer.nccl.rank_orders import GiveUp, OpenReceives, SetPatience, encode
from pdray.transfer.nccl.receive_thread import Arrival, Lane, ReceiveThread
from pdray.transfer.nccl.staging import Staging


@dataclass(eq=False, slots=True)
class _Link:
    """One sender in one epoch. is_connected: as rank 0 sees it."""

    order: OpenReceives
    opening: Opening
    lanes: list[Lane] = field(default_factory=list)
    is_connected: bool = True


class RankReceives:
    """A thread and a watchdog for each lane, for all senders in turn. Methods belong to the thread of channel orders.

    Args:
        stagings: one for each lane.
        timeout_s: see ReceiveThread. on_fatal: called if the device cannot be relied on any more.
    """

    def __init__(
        self,
        stagings: list[Staging],
        transport: Transport,
        *,
        name: str,
        timeout_s: float,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._transport = transport
        self._on_fatal = on_fatal
        self._links: dict[int, _Link] = {}
        self._threads = [
            ReceiveThread(
                staging,
                transport.new_stream(),
                self,
                name=f"{name}-{number}",
                timeout_s=timeout_s,
                call_soon=lambda call: call(),
            )
            for number, staging in enumerate(stagings)
        ]

    def open(self, order: OpenReceives) -> FinishAnswer:
        """Begin to connect; answered once all lanes are."""
        connects = [partial(self._transport.connect, each, RECEIVER_RANK) for each in order.unique_ids]
        self._links[order.link] = link = _Link(order, Opening(connects))

        def finish() -> bytes | None:
            communicators = link.opening.finish()
            if communicators is None:
                return None
            for communicator in communicators:
                stream = self._transport.new_stream()
                more = order.piece_bytes, lambda: link.is_connected
                link.lanes.append(Lane(order.peer, order.epoch, communicator, stream, *more))
            return b""

        return finish

    def receive(self, link: int, layers: range, blocks: list[int]) -> FinishAnswer:
        """See ReceiveBlocks."""
        if link not in self._links:
            raise TransferError("a receive of a channel that is closed")
        arrivals = [Arrival(lane, layers, blocks) for lane in self._links[link].lanes]
        for thread, arrival in zip(self._threads, arrivals, strict=True):
            thread.receive([arrival])

        def finish() -> bytes | None:
            if not all(arrival.is_over for arrival in arrivals):
                return None
            for arrival in arrivals:
                if arrival.lane.error is not None:
                    raise TransferError(arrival.lane.error)
            return encode(all(arrival.arrived for arrival in arrivals))

        return finish

    def set_patience(self, order: SetPatience) -> None:
        """Also of a link that is no more."""
        for thread in self._threads:
            thread.others_wait = order.others_wait
        if order.link in self._links:
            self._links[order.link].is_connected = order.is_connected

    def give_up(self, order: GiveUp) -> None:
        """May be called on any thread, which waits; see GiveUp."""
        link = self._links.get(order.link)
        if link is not None:
            link.opening.give_up()
            lanes = zip(self._threads, link.lanes, strict=False)  # none, before they are there
            run_all([partial(thread.give_up, lane, order.reason) for thread, lane in lanes])
            self._links.pop(order.link, None)

    def stop(self) -> None:
        """End the threads; on any thread, which waits."""
        for thread in self._threads:
            thread.stop()

    # ReceiveEvents, on the lanes' threads

    def arrival_ended(self, arrival: Arrival) -> None:
        """See ReceiveEvents. Its answer is looked for."""

    def grant_ended(self) -> None:
        """See ReceiveEvents. Rank 0 counts what is answered."""

    def lane_failed(self, lane: Lane, reason: str) -> None:
        """See ReceiveEvents. It is answered to whatever was to come by it."""

    def failed(self, error: BaseException) -> None:
        """See ReceiveEvents."""
        self._on_fatal(error)
