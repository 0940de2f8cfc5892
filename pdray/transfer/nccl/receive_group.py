"""The nccl receiver of a worker as one: of all that its ranks receive, each by a lane from each rank that sends to it.

A put has come when all lanes have brought their heads, and one lane that fails ends its sender's link. Belongs to rank
0's event loop; lanes of this process have a ReceiveThread each, and other ranks are asked for theirs.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from pdray.background import BackgroundTasks, start_thread
from pdray.errors import TransferError
from pdray.transfer.asking import answers_of, wait_until_ended
from pdray.transfer.channel import OtherRank
from pdray.transfer.nccl.communicator import (
    RECEIVER_RANK,
    Transport,
    close_soon,
    has_opened,
    open_communicators,
    run_all,
)
from pdray.transfer.nccl.messages import UniqueId
from pdray.transfer.nccl.other_sends import KIND, ask_all
from pdray.transfer.nccl.rank_orders import (
    GiveUp,
    OpenReceives,
    ReceiveBlocks,
    SetPatience,
    StopReceiving,
    decode_arrived,
    encode,
    pack_ids,
)
from pdray.transfer.nccl.receive_thread import Arrival, Lane, ReceiveThread
from pdray.transfer.nccl.staging import Staging
from pdray.wire.message import LegKey

CONNECTION_POLL_S = 0.1  # while other ranks receive; they do not see the sender's session


@dataclass(eq=False, slots=True)
class Link:
    """One sender in one epoch.

    Attributes:
        number: see RankOrder. lanes: of this process. error: why it was given up.
        num_asked: receives of other ranks that have not ended.
    """

    name: str
    epoch: int
    number: int
    is_connected: Callable[[], bool]
    lanes: list[Lane] = field(default_factory=list)
    error: str | None = None
    num_asked: int = 0


@dataclass(eq=False, slots=True)
class Transfer:
    """A put, or a probe (which has no blocks), that was granted.

    Attributes:
        layers, positions: as the sender named them. blocks: of the pool, for each position.
        arrived: all of it is where it should be; once it has ended.
        num_left: lanes, and other ranks, that have not ended.
    """

    link: Link
    seq: int
    key: LegKey
    layers: range
    positions: range
    blocks: list[int] = field(default_factory=list)
    arrived: bool = True
    num_left: int = 0


@dataclass(eq=False, slots=True)
class _Grant:
    """Attributes:
    num_left: lanes, and receives of other ranks, that have not ended.
    """

    num_left: int


class GroupEvents(Protocol):
    """Called on the event loop's thread, in order."""

    def transfer_ended(self, transfer: Transfer) -> None:
        """Nothing of it is written any more. Comes once for each transfer that was granted, also of a failed link."""

    def grant_ended(self) -> None:
        """Everything of one receive() has been received, or its link was given up and nothing of it is in flight."""

    def link_failed(self, link: Link, reason: str) -> None:
        """A link was given up by itself."""

    def failed(self, error: BaseException) -> None:
        """A device cannot be relied on."""


class ReceiveGroup:
    """Event loop's thread only, where nothing else is said.

    Args:
        stagings: one for each lane of this process.
        others: ranks of this worker; every rank of a receiver receives.
        timeout_s: a link whose granted transfers do not get on for so long is given up.
    """

    def __init__(
        self,
        stagings: list[Staging],
        transport: Transport,
        others: list[OtherRank],
        events: GroupEvents,
        *,
        name: str,
        timeout_s: float,
    ) -> None:
        self._transport = transport
        self._others = others
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._tasks = BackgroundTasks(events.failed)
        self._lock = threading.Lock()  # of links' errors
        self._others_wait = False
        self._num_links = 0
        self._receiving: Link | None = None  # whose receives other ranks were asked for last
        self._was_connected = True  # as they were told
        self._watching: asyncio.Task[None] | None = None
        self._lanes = [_LaneEvents(self) for _ in stagings]
        self._threads = [
            ReceiveThread(
                staging,
                transport.new_stream(),
                lane,
                name=f"{name}-{number}",
                timeout_s=timeout_s,
                call_soon=self.call_soon,
            )
            for number, (staging, lane) in enumerate(zip(stagings, self._lanes, strict=True))
        ]

    async def open(
        self,
        name: str,
        epoch: int,
        piece_bytes: int,
        unique_ids: list[list[UniqueId]],
        is_connected: Callable[[], bool],
        on_stuck: Callable[[str], None] | None = None,
    ) -> Link:
        """Enter a sender's communicators, in every rank.

        Args:
            unique_ids: of each rank's, in the order of its lanes. on_stuck: see open_communicator().

        Raises:
            TransferError: one did not come about, and so none has. RankDiedError: a rank is gone.
        """
        self._num_links += 1
        link = Link(name, epoch, self._num_links, is_connected)
        connects = [partial(self._transport.connect, each, RECEIVER_RANK) for each in unique_ids[0]]
        asked = [
            rank.ask(KIND, encode(OpenReceives(link.number, name, epoch, piece_bytes, ids)))
            for rank, ids in zip(self._others, unique_ids[1:], strict=True)
        ]
        opening = asyncio.ensure_future(open_communicators(connects, on_stuck=on_stuck))
        try:
            await asyncio.gather(opening, answers_of(asked), return_exceptions=True)
            for communicator in await opening:
                stream = self._transport.new_stream()
                link.lanes.append(Lane(name, epoch, communicator, stream, piece_bytes, is_connected, of=link))
            await answers_of(asked)
        except BaseException as error:
            if not link.lanes and has_opened(opening):  # cancelled
                close_soon(opening.result())
            self._end_soon(link, f"not opened: {error}")
            raise
        return link

    def receive(self, link: Link, transfers: list[Transfer]) -> None:
        """Receive these puts. Another link's: not before the grants before have ended."""
        grant = _Grant(len(self._threads) + len(self._others) * len(transfers))
        for transfer in transfers:
            transfer.num_left = len(self._threads) + len(self._others)
        for lane, thread, events in zip(link.lanes, self._threads, self._lanes, strict=True):
            events.grants.append(grant)
            thread.receive([Arrival(lane, each.layers, each.blocks, of=each) for each in transfers])
        if self._others:
            self._ask(link, transfers, grant)

    def _ask(self, link: Link, transfers: list[Transfer], grant: _Grant) -> None:
        if self._receiving is not link:
            self._receiving = link
            self._tell_patience(link)
        for transfer in transfers:
            layers, ids = transfer.layers, pack_ids(transfer.blocks)
            for future in ask_all(self._others, ReceiveBlocks(link.number, layers.start, layers.stop, ids)):
                link.num_asked += 1
                future.add_done_callback(partial(self._answered, transfer, grant))
        if self._watching is None or self._watching.done():
            self._watching = self._tasks.spawn(self._watch_connection())

    def _answered(self, transfer: Transfer, grant: _Grant, future: Future[bytes]) -> None:
        self.call_soon(lambda: self._rank_ended(future, transfer, grant))

    def _rank_ended(self, future: Future[bytes], transfer: Transfer, grant: _Grant) -> None:
        transfer.link.num_asked -= 1
        error = future.exception()
        if error is not None:
            self.link_failed(transfer.link, str(error))  # first: a put that failed is not one that was refused
        self.part_ended(transfer, arrived=error is None and decode_arrived(future.result()))
        self.grant_part_ended(grant)

    @property
    def others_wait(self) -> bool:
        """See ReceiveThread."""
        return self._others_wait

    @others_wait.setter
    def others_wait(self, value: bool) -> None:
        for thread in self._threads:
            thread.others_wait = value
        changed, self._others_wait = value != self._others_wait, value
        if changed and self._receiving is not None:
            self._tell_patience(self._receiving)

    def _tell_patience(self, link: Link) -> None:
        self._was_connected = link.is_connected()
        ask_all(self._others, SetPatience(link.number, self._others_wait, self._was_connected))

    async def _watch_connection(self) -> None:
        while (link := self._receiving) is not None and link.num_asked:
            if link.is_connected() != self._was_connected:
                self._tell_patience(link)
            await asyncio.sleep(CONNECTION_POLL_S)

    # what threads and other ranks tell

    def part_ended(self, transfer: Transfer, *, arrived: bool) -> None:
        """By one lane of this process, or in one other rank."""
        transfer.arrived &= arrived
        transfer.num_left -= 1
        if not transfer.num_left:
            self._events.transfer_ended(transfer)

    def grant_part_ended(self, grant: _Grant) -> None:
        """See part_ended()."""
        grant.num_left -= 1
        if not grant.num_left:
            self._events.grant_ended()

    def link_failed(self, link: Link, reason: str) -> None:
        """One lane was given up, in any rank; so are the others."""
        with self._lock:
            first, link.error = link.error is None, link.error or reason
        if first:
            self._events.link_failed(link, reason)
            if self._others or len(link.lanes) > 1:
                self._end_soon(link, reason)

    def failed(self, error: BaseException) -> None:
        """See GroupEvents."""
        self._events.failed(error)

    # the end

    def give_up(self, link: Link, reason: str) -> None:
        """Abort its communicators. Takes about half a second; from any thread but the event loop's."""
        with self._lock:
            link.error = link.error or reason
        asked = ask_all(self._others, GiveUp(link.number, reason))
        run_all(
            [partial(thread.give_up, lane, reason) for thread, lane in zip(self._threads, link.lanes, strict=False)]
        )
        try:
            wait_until_ended(asked)
        except TransferError as error:
            failure = error
            self.call_soon(lambda: self._events.failed(failure))

    def _end_soon(self, link: Link, reason: str) -> None:
        start_thread(f"nccl-give-up-{link.name}", lambda: self.give_up(link, reason), self._could_not_end)

    def _could_not_end(self, error: BaseException) -> None:
        self.call_soon(lambda: self._events.failed(error))

    async def stop(self) -> None:
        """End the threads. Links must have been given up before."""
        await self._tasks.stop()
        asked: list[Future[bytes]] = ask_all(self._others, StopReceiving())
        for thread in self._threads:
            await asyncio.to_thread(thread.stop)
        await asyncio.to_thread(wait_until_ended, asked)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Call on the event loop; from any thread. Ignored where the loop is closed, because its worker has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


class _LaneEvents:
    """ReceiveEvents of one lane's thread, which come on the event loop.

    Attributes:
        grants: of which it has not received everything.
    """

    def __init__(self, group: ReceiveGroup) -> None:
        self._group = group
        self.grants: deque[Any] = deque()

    def arrival_ended(self, arrival: Arrival) -> None:
        self._group.part_ended(arrival.of, arrived=arrival.arrived)

    def grant_ended(self) -> None:
        self._group.grant_part_ended(self.grants.popleft())

    def lane_failed(self, lane: Lane, reason: str) -> None:
        self._group.link_failed(lane.of, reason)

    def failed(self, error: BaseException) -> None:
        self._group.failed(error)
