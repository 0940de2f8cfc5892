"""Blocks of the KV pool: who uses them, which prefixes they hold, which one is taken next.

A block is free (reference count 0) or in use. A free block may still hold the keys and values of a known prefix;
such blocks are taken last, least recently used first, and can be brought back by acquire(). Prefixes are named
by a chain of hashes: a block's hash covers its own tokens and, through its parent's hash, all before them
(as in vLLM's automatic prefix caching). The hash is the same in every process.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

DUMMY_BLOCK = 0  # padding rows write there
HASH_BYTES = 16
CHECK_SLICE = 1024  # blocks, or entries of the prefix cache, that a check looks at in one go
MAX_CHECK_RESTARTS = 3


def hash_blocks(token_ids: Sequence[int], block_size: int, parent: bytes = b"") -> list[bytes]:
    """Hashes of the full blocks of ``token_ids``, which follow the block whose hash is ``parent``."""
    data = struct.pack(f"<{len(token_ids)}i", *token_ids)  # in a third of numpy's time
    num_bytes = 4 * block_size
    hashes = []
    for end in range(num_bytes, len(data) + 1, num_bytes):
        parent = hashlib.blake2b(parent + data[end - num_bytes : end], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def salted(cache_salt: str | None) -> bytes:
    """What stands for the parent of a first block: blocks of different salts have different hashes."""
    return b"" if cache_salt is None else hashlib.blake2b(cache_salt.encode(), digest_size=HASH_BYTES).digest()


def short_hash(block_hash: bytes) -> int:
    """64 bits of it: enough to guess where a prefix is cached, and half as long."""
    return int.from_bytes(block_hash[:8], "little")


class PrefixChanges(NamedTuple):
    """Prefixes that have entered and left a cache, as short hashes."""

    added: set[int]
    removed: set[int]


class BlockPool:
    """Reference counts, free list and prefix cache of blocks 1 … num_blocks - 1. Not thread-safe.

    Args:
        num_blocks: with the dummy block, which is never handed out.
        enable_prefix_caching: without it, cache() does nothing and lookup() finds nothing.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; block {DUMMY_BLOCK} is reserved, so it must be at least 2")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._cache_version = 0  # changes whenever _cached does
        self._changes = PrefixChanges(set(), set())
        # Next one to take first: blocks without a known prefix, then cached ones by last use.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def capacity(self) -> int:
        """Blocks that requests can have at most."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, cached and unreferenced ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a known prefix, in use or free."""
        return len(self._cached)

    def take_changes(self) -> PrefixChanges:
        """Changes of the prefix cache since the last call. They are never more than twice the blocks."""
        changes, self._changes = self._changes, PrefixChanges(set(), set())
        return changes

    def _note(self, block_hash: bytes, into: set[int], out_of: set[int]) -> None:
        short = short_hash(block_hash)
        if short in out_of:
            out_of.remove(short)  # it was not told yet
        else:
            into.add(short)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of this chain. Changes nothing; acquire() takes them."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, cached: Sequence[int], num_new: int, keep_free: int = 0) -> list[int] | None:
        """Take a reference on each of ``cached``, and ``num_new`` fresh blocks; all or nothing.

        Args:
            cached: from lookup(), with nothing allocated in between.
            keep_free: blocks that must remain free afterwards.

        Returns:
            The fresh blocks; None, with nothing changed, if there are not enough.
        """
        num_revived = sum(self._ref_counts[block] == 0 for block in cached)
        if num_new + num_revived + keep_free > len(self._free):
            return None
        self.share(cached)
        return self._take(num_new)

    def allocate(self, num_new: int) -> list[int] | None:
        """``num_new`` fresh blocks, or None."""
        return self.acquire((), num_new)

    def is_shared(self, block: int) -> bool:
        """Whether it has more than one user."""
        return self._ref_counts[block] > 1

    def is_used(self, block: int) -> bool:
        """Whether it has any user."""
        return self._ref_counts[block] > 0

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference on each; brings free cached blocks back into use."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference on each of a sequence's blocks, last first: tails are taken again before heads."""
        for block in reversed(blocks):
            count = self._ref_counts[block]
            assert count > 0, f"block {block} is free already"
            self._ref_counts[block] = count - 1
            if count == 1:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def cache(self, block: int, block_hash: bytes) -> None:
        """``block`` holds the prefix that ``block_hash`` names. The first block to hold one keeps the name."""
        assert self._ref_counts[block] > 0, f"block {block} is cached while free"
        if self.enable_prefix_caching and block_hash not in self._cached and self._hashes[block] is None:
            self._cached[block_hash] = block
            self._hashes[block] = block_hash
            self._cache_version += 1
            self._note(block_hash, self._changes.added, self._changes.removed)

    def _take(self, num_new: int) -> list[int]:
        free, hashes, ref_counts = self._free, self._hashes, self._ref_counts
        blocks = [free.popitem(last=False)[0] for _ in range(num_new)]
        for block in blocks:
            ref_counts[block] = 1
            if (block_hash := hashes[block]) is not None:
                del self._cached[block_hash]
                hashes[block] = None
                self._cache_version += 1
                self._note(block_hash, self._changes.removed, self._changes.added)
        return blocks

    def check(self, expected: Counter[int]) -> list[str]:
        """Problems, given how often each block is referenced by its users; empty if there are none."""
        uses = [expected[block] for block in range(self.num_blocks)]
        return [*self.check_blocks(0, uses), *chain.from_iterable(self.check_cache())]

    def check_blocks(self, first: int, uses: Sequence[int]) -> list[str]:
        """Problems of the blocks from ``first`` on, one for each of ``uses``; see check()."""
        problems = []
        for block, num_uses in enumerate(uses, first):
            count = self._ref_counts[block]
            if count != num_uses:
                problems.append(f"block {block} has {count} references, but {num_uses} users")
            if (count == 0) != (block in self._free) and block != DUMMY_BLOCK:
                problems.append(
                    f"block {block} has {count} references and is{'' if count else ' not'} on the free list"
                )
            block_hash = self._hashes[block]
            if block_hash is not None and self._cached.get(block_hash) != block:
                problems.append(f"block {block} has a hash that the prefix cache does not know")
            if block == DUMMY_BLOCK and (block in self._free or num_uses):
                problems.append(f"the dummy block {block} is in circulation")
        return problems

    def check_cache(self) -> Iterator[list[str]]:
        """Problems of the prefix cache's own entries, slice by slice; the pool may change between two.

        A cache that has changed is gone through again. One that never stays as it is for long enough is listed first,
        which at half a million entries takes some milliseconds.
        """
        for _ in range(MAX_CHECK_RESTARTS):
            version, entries = self._cache_version, iter(self._cached.items())
            while version == self._cache_version and (part := list(islice(entries, CHECK_SLICE))):
                yield self._check_entries(part)
            if version == self._cache_version:
                return
        keys = list(self._cached)
        for start in range(0, len(keys), CHECK_SLICE):
            known = [key for key in keys[start : start + CHECK_SLICE] if key in self._cached]
            yield self._check_entries([(key, self._cached[key]) for key in known])

    def _check_entries(self, entries: list[tuple[bytes, int]]) -> list[str]:
        return [
            f"the prefix cache names block {block}, which holds something else"
            for block_hash, block in entries
            if self._hashes[block] != block_hash
        ]
