"""Rank 0's side of what the other ranks of its worker send over an nccl channel."""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

from pdray.transfer.channel import OtherRank
from pdray.transfer.nccl.messages import UniqueId
from pdray.transfer.nccl.rank_orders import CloseSends, OpenSends, RankOrder, SendBlocks, encode, pack_ids

KIND = "nccl"


def ask_all(ranks: list[OtherRank], order: RankOrder) -> list[Future[bytes]]:
    """Have all of them carry it out."""
    payload = encode(order)
    return [rank.ask(KIND, payload) for rank in ranks]


class OtherSends(NamedTuple):
    """Those other ranks of a worker that send to one peer, in one epoch. None, where the worker has one rank.

    Attributes:
        link: see RankOrder.
    """

    ranks: list[OtherRank]
    link: int

    def open(self, peer: str, epoch: int, piece_bytes: int, unique_ids: list[list[UniqueId]]) -> list[Future[bytes]]:
        """Have each of them enter its communicators."""
        return [
            rank.ask(KIND, encode(OpenSends(self.link, peer, epoch, piece_bytes, ids)))
            for rank, ids in zip(self.ranks, unique_ids, strict=True)
        ]

    def send(self, layers: range, blocks: list[int]) -> list[Future[bytes]]:
        """Have them send their heads of these blocks, which are final; none: a probe."""
        return ask_all(self.ranks, SendBlocks(self.link, layers.start, layers.stop, pack_ids(blocks)))

    def close(self) -> list[Future[bytes]]:
        """Have them end all of it, also while it is being opened."""
        return ask_all(self.ranks, CloseSends(self.link))
