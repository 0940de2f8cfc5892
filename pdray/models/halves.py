"""Layers of a large step in two halves of its rows: ranks compute one half while the other half's sums are made.

Half a step of 8,192 tokens still fills a GPU, whose link and whose multiprocessors would otherwise take turns. Only
attention needs all rows, whose keys and values it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.collective.group import PendingSum, RankGroup

if TYPE_CHECKING:
    from pdray.models.decoder import DecoderLayer


def is_worth_halves(hidden: torch.Tensor, group: RankGroup | None) -> bool:
    """Whether this step is that large; the same on all ranks."""
    if group is None or group.size == 1 or len(hidden) < 2:
        return False
    return hidden.numel() * hidden.element_size() >= group.halves_bytes


def reserve_halves(group: RankGroup, num_tokens: int, row_bytes: int) -> None:
    """Prepare for steps of so many tokens at most, if they are that large; all ranks at once."""
    if group.size > 1 and num_tokens * row_bytes >= group.halves_bytes:
        group.reserve(-(-num_tokens // 2) * row_bytes)


def run_in_halves(
    layers: list[DecoderLayer],
    order: list[int],
    hidden: torch.Tensor,
    positions: torch.Tensor,
    kv: torch.Tensor,
    meta: AttentionMetadata,
    on_layer: Callable[[int], None] | None,
) -> torch.Tensor:
    """What the layers named by ``order`` make of all rows, [T, hidden_size], one after the other; see Decoder.forward.

    All ranks begin the same sums in the same order, and each is waited for on the stream that it was begun from.
    """
    halves = [PendingSum.made(half) for half in hidden.chunk(2)]
    for i in order:
        layer = layers[i]
        halves = _attend(layer, halves, positions, kv[i], meta)
        if on_layer is not None:
            halves[0].arrive()  # of any sum all ranks' parts come after they stored this layer's KV and attended to it
            on_layer(i)
        halves = [layer.mlp.begin(half, layer.post_attention_norm) for half in halves]
    return torch.cat([half.wait() for half in halves])


def _attend(
    layer: DecoderLayer,
    halves: list[PendingSum],
    positions: torch.Tensor,
    kv_layer: torch.Tensor,
    meta: AttentionMetadata,
) -> list[PendingSum]:
    attention, norm = layer.attention, layer.input_norm
    first = halves[0].normed(norm.weight, norm.eps)
    qkv = first.new_empty(len(positions), sum(span.size for span in attention.qkv.out_features.values()))
    rows = qkv.chunk(2)
    attention.qkv(first, out=rows[0])
    attention.qkv(halves[1].normed(norm.weight, norm.eps), out=rows[1])
    attended = attention.of_projected(qkv, positions, kv_layer, meta)
    return [attention.o.begin(part, residual=half.wait()) for part, half in zip(attended.chunk(2), halves, strict=True)]
