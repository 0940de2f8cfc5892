"""Long prompts, and chunks of them, by FlashAttention-3 (Shah et al., 2024): the optional wheel ``fa3-fwd``, on Hopper.

It reads contiguous keys and values only. A prompt without a prefix in the cache has all of them at hand: they have just
been computed. Behind a prefix they are copied together first, one layer at a time. Measured on one H100, 16 query and 8
KV heads of 128: 532 TFLOP/s at 8 x 2,048 tokens and 725 at 16,384, where the Triton kernel, which reads the cache,
reaches 288 and 315.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from pdray.kernels.attention.paged import AttentionMetadata, FreshSplit
from pdray.kernels.crossover import FLASH_MAX_GATHERED_KEYS, FLASH_MIN_MEAN_LENGTH, FLASH_MIN_QUERIES_PER_KEY
from pdray.kernels.processors import device_processors, num_processors


def first_flash_sequence(q: Tensor, meta: AttentionMetadata) -> int:
    """The sequences from this one on are for flash_prefill(); their number if none is."""
    lengths = meta.query_lens[meta.fresh_from :]
    are_long = sum(n * n for n in lengths) >= FLASH_MIN_MEAN_LENGTH * max(1, sum(lengths))
    return meta.fresh_from if are_long and can_flash(q) else len(meta.seq_lens)


def is_worth_gathering(meta: AttentionMetadata, end: int) -> bool:
    """are_worth_gathering() of the sequences between the decodes and ``end``.

    False where the host does not know their lengths: in a graph.
    """
    return are_worth_gathering(meta.query_lens[meta.num_decodes : end], meta.kv_lens[meta.num_decodes : end])


def are_worth_gathering(query_lens: list[int], kv_lens: list[int]) -> bool:
    """Whether sequences behind prefixes have so many queries that their keys are worth a copy."""
    num_keys = sum(kv_lens)
    pairs = sum(n * kv_len for n, kv_len in zip(query_lens, kv_lens, strict=True))
    return 0 < FLASH_MIN_QUERIES_PER_KEY * num_keys <= pairs and num_keys <= FLASH_MAX_GATHERED_KEYS


def can_flash(q: Tensor) -> bool:
    """Whether FlashAttention takes such queries, [T, num_heads, d], here."""
    return takes_heads(q.device, q.dtype, q.shape[2])


def takes_heads(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention takes heads of this width here."""
    return is_available(device, dtype) and head_dim % 8 == 0


@lru_cache(maxsize=16)
def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the wheel is installed, and made for this GPU and type."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if find_spec("fa3_fwd") is None:
        return False
    importlib.import_module("fa3_fwd._C")  # registers torch.ops.fa3_fwd
    return True


def flash_prefill(
    q: Tensor, k: Tensor, v: Tensor, meta: AttentionMetadata, first: int, scale: float, out: Tensor
) -> None:
    """Causal attention of the sequences from ``first`` on, which have no keys but these, into their rows of ``out``.

    Args:
        q: [T, num_heads, d]. k, v: [T, num_kv_heads, d], of the step's tokens. out: [T, num_heads, d].
    """
    starts, longest = meta.cu_seqlens_q[first:], max(meta.query_lens[first:])
    _attend(q, k, v, starts, starts, longest, longest, scale, out)


def flash_fresh(q: Tensor, k: Tensor, v: Tensor, split: FreshSplit, scale: float, out: Tensor) -> None:
    """flash_prefill() of the sequences that the device knows to be fresh; others' rows of ``out`` stay as they are."""
    _attend(q, k, v, split.fresh_starts, split.fresh_starts, len(q), len(q), scale, out)


def flash_gathered(q: Tensor, kv_layer: Tensor, meta: AttentionMetadata, end: int, scale: float, out: Tensor) -> None:
    """Causal attention of the sequences between the decodes and ``end`` over their keys in the cache.

    Args:
        q, out: [T, num_heads, d].
    """
    from pdray.kernels.attention.gather_triton import triton_gather_kv

    first = meta.num_decodes
    kv_lens = meta.kv_lens[first:end]
    starts = gathered_starts(meta, end)
    k, v = triton_gather_kv(kv_layer, meta.block_tables[first:end], meta.seq_lens[first:end], starts, kv_lens)
    longest = max(meta.query_lens[first:end]), max(kv_lens)
    _attend(q, k, v, meta.cu_seqlens_q[first : end + 1], starts, *longest, scale, out)


def load_gather(kv_layer: Tensor) -> None:
    """Compile and load what flash_gathered() needs besides FlashAttention, before a request does. Reads block 0."""
    from pdray.kernels.attention.gather_triton import triton_gather_kv

    starts = torch.tensor([0, 1], dtype=torch.int32, device=kv_layer.device)
    triton_gather_kv(kv_layer, starts[None, :1], starts[1:], starts, [1])


def gathered_starts(meta: AttentionMetadata, end: int) -> Tensor:
    """[end - num_decodes + 1] int32: where each of these sequences' gathered keys begin, and the end of all."""
    if end not in meta.gathered:
        starts = [0, *accumulate(meta.kv_lens[meta.num_decodes : end])]
        on_host = torch.tensor(starts, dtype=torch.int32, pin_memory=meta.seq_lens.is_cuda)
        meta.gathered[end] = on_host.to(meta.seq_lens.device, non_blocking=True)
    return meta.gathered[end]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    out: Tensor,
) -> None:
    others = device_processors(q.device) - num_processors(q.device)  # its grid is persistent: as large as the device
    torch.ops.fa3_fwd.fwd(
        q, k, v, out=out, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k,
        softmax_scale=scale, is_causal=True, num_splits=1, sm_margin=others,
    )  # fmt: skip
