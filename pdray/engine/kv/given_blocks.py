"""Blocks of sequences whose pool belongs to another process: each request brings the ones that are lent to it.

The other process decides which blocks those are, and which of them hold KV already. This account mirrors its grants,
so that a grant that cannot be right is refused before anything is written: blocks that are to be written are one live
request's alone.
"""

from __future__ import annotations

from collections.abc import Hashable

from pdray.engine.kv.allocator import KVAllocator
from pdray.engine.kv.block_pool import DUMMY_BLOCK, BlockPool
from pdray.engine.request import Reservation
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.sequence import LiveRequest, Sequence
from pdray.errors import RequestFailedError


class GivenBlocks(KVAllocator):
    """A KVAllocator that allocates nothing. Every request is prefill_only and has EngineRequest.given.

    Args:
        pool: as large as the one that is mapped, without a prefix cache of its own.
    """

    def __init__(self, limits: EngineLimits, pool: BlockPool) -> None:
        super().__init__(limits, pool)
        assert not pool.enable_prefix_caching
        self._writers: dict[int, Hashable] = {}  # of each block that a live request may write, its key

    def accept(self, request: LiveRequest) -> None:
        """See KVAllocator: its blocks are its own from now on.

        Raises:
            RequestFailedError: they cannot be.
        """
        given = request.request.given
        if given is None or not request.prefill_only:
            raise RequestFailedError(f"request {request.key!r} brings no blocks, and this engine has none of its own")
        if (problem := self._problem(request, given)) is not None:
            raise RequestFailedError(f"the blocks lent to request {request.key!r} cannot be right: {problem}")
        self._writers.update(dict.fromkeys(self._written(given), request.key))

    def allocate(self, owners: list[Sequence], num_tokens: int, *, keep_free: int = 0) -> bool:
        """See KVAllocator. There is always room: the blocks are there."""
        (lead,) = owners
        given = lead.request.request.given
        assert given is not None, lead.request.key
        self.pool.share(given.block_ids)
        lead.extend_blocks(given.block_ids)
        lead.num_computed_tokens = given.num_cached_tokens
        return True

    def grow(self, sequence: Sequence) -> bool:
        """See KVAllocator. What is computed here never outgrows its prompt."""
        raise AssertionError(f"request {sequence.request.key!r} decodes in blocks that are lent to it")

    def free(self, sequence: Sequence) -> None:
        """See KVAllocator."""
        super().free(sequence)
        given = sequence.request.request.given
        if given is not None and sequence is sequence.request.lead:
            for block in self._written(given):
                if self._writers.get(block) == sequence.request.key:
                    del self._writers[block]

    def _written(self, given: Reservation) -> list[int]:
        """Blocks that are to be computed, without those that hold a cached prefix."""
        return given.block_ids[given.num_cached_tokens // self.limits.block_size :]

    def _problem(self, request: LiveRequest, given: Reservation) -> str | None:
        blocks, num_cached_tokens = given
        num_tokens, block_size = len(request.lead.token_ids), self.limits.block_size
        if len(blocks) != self.limits.num_blocks_for(num_tokens):
            return f"they are {len(blocks)}, and {num_tokens} tokens need {self.limits.num_blocks_for(num_tokens)}"
        if num_cached_tokens % block_size or not 0 <= num_cached_tokens < num_tokens:
            return f"{num_cached_tokens} of {num_tokens} tokens are said to be cached, in blocks of {block_size}"
        if not all(DUMMY_BLOCK < block < self.pool.num_blocks for block in blocks):
            return f"they are {min(blocks)} to {max(blocks)}, of a pool of {self.pool.num_blocks}"
        if len(set(blocks)) < len(blocks):
            return "one is named twice"
        taken = next((block for block in blocks if block in self._writers), None)
        if taken is not None:
            return f"{taken} is request {self._writers[taken]!r}'s to write"
        read = next((block for block in self._written(given) if self.pool.is_used(block)), None)
        return None if read is None else f"{read} is read by another request"
