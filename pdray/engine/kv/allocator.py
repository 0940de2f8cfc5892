"""Allocation of blocks to a request's completions: prefix hits, shared prompts, private tails, growth."""

from __future__ import annotations

from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.request import Reservation
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.sequence import BlockCopy, LiveRequest, Sequence


class KVAllocator:
    """Gives blocks to sequences and takes them back. Not thread-safe."""

    def __init__(self, limits: EngineLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool

    def accept(self, request: LiveRequest) -> None:
        """A request has come, and will be given blocks."""

    def hash_prompt(self, sequence: Sequence) -> None:
        """Compute the hashes that allocate() needs. Touches nothing but the sequence."""
        if self.pool.enable_prefix_caching:
            sequence.update_hashes(self.limits.block_size)

    def allocate(self, owners: list[Sequence], num_tokens: int, *, keep_free: int = 0) -> bool:
        """Blocks for sequences that have the same tokens and hold none; all or nothing.

        Full blocks are shared; what lies beyond is private. The first owner's num_computed_tokens becomes the number
        of tokens found in the prefix cache: all of them only if a private block remains, so that the last token can
        still be computed here, in a block of its own (leave_last_block_to_compute). None where every prompt token is to
        be scored.

        Args:
            num_tokens: room for each owner, at least its tokens.
        """
        lead, block_size = owners[0], self.limits.block_size
        length = len(lead.token_ids)
        num_shared = length // block_size
        num_private = self.limits.num_blocks_for(num_tokens) - num_shared
        self.hash_prompt(lead)
        cached = [] if lead.request.scores is not None else self.pool.lookup(lead.block_hashes)
        if len(cached) * block_size == length and num_private == 0:
            cached.pop()
        fresh = self.pool.acquire(cached, num_shared - len(cached) + len(owners) * num_private, keep_free)
        if fresh is None:
            return False
        end = num_shared - len(cached)
        shared = cached + fresh[:end]
        for owner in owners:
            owner.extend_blocks(shared + fresh[end : end + num_private])
            end += num_private
        for _ in owners[1:]:
            self.pool.share(shared)
        lead.num_computed_tokens = len(cached) * block_size
        lead.num_hashed_blocks = len(cached)
        return True

    def owners(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that get blocks together with this one."""
        request = sequence.request
        return [sequence] if request.forked or request.prefill_only else request.sequences

    def reservation(self, sequence: Sequence) -> Reservation:
        """The blocks of its tokens, without those of head-room, and how much of them is cached."""
        num_blocks = self.limits.num_blocks_for(len(sequence.token_ids))
        return Reservation(sequence.block_table[:num_blocks], sequence.num_computed_tokens)

    def leave_last_block_to_compute(self, request: LiveRequest) -> None:
        """Exchange the last block for a private one if the whole prompt was cached."""
        lead, block_size = request.lead, self.limits.block_size
        if lead.num_computed_tokens < len(lead.token_ids):
            return
        position = len(lead.token_ids) // block_size - 1
        block = lead.pop_block()
        for owner in self.owners(lead):
            if owner is not lead:
                self.pool.share([block])
            self.pool.free([owner.replace_block(position, block)])
        lead.num_computed_tokens = position * block_size
        lead.num_hashed_blocks = position

    def fork(self, request: LiveRequest) -> None:
        """The prompt is computed: let every sequence go on by itself."""
        lead, block_size = request.lead, self.limits.block_size
        request.forked = True
        length = lead.num_computed_tokens
        position = length // block_size
        for fork in request.sequences[1:]:
            fork.token_ids = lead.token_ids[:length]
            fork.block_hashes = list(lead.block_hashes)
            fork.num_computed_tokens = length
            fork.num_hashed_blocks = lead.num_hashed_blocks
            if length % block_size:
                source = lead.block_table[position]
                self.pool.share([source])
                fork.pending_copy = BlockCopy(source, fork.block_table[position])

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether the sequence's tokens have outgrown its blocks (by one, while it decodes)."""
        return len(sequence.block_table) * self.limits.block_size < sequence.num_tokens

    def grow(self, sequence: Sequence) -> bool:
        """One more block; False if there is none."""
        fresh = self.pool.allocate(1)
        if fresh is not None:
            sequence.extend_blocks(fresh)
        return fresh is not None

    def cache_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Offer the full blocks of the first ``num_tokens`` tokens, whose KV is there, to the prefix cache."""
        num_full = num_tokens // self.limits.block_size
        if num_full > sequence.num_hashed_blocks and self.pool.enable_prefix_caching:
            hashes = sequence.update_hashes(self.limits.block_size)
            for i in range(sequence.num_hashed_blocks, num_full):
                self.pool.cache(sequence.block_table[i], hashes[i])
            sequence.num_hashed_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Take back everything that the sequence holds."""
        if sequence.pending_copy is not None:
            self.pool.free([sequence.pending_copy.source])
            sequence.pending_copy = None
        self.pool.free(sequence.take_blocks())
