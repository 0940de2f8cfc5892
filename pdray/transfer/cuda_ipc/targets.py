"""Which pools of a peer a rank writes to, and which heads of them. Pure."""

from __future__ import annotations

from typing import NamedTuple

from pdray.kernels.kv.peer_write import HeadMove
from pdray.transfer.cuda_ipc.messages import PROBE_ALIGNMENT, PROBE_BYTES, Offer
from pdray.transfer.routes import Route, head_routes


class Target(NamedTuple):
    """One rank's pool, as another worker's rank writes to it.

    Attributes:
        handle: of its memory. num_blocks: see Offer.
        heads: that come from here.
        probe_offset: where this rank's part of the test write goes, in bytes from the pool's beginning.
        probe_start, probe_stop: that part, of the pattern.
    """

    handle: bytes
    num_blocks: int
    heads: HeadMove
    probe_offset: int
    probe_start: int
    probe_stop: int


def targets_of(num_kv_heads: int, num_sources: int, offer: Offer) -> list[list[Target]]:
    """What each rank of the sender writes to. Every rank of the receiver gets all its heads, and a whole pattern.

    Args:
        num_kv_heads: of the model. num_sources: ranks of the sender.
    """
    targets: list[list[Target]] = [[] for _ in range(num_sources)]
    routes = head_routes(num_kv_heads, num_sources, len(offer.handles))
    for rank, handle in enumerate(offer.handles):
        arriving = [route for route in routes if route.target == rank]
        for number, route in enumerate(arriving):
            start, stop = (_cut(number + i, len(arriving)) for i in range(2))
            place = offer.probe_offset + start
            targets[route.source].append(Target(handle, offer.num_blocks, _move(route), place, start, stop))
    return targets


def _cut(number: int, count: int) -> int:
    return number * (PROBE_BYTES // PROBE_ALIGNMENT) // count * PROBE_ALIGNMENT


def _move(route: Route) -> HeadMove:
    source, target = route.source_heads, route.target_heads
    return HeadMove(source.start, target.start, source.size, target.whole)
