"""How the heads of a worker and of its peers are divided among their ranks, and what goes between which two of them."""

from __future__ import annotations

from typing import NamedTuple

from pdray.kernels.kv.pack import HeadRange
from pdray.transfer.channel import OtherRank
from pdray.transfer.nccl.messages import UniqueId
from pdray.transfer.routes import Route, head_routes


class HeadSplit(NamedTuple):
    """Attributes:
    sends: the worker is a prefill worker.
    num_ranks, num_peer_ranks: of the worker, and of each of its peers. num_kv_heads: of the model.
    piece_bytes: the largest that fits a slot of each staging of the worker's ranks.
    others: ranks of this worker, from 1 on.
    """

    sends: bool
    num_ranks: int
    num_peer_ranks: int
    num_kv_heads: int
    piece_bytes: int
    others: list[OtherRank]

    @property
    def routes(self) -> list[Route]:
        """Of the worker and a peer; each has a communicator."""
        return routes_between(self.num_kv_heads, self.num_ranks, self.num_peer_ranks, sends=self.sends)

    def by_rank(self, unique_ids: list[UniqueId]) -> list[list[UniqueId]]:
        """Of each rank's lanes, where these are of all routes."""
        ranks: list[list[UniqueId]] = [[] for _ in range(self.num_ranks)]
        for route, unique_id in zip(self.routes, unique_ids, strict=True):
            ranks[route.source if self.sends else route.target].append(unique_id)
        return ranks


def routes_between(num_kv_heads: int, num_ranks: int, num_peer_ranks: int, *, sends: bool) -> list[Route]:
    """See head_routes().

    Args:
        num_ranks: of this worker. sends: it is the source.
    """
    sizes = (num_ranks, num_peer_ranks) if sends else (num_peer_ranks, num_ranks)
    return head_routes(num_kv_heads, *sizes)


def lanes_of(rank: int, num_kv_heads: int, num_ranks: int, num_peer_ranks: int, *, sends: bool) -> list[HeadRange]:
    """Heads of its pool that this rank sends, or receives, in each of its lanes."""
    routes = routes_between(num_kv_heads, num_ranks, num_peer_ranks, sends=sends)
    if sends:
        spans = [route.source_heads for route in routes if route.source == rank]
    else:
        spans = [route.target_heads for route in routes if route.target == rank]
    return [HeadRange(span.start, span.size) for span in spans]
