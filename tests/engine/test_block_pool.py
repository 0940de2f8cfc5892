"""The block pool against a naive model of it, under random use."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from pdray.engine.kv.block_pool import BlockPool, hash_blocks, short_hash

NUM_BLOCKS = 8
NAMES = st.lists(st.integers(0, 5), max_size=4, unique=True)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, cache and free; the model keeps the free order as two plain lists."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.users: Counter[int] = Counter()
        self.hash_of: dict[int, bytes] = {}
        self.free_unknown = list(range(1, NUM_BLOCKS))
        self.free_cached: list[int] = []
        self.told: set[int] = set()

    def take(self) -> int:
        if self.free_unknown:
            return self.free_unknown.pop(0)
        block = self.free_cached.pop(0)
        del self.hash_of[block]
        return block

    @rule(target=held, num=st.integers(0, NUM_BLOCKS))
    def allocate(self, num: int) -> tuple[int, ...]:
        num_free = len(self.free_unknown) + len(self.free_cached)
        blocks = self.pool.allocate(num)
        assert (blocks is None) == (num > num_free)
        if blocks is None:
            return ()
        assert blocks == [self.take() for _ in range(num)]
        self.users.update(blocks)
        return tuple(blocks)

    @rule(target=held, names=NAMES, num=st.integers(0, 4), keep=st.integers(0, 2))
    def acquire_cached(self, names: list[int], num: int, keep: int) -> tuple[int, ...]:
        cached = self.pool.lookup([bytes([name]) for name in names])
        by_hash = {block_hash: block for block, block_hash in self.hash_of.items()}
        expected = []
        for name in names:
            if bytes([name]) not in by_hash:
                break
            expected.append(by_hash[bytes([name])])
        assert cached == expected
        revived = [block for block in cached if self.users[block] == 0]
        fresh = self.pool.acquire(cached, num, keep)
        num_free = len(self.free_unknown) + len(self.free_cached)
        assert (fresh is None) == (num + len(revived) + keep > num_free)
        if fresh is None:
            return ()
        for block in revived:
            self.free_cached.remove(block)
        assert fresh == [self.take() for _ in range(num)]
        self.users.update(cached + fresh)
        return (*cached, *fresh)

    @rule(blocks=held, name=st.integers(0, 5))
    def cache(self, blocks: tuple[int, ...], name: int) -> None:
        live = [block for block in blocks if self.users[block]]
        if live:
            self.pool.cache(live[0], bytes([name]))
            if bytes([name]) not in self.hash_of.values():
                self.hash_of.setdefault(live[0], bytes([name]))

    @rule(blocks=consumes(held))
    def free(self, blocks: tuple[int, ...]) -> None:
        self.pool.free(list(blocks))
        self.users.subtract(blocks)
        for block in reversed(blocks):
            if self.users[block] == 0:
                if block in self.hash_of:
                    self.free_cached.append(block)
                else:
                    self.free_unknown.insert(0, block)

    @rule()
    def tell_changes(self) -> None:
        """Told changes add up to what is cached, and nothing is told twice."""
        added, removed = self.pool.take_changes()
        assert not added & self.told and removed <= self.told and not added & removed
        self.told = (self.told - removed) | added
        assert self.told == {short_hash(block_hash) for block_hash in self.hash_of.values()}

    @invariant()
    def accounts_agree(self) -> None:
        assert self.pool.check(self.users) == []
        assert self.pool.num_free == len(self.free_unknown) + len(self.free_cached)
        assert self.pool.num_cached == len(self.hash_of)

    @precondition(lambda self: sum(self.users.values()) > 0)
    @rule()
    def check_sees_a_leak(self) -> None:
        block = next(block for block, count in self.users.items() if count)
        assert self.pool.check(self.users - Counter([block])) != []


TestPool = PoolMachine.TestCase


def test_hashes_name_whole_prefixes_and_are_the_same_in_every_process() -> None:
    tokens = list(range(100, 140))
    hashes = hash_blocks(tokens, 16)
    assert [h.hex() for h in hashes] == ["370fb46b913ad658067cf47c4284d703", "5fe845b2a59fab98ec8772ea5d93c792"]
    assert hash_blocks(tokens[16:], 16, hashes[0]) == hashes[1:]
    other = hash_blocks([1, *tokens[1:]], 16)
    assert other[0] != hashes[0] and other[1] != hashes[1]


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(4, enable_prefix_caching=False)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.cache(blocks[0], b"x")
    assert pool.lookup([b"x"]) == []


def test_a_pool_needs_a_block_beside_the_dummy() -> None:
    with pytest.raises(ValueError, match="num_blocks is 1.*at least 2"):
        BlockPool(1)
