"""Writing to, copying within and moving blocks in and out of the KV pool.

The pool is one tensor per worker: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim],
[:, :, 0] keys and [:, :, 1] values. Block 0 is the dummy block that padding rows write to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    """Write each token's key and value into its slot of one layer.

    Args:
        k, v: [T, num_kv_heads, head_dim].
        kv_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim]; written in place.
        slot_mapping: [T] int64, block * block_size + offset. Where a slot repeats (only the dummy block's
            should), one of its tokens wins.
    """
    block_size = kv_layer.shape[2]
    blocks = slot_mapping // block_size
    offsets = slot_mapping % block_size
    kv_layer[blocks, 0, offsets] = k.to(kv_layer.dtype)
    kv_layer[blocks, 1, offsets] = v.to(kv_layer.dtype)


def copy_blocks(kv: Tensor, pairs: list[tuple[int, int]]) -> None:
    """Copy whole blocks (source, destination) in all layers; destinations are distinct.

    Every source is read before any block is written.
    """
    if not pairs:
        return
    layers = range(len(kv))
    sources, destinations = (list(ids) for ids in zip(*pairs, strict=True))
    scatter_blocks(kv, layers, destinations, gather_blocks(kv, layers, sources))


def gather_blocks(kv: Tensor, layers: range, block_ids: list[int]) -> Tensor:
    """Copy blocks of a range of layers out of the pool.

    Returns:
        [len(layers), len(block_ids), 2, block_size, num_kv_heads, head_dim], contiguous, the pool's dtype and device.

    Raises:
        ValueError: if layers is not a range of consecutive layers of this pool.
    """
    source = _layers(kv, layers)
    index = _to_device(block_ids, kv.device)
    if kv.is_cuda:
        from pdray.kernels.kv.blocks_triton import triton_gather_blocks

        return triton_gather_blocks(source, index)
    return source.index_select(1, index)


def scatter_blocks(kv: Tensor, layers: range, block_ids: list[int], data: Tensor) -> None:
    """Write what gather_blocks returned into blocks of the same layers of this pool.

    Raises:
        ValueError: if data's shape or dtype is not what gather_blocks would return here.
    """
    target = _layers(kv, layers)
    expected = (len(layers), len(block_ids), *kv.shape[2:])
    if tuple(data.shape) != expected or data.dtype != kv.dtype:
        raise ValueError(f"data is {tuple(data.shape)} {data.dtype}; the blocks are {expected} {kv.dtype}")
    index = _to_device(block_ids, kv.device)
    data = data.to(kv.device)
    if kv.is_cuda:
        from pdray.kernels.kv.blocks_triton import triton_scatter_blocks

        return triton_scatter_blocks(target, index, data)
    target.index_copy_(1, index, data)


def _to_device(block_ids: list[int], device: torch.device) -> Tensor:
    """[n] int64. On CUDA from pinned memory: the host does not wait for what was launched before."""
    return torch.tensor(block_ids, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _layers(kv: Tensor, layers: range) -> Tensor:
    if layers.step != 1 or not 0 <= layers.start <= layers.stop <= kv.shape[0]:
        raise ValueError(f"layers is {layers}; it must be a range with step 1 within 0..{kv.shape[0]}")
    return kv[layers.start : layers.stop]
