"""Writes into and copies within the paged KV pool.

The pool is one tensor ``kv`` [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]; keys are
[:, :, 0], values [:, :, 1]. A slot is block * block_size + offset. Block 0 is the dummy block that
padding rows write to.
"""

from __future__ import annotations

import torch


def store_kv(k: torch.Tensor, v: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write k, v [T, Hkv, d] to slots [T] (int64) of one layer [N, 2, bs, Hkv, d]."""
    block_size = kv_layer.shape[2]
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    offsets = slot_mapping - blocks * block_size
    kv_layer[blocks, 0, offsets] = k
    kv_layer[blocks, 1, offsets] = v


def copy_blocks(kv: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """Copy whole blocks, all layers; pairs of (source, destination), destinations distinct."""
    if pairs:
        source, destination = (torch.tensor(ids, device=kv.device) for ids in zip(*pairs, strict=True))
        kv[:, destination] = kv[:, source]


def gather_blocks(kv: torch.Tensor, layers: range, block_ids: list[int]) -> torch.Tensor:
    """Contiguous copy [len(layers), n, 2, bs, Hkv, d] of some blocks of some layers."""
    ids = torch.tensor(block_ids, dtype=torch.int64, device=kv.device)
    return kv[layers.start : layers.stop].index_select(1, ids)


def scatter_blocks(kv: torch.Tensor, layers: range, block_ids: list[int], blocks: torch.Tensor) -> None:
    """Inverse of gather_blocks: write ``blocks`` into the pool."""
    ids = torch.tensor(block_ids, dtype=torch.int64, device=kv.device)
    kv[layers.start : layers.stop].index_copy_(1, ids, blocks)
