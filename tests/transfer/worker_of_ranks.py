"""A worker of several ranks, which are threads, at one end of a channel."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Sequence
from typing import Any

import torch

from pdray.engine.kv.pool import KVPool
from pdray.models.shards import Span, kv_heads_of
from pdray.ranks.channel_orders import AskedRank, ChannelFollower
from pdray.transfer.channel import Kind, WorkerRanks


class NoBlocks:
    """WholeBlocks that nobody asks for."""

    def read(self, layers: range, block_ids: list[int], ready: Any = None) -> torch.Tensor:
        raise AssertionError

    def write(self, layers: range, block_ids: list[int], data: torch.Tensor) -> None:
        raise AssertionError


class WorkerOfRanks:
    """Attaches each rank's kind to its pool, and joins the ranks. ``dead``: once set, those that were killed are seen
    to be."""

    def __init__(self, kinds: Sequence[Kind], pools: Sequence[KVPool], num_heads: int) -> None:
        self.pools, self.num_heads = pools, num_heads
        self.dead = threading.Event()
        self.pipes, asked = [], []
        for rank in range(1, len(pools)):
            kinds[rank].attach(pools[rank])
            ours, theirs = multiprocessing.Pipe()
            self.pipes.append(theirs)
            asked.append(AskedRank(rank, ours, self.dead.wait))
            ChannelFollower({kinds[rank].name: kinds[rank]}, theirs)
        if len(pools) == 1:
            kinds[0].attach(pools[0])
        else:
            kinds[0].attach_ranks(pools[0], WorkerRanks(NoBlocks(), num_heads, list(asked)))

    @property
    def spans(self) -> list[Span]:
        """Heads of each rank."""
        return [kv_heads_of(self.num_heads, rank, len(self.pools)) for rank in range(len(self.pools))]

    def whole(self) -> torch.Tensor:
        """What the pools hold together; ranks that have the same heads hold the same."""
        layout = self.pools[0].layout
        whole = torch.full((*self.pools[0].tensor.shape[:4], self.num_heads, layout.head_dim), float("nan"))
        for pool, span in zip(self.pools, self.spans, strict=True):
            part = whole[..., span.start : span.stop, :]
            assert part.isnan().all() or torch.equal(part, pool.tensor)
            part.copy_(pool.tensor)
        return whole

    def fill(self, whole: torch.Tensor) -> None:
        for pool, span in zip(self.pools, self.spans, strict=True):
            pool.tensor.copy_(whole[..., span.start : span.stop, :])

    def kill(self, rank: int) -> None:
        """Its pipe ends, as a process's does that is killed."""
        with socket.fromfd(self.pipes[rank - 1].fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.dead.set()
        for rank in range(1, len(self.pools)):
            self.kill(rank)
