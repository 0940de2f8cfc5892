"""The blocks and places that a lease takes: the one formula by which routers ask and workers grant."""

from __future__ import annotations

from typing import NamedTuple


class Demand(NamedTuple):
    """Resources that a request needs of its decode worker, and of the worker that computes its prompt.

    Attributes:
        blocks: free blocks that are always enough; blocks cached there and in use need not be free.
        places: sequences in the batch.
        tokens: to compute: prompt and earlier outputs.
        length: of each completion at its end, prompt included.
    """

    blocks: int
    places: int
    tokens: int
    length: int = 0


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def num_start_blocks(num_tokens: int, num_room: int, num_owners: int, block_size: int) -> int:
    """Blocks that all completions need at once: full blocks of the prompt shared, the rest for each its own.

    Args:
        num_tokens: prompt and earlier outputs. num_room: tokens that each completion is to have room for.
    """
    num_shared = num_tokens // block_size
    return num_shared + num_owners * (num_blocks_for(num_room, block_size) - num_shared)


def num_reserved_tokens(num_tokens: int, length: int, headroom_tokens: int) -> int:
    """Tokens whose KV a lease has room for from the start; the last token's KV is never stored.

    Args:
        num_tokens: prompt and earlier outputs. length: see Demand.
    """
    return max(num_tokens, min(num_tokens + headroom_tokens, length - 1))


def lease_demand(
    num_tokens: int, length: int, num_completions: int, *, block_size: int, headroom_tokens: int
) -> Demand:
    """The demand of a lease for these completions.

    Args:
        num_tokens: prompt and earlier outputs. length: see Demand.
        headroom_tokens: output tokens whose blocks a lease holds from the start (decode_headroom_tokens).
    """
    room = num_reserved_tokens(num_tokens, length, headroom_tokens)
    return Demand(num_start_blocks(num_tokens, room, num_completions, block_size), num_completions, num_tokens, length)
