"""The pools of several ranks, read and written as one with all heads; the ranks are threads here."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.engine.ranks.shared_memory import SharedMemory
from pdray.errors import RankDiedError, TransferError
from pdray.models.shards import kv_heads_of
from pdray.ranks import kv_orders
from pdray.ranks.kv_orders import KVFollower, Staging
from pdray.ranks.pools import RankPools
from pdray.testing.patience import PATIENCE_S

CPU = torch.device("cpu")
NUM_BLOCKS, NUM_LAYERS, HEAD_DIM = 40, 3, 8


class Follower:
    """A Member's side of KV orders, and at its other end a rank, in place of a process."""

    def __init__(self, rank: int, pool: KVPool, staging: Staging) -> None:
        self.rank = rank
        self.pool = pool
        self.kv_orders, theirs = multiprocessing.Pipe()
        self.killed = threading.Event()
        self.follower = KVFollower(rank, pool, staging, theirs)

    def kill(self, why: str) -> None:
        self.killed.set()


class World:
    """Ranks of one worker; num_kv_heads: of their model."""

    def __init__(self, num_kv_heads: int, num_ranks: int) -> None:
        self.num_kv_heads = num_kv_heads
        heads = kv_heads_of(num_kv_heads, 0, num_ranks).size
        self.layout = KVLayout(NUM_LAYERS, 16, heads, HEAD_DIM, torch.float32)
        self.fd = os.memfd_create("inputs")
        pools = [KVPool.allocate(self.layout, NUM_BLOCKS, CPU) for _ in range(num_ranks)]
        self.own = pools[0]
        members: list[Any] = [Follower(rank, pools[rank], self.staging(num_ranks)) for rank in range(1, num_ranks)]
        self.members = members
        staging = self.staging(num_ranks)
        self.max_blocks = staging.max_blocks(NUM_LAYERS)
        self.pools = RankPools(self.own, num_kv_heads, members, staging, timeout_s=0.2)

    def staging(self, num_ranks: int) -> Staging:
        """As each process makes it."""
        return Staging(SharedMemory(self.fd, pinned=False), self.layout, num_ranks)

    def random(self, num_layers: int, num_blocks: int) -> torch.Tensor:
        return torch.randn(num_layers, num_blocks, 2, 16, self.num_kv_heads, HEAD_DIM)

    def close(self) -> None:
        for member in self.members:
            member.kv_orders.close()
        os.close(self.fd)


@pytest.fixture
def world_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], World]]:
    """Their staging memory holds few blocks at once."""
    monkeypatch.setattr(kv_orders, "PIECE_BYTES", 100_000)
    worlds: list[World] = []

    def make(num_kv_heads: int, num_ranks: int) -> World:
        worlds.append(World(num_kv_heads, num_ranks))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.mark.parametrize(("num_kv_heads", "num_ranks"), [(4, 2), (3, 3), (2, 4)])
def test_blocks_are_divided_and_put_together(
    num_kv_heads: int, num_ranks: int, world_of: Callable[[int, int], World]
) -> None:
    world = world_of(num_kv_heads, num_ranks)
    ids = torch.randperm(NUM_BLOCKS - 1)[:37].add(1).tolist()
    assert world.max_blocks < len(ids), "it goes in pieces"
    data = world.random(NUM_LAYERS, len(ids))
    world.pools.write(range(NUM_LAYERS), ids, data)
    for rank, pool in enumerate([world.own, *(member.pool for member in world.members)]):
        heads = kv_heads_of(num_kv_heads, rank, num_ranks)
        assert torch.equal(pool.tensor[:, ids], data[..., heads.start : heads.stop, :])
        others = [block for block in range(NUM_BLOCKS) if block not in ids]
        assert not pool.tensor[:, others].any()
    assert torch.equal(world.pools.read(range(NUM_LAYERS), ids), data)
    assert torch.equal(world.pools.read(range(1, 3), ids[5:6]), data[1:3, 5:6])


def test_what_does_not_fit_is_refused(world_of: Callable[[int, int], World]) -> None:
    world = world_of(4, 2)
    with pytest.raises(ValueError, match=r"data is \(3, 2, 2, 16, 4, 8\) .*; the blocks are \(3, 1, 2, 16, 4, 8\)"):
        world.pools.write(range(NUM_LAYERS), [1], world.random(NUM_LAYERS, 2))
    assert not world.own.tensor.any()


def test_a_rank_that_cannot_copy_fails_that_transfer_alone(world_of: Callable[[int, int], World]) -> None:
    world = world_of(4, 2)
    blocks = world.members[0].follower._blocks
    write = blocks.write

    def failing(*args: Any) -> None:
        raise MemoryError("no room")

    blocks.write = failing
    with pytest.raises(TransferError, match="rank 1: MemoryError: no room"):
        world.pools.write(range(NUM_LAYERS), [1], world.random(NUM_LAYERS, 1))
    blocks.write = write
    data = world.random(NUM_LAYERS, 1)
    world.pools.write(range(NUM_LAYERS), [1], data)
    assert torch.equal(world.pools.read(range(NUM_LAYERS), [1]), data)


def test_after_a_missing_answer_nothing_is_taken_for_one(world_of: Callable[[int, int], World]) -> None:
    """The rank is ended, and with it its worker; an answer that comes late is nobody's."""
    world = world_of(4, 2)
    blocks, read = world.members[0].follower._blocks, []

    def late(*args: Any) -> torch.Tensor:
        assert world.members[0].killed.wait(PATIENCE_S)
        read.append(args)
        return torch.zeros(NUM_LAYERS, 1, 2, 16, 2, HEAD_DIM)

    blocks.read = late
    with pytest.raises(RankDiedError, match=r"rank 1 .*it has not copied its blocks for 0.2 s"):
        world.pools.read(range(NUM_LAYERS), [1])
    assert world.members[0].killed.is_set()
    with pytest.raises(RankDiedError, match="has not copied"):
        world.pools.read(range(NUM_LAYERS), [2])
    assert len(read) <= 1


def test_a_rank_that_is_gone(world_of: Callable[[int, int], World]) -> None:
    world = world_of(2, 4)
    world.members[2].kv_orders, gone = multiprocessing.Pipe()
    gone.close()
    with pytest.raises(RankDiedError):
        world.pools.write(range(NUM_LAYERS), [1], world.random(NUM_LAYERS, 1))
