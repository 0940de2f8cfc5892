"""Tells the outside, during a step, which KV blocks have become final."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from pdray.engine.request import LayerGroupReady
from pdray.engine.schedule.plan import Chunk, StepPlan


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


def layer_callback(
    plan: StepPlan,
    num_layers: int,
    layer_group: int,
    block_size: int,
    notify: Callable[[LayerGroupReady], None],
    *,
    on_cuda: bool,
) -> Callable[[int], None] | None:
    """The decoder's callback after each layer; None if no request of the plan is prefill_only.

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

    def on_layer(layer: int) -> None:
        end = layer + 1
        if end % layer_group and end != num_layers:
            return
        layers = range((layer // layer_group) * layer_group, end)
        ready = None
        if on_cuda:
            ready = torch.cuda.Event()
            ready.record()
        for chunk, first_block, block_ids in final:
            notify(LayerGroupReady(chunk.sequence.request.key, layers, first_block, block_ids, ready))

    return on_layer
