"""Prompts that begin in this step, by FlashAttention-3 (Shah et al., 2024): the optional wheel ``fa3-fwd``, on Hopper.

It reads contiguous keys and values only. A prompt without a prefix in the cache has all of them at hand: they have just
been computed. Measured on one H100, 16 query and 8 KV heads of 128: 532 TFLOP/s at 8 x 2,048 tokens and 725 at 16,384,
where the Triton kernel, which reads the cache, reaches 288 and 315.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.crossover import FLASH_MIN_MEAN_LENGTH
from pdray.kernels.processors import device_processors, num_processors


def first_flash_sequence(q: Tensor, meta: AttentionMetadata) -> int:
    """The sequences from this one on are for flash_prefill(); their number if none is."""
    num_sequences = len(meta.seq_lens)
    lengths = meta.query_lens[meta.fresh_from :]
    if sum(n * n for n in lengths) < FLASH_MIN_MEAN_LENGTH * max(1, sum(lengths)):
        return num_sequences
    return meta.fresh_from if is_available(q.device, q.dtype) and q.shape[2] % 8 == 0 else num_sequences


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
    longest = max(meta.query_lens[first:])
    starts = meta.cu_seqlens_q[first:]
    others = device_processors(q.device) - num_processors(q.device)  # its grid is persistent: as large as the device
    torch.ops.fa3_fwd.fwd(
        q, k, v, out=out, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, is_causal=True, num_splits=1, sm_margin=others,
    )  # fmt: skip
