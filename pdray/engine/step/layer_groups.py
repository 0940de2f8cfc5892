"""Tells the outside, during a step, which KV blocks have become final: a group of layers after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

from pdray.engine.request import LayerGroupReady
from pdray.engine.schedule.plan import Chunk, StepPlan

# What a group must hold to be worth a message and a kernel: 50 us of NVLink. So much may be left when the last layer's
# attention is done; the output head takes longer.
WORTH_BYTES = 16 * 1024 * 1024

# How many times the next group's layers a group may have: it is sent while those are computed, and sending a layer
# takes a tenth of computing it, or a fifth on a device that is shared.
TAPER = 4

# Called after each group of layers, with the event after which its KV is final (CUDA).
OnGroup = Callable[[range, Any], None]


def layer_groups(num_layers: int, layer_bytes: int, largest: int, worth_bytes: int = WORTH_BYTES) -> list[range]:
    """Layers of a step that are told of together, in order.

    The last group is the smallest that is worth it, for nothing computes beside its transfer, and the one before it so
    small that it is sent by then (TAPER); the others are alike and have at most ``largest`` layers, unless so few are
    not worth it. A small step is one group.

    Args:
        layer_bytes: KV of the step's tokens in one layer.
    """
    worth = max(1, min(num_layers, -(-worth_bytes // max(1, layer_bytes))))
    most = max(largest, worth)
    sizes, rest = [worth], num_layers - worth  # from the last group on
    if rest < worth:
        return [range(num_layers)]
    while (size := TAPER * sizes[-1]) < most and rest - size >= worth:
        sizes.append(size)
        rest -= size
    number = -(-rest // most)
    sizes += [(rest + i) // number for i in range(number)]
    stops = list(accumulate(reversed(sizes)))
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


class FinalBlocks(NamedTuple):
    """Blocks of one request that this step completes, in every layer.

    Attributes:
        first_block: index in the request's block table of block_ids[0].
    """

    chunk: Chunk
    first_block: int
    block_ids: list[int]


def find_final_blocks(chunk: Chunk, num_cached_tokens: int, block_size: int) -> FinalBlocks:
    """Cached prefix blocks ride with the first chunk; a partial block is final only at the prompt's end."""
    table, length = chunk.sequence.block_table, len(chunk.sequence.token_ids)
    first = 0 if chunk.start == num_cached_tokens else chunk.start // block_size
    last = -(-chunk.end // block_size) if chunk.end == length else chunk.end // block_size
    return FinalBlocks(chunk, first, table[first:last])


def group_callback(plan: StepPlan, block_size: int, notify: Callable[[LayerGroupReady], None]) -> OnGroup | None:
    """The lane's callback after each group of layers; None if no request of the plan is prefill_only.

    Call it under the engine's lock; the result needs no lock, for blocks of a step in flight stay where they are.
    """
    final = [
        find_final_blocks(chunk, chunk.sequence.request.num_cached_tokens or 0, block_size)
        for chunk in plan.chunks
        if chunk.sequence.request.prefill_only
    ]
    final = [blocks for blocks in final if blocks.block_ids]
    if not final:
        return None

    def on_group(layers: range, ready: Any) -> None:
        for chunk, first_block, block_ids in final:
            notify(LayerGroupReady(chunk.sequence.request.key, layers, first_block, block_ids, ready))

    return on_group
