"""Rank 0's side of what the other ranks of its worker do of a cuda_ipc channel."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from pdray.transfer.asking import answers_of, wait_until_ended
from pdray.transfer.channel import OtherRank
from pdray.transfer.cuda_ipc.rank_orders import CloseLink, OpenLink, RankOrder, WriteBlocks, WriteProbe, encode
from pdray.transfer.cuda_ipc.targets import Target
from pdray.transfer.cuda_ipc.writer import pack_ids
from pdray.transfer.streams import Event

KIND = "cuda_ipc"


def ask_all(ranks: list[OtherRank], order: RankOrder) -> list[Future[bytes]]:
    """Have all of them carry it out."""
    payload = encode(order)
    return [rank.ask(KIND, payload) for rank in ranks]


class RankWrites:
    """An Event: a write of all ranks has ended. The others are asked to begin once the source is seen to be final.

    Their layers are final, too: what rank 0 has waited for is behind a sum of what all ranks have made of them.

    Args:
        own: of rank 0's part. ready: after which the source is final; None: it is.
        begin: asks the others.
    """

    def __init__(self, own: Event, ready: Any, begin: Callable[[], list[Future[bytes]]]) -> None:
        self._own = own
        self._ready = ready
        self._begin = begin
        self._futures: list[Future[bytes]] | None = None

    def query(self) -> bool:
        """See Event.

        Raises:
            RankDiedError, TransferError: a rank could not write.
        """
        if self._futures is None:
            if self._ready is not None and not self._ready.query():
                return False
            self._futures = self._begin()
        done = [future.result() for future in self._futures if future.done()]
        return len(done) == len(self._futures) and self._own.query()


class OtherWriters(NamedTuple):
    """Those other ranks of a worker that write to one peer, in one epoch. None, where the worker has one rank.

    Attributes:
        link: see OpenLink.
    """

    ranks: list[OtherRank]
    link: int

    async def open(self, peer: str, targets: list[list[Target]]) -> None:
        """Have each of them map its targets.

        Raises:
            RankDiedError, TransferError: one could not.
        """
        orders = zip(self.ranks, targets, strict=True)
        await answers_of([rank.ask(KIND, encode(OpenLink(self.link, peer, part))) for rank, part in orders])

    async def probe(self, epoch: int) -> None:
        """Have them write their parts of the pattern.

        Raises:
            RankDiedError, TransferError: one could not.
        """
        await answers_of(ask_all(self.ranks, WriteProbe(self.link, epoch)))

    def follow(
        self,
        own: Event,
        ready: Any,
        layers: range,
        source: list[int],
        target: list[int],
        num_programs: int | None,
        on_done: Callable[[], None],
    ) -> Event:
        """What rank 0 has enqueued the others do, too. Returns an event after all of it.

        Args:
            on_done: called when one of them has ended, on any thread.
        """
        if not self.ranks:
            return own

        def begin() -> list[Future[bytes]]:
            order = WriteBlocks(self.link, layers.start, layers.stop, pack_ids(source, target), num_programs)
            futures = ask_all(self.ranks, order)
            for future in futures:
                future.add_done_callback(lambda done: on_done())
            return futures

        return RankWrites(own, ready, begin)

    def close(self) -> None:
        """Wait until none of them has anything mapped. One that is gone has not.

        Raises:
            TransferError: one does not end.
        """
        wait_until_ended(ask_all(self.ranks, CloseLink(self.link)))
