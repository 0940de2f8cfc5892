"""The pools of all ranks of a worker, as a channel of its rank 0 sees them: one, with all heads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import RankDiedError, TransferError
from pdray.models.shards import Span
from pdray.ranks.kv_orders import KVOrder, Staging, encode
from pdray.ranks.member import Member
from pdray.transfer.pool_blocks import PoolBlocks
from pdray.transfer.routes import head_routes


class RankPools:
    """WholeBlocks of a worker of several ranks. Any thread but the event loop's; one at a time.

    Blocks are as many in each rank's pool, and mean the same, because rank 0 alone decides what they are for. The other
    ranks copy theirs through staging memory, in pieces that fit it.

    Args:
        pool: of rank 0.
        num_kv_heads: of the model.
        timeout_s: a rank that takes longer for a piece is ended, and with it the worker.
    """

    def __init__(
        self, pool: KVPool, num_kv_heads: int, members: list[Member], staging: Staging, *, timeout_s: float
    ) -> None:
        self._layout = pool.layout
        self._num_kv_heads = num_kv_heads
        self._own = PoolBlocks(pool.tensor)
        self._members = {member.rank: member for member in members}
        self._staging = staging
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._broken: str | None = None
        num_ranks = len(members) + 1
        self._readable = {route.source: route.heads for route in head_routes(num_kv_heads, num_ranks, 1)}
        self._writable = {route.target: route.heads for route in head_routes(num_kv_heads, 1, num_ranks)}

    def read(self, layers: range, block_ids: list[int], ready: Any = None) -> torch.Tensor:
        """See WholeBlocks.

        Raises:
            RankDiedError: a rank is gone. TransferError: it could not copy its blocks.
        """
        whole = torch.empty(self._shape(layers, len(block_ids)), dtype=self._layout.dtype)
        for piece in self._pieces(layers, len(block_ids)):
            ids, part = block_ids[piece], whole[:, piece]
            with self._lock:
                # First: after ``ready`` every rank has stored these layers, because rank 0 has added up what all made
                # of them.
                part[..., _slice(self._readable[0]), :] = self._own.read(layers, ids, ready)
                self._order(self._readable, KVOrder(False, layers.start, layers.stop, ids))
                for rank, heads in self._readable.items():
                    if rank:
                        part[..., _slice(heads), :] = self._staging.of(rank, len(layers), len(ids))
        return whole

    def write(self, layers: range, block_ids: list[int], data: torch.Tensor) -> None:
        """See WholeBlocks, and read()."""
        shape = self._shape(layers, len(block_ids))
        if tuple(data.shape) != shape or data.dtype != self._layout.dtype:
            raise ValueError(f"data is {tuple(data.shape)} {data.dtype}; the blocks are {shape} {self._layout.dtype}")
        for piece in self._pieces(layers, len(block_ids)):
            ids, part = block_ids[piece], data[:, piece]
            with self._lock:
                for rank, heads in self._writable.items():
                    if rank:
                        self._staging.of(rank, len(layers), len(ids)).copy_(part[..., _slice(heads), :])
                self._own.write(layers, ids, part[..., _slice(self._writable[0]), :].contiguous())
                self._order(self._writable, KVOrder(True, layers.start, layers.stop, ids))

    def _shape(self, layers: range, num_blocks: int) -> tuple[int, ...]:
        layout = self._layout
        return len(layers), num_blocks, 2, layout.block_size, self._num_kv_heads, layout.head_dim

    def _pieces(self, layers: range, num_blocks: int) -> Iterator[slice]:
        step = self._staging.max_blocks(len(layers))
        for start in range(0, num_blocks, step):
            yield slice(start, min(start + step, num_blocks))

    def _order(self, ranks: dict[int, Span], order: KVOrder) -> None:
        """Have those of them that are not this one carry it out."""
        if self._broken is not None:
            raise RankDiedError(self._broken)
        asked = [self._members[rank] for rank in ranks if rank]
        message = encode(order)
        try:
            for member in asked:
                member.kv_orders.send_bytes(message)
            answers = [(member.rank, self._answer(member)) for member in asked]
        except (EOFError, OSError, RankDiedError) as error:  # an answer that comes late would be taken for another's
            self._broken = f"KV of rank {asked[0].rank} and those after it cannot be had: {error!r}"
            raise RankDiedError(self._broken) from error
        reasons = [f"rank {rank}: {reason}" for rank, reason in answers if reason]
        if reasons:
            raise TransferError("; ".join(reasons))

    def _answer(self, member: Member) -> str:
        if not member.kv_orders.poll(self._timeout_s):
            member.kill(why := f"it has not copied its blocks for {self._timeout_s:g} s")
            raise RankDiedError(f"rank {member.rank} is ended: {why}")
        return member.kv_orders.recv_bytes().decode()


def _slice(heads: Span) -> slice:
    return slice(heads.start, heads.stop)
