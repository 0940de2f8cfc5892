"""Paged attention on CUDA: the Triton counterpart of torch_paged_attention.

The first ``num_decodes`` sequences, of one query token each, go to decode_triton.py; all others to prefill_triton.py,
or, long prompts without a cached prefix, to flash.py where that is available.

The launch grids depend on the shapes of the tensors alone and the lengths are read on the GPU, so that a captured graph
serves any lengths. Keys at or past a row's visible length are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdray.kernels.attention.decode_triton import launch_decode
from pdray.kernels.attention.flash import (
    can_flash,
    first_flash_sequence,
    flash_fresh,
    flash_gathered,
    flash_prefill,
    is_worth_gathering,
)
from pdray.kernels.attention.online_softmax_triton import Tiles
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.attention.prefill_triton import launch_prefill


def triton_paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    *,
    num_splits: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The Triton path of paged_attention, same contract. Runs on the current stream and never synchronises.

    Args:
        num_splits: programs that share one sequence's decode step; default: see choose_num_splits.
    """
    assert q.stride(2) == 1 and kv_layer.is_contiguous(), "q's head_dim and all of kv_layer must be contiguous"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if meta.split is not None and new_k is not None and new_v is not None and can_flash(q):
        launch_prefill(q, kv_layer, meta, len(meta.seq_lens), scale, out, tiles, meta.split)
        flash_fresh(q, new_k, new_v, meta.split, scale, out)
        return out
    flash = first_flash_sequence(q, meta) if new_k is not None else len(meta.seq_lens)
    if is_worth_gathering(meta, flash) and can_flash(q):
        flash_gathered(q, kv_layer, meta, flash, scale, out)
    elif meta.num_decodes < flash:
        launch_prefill(q, kv_layer, meta, flash, scale, out, tiles)
    if flash < len(meta.seq_lens):
        assert new_k is not None and new_v is not None
        flash_prefill(q, new_k, new_v, meta, flash, scale, out)
    if meta.num_decodes:
        launch_decode(q, kv_layer, meta, scale, out, num_splits, tiles)
    return out
