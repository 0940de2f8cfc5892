"""Which tokens may be drawn at all: one bit each, packed on the host, applied to logits in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = 32


class TokenMasks(NamedTuple):
    """Masks of R of a batch's rows.

    Attributes:
        rows: [R] int64, each once.
        words: [R, ceil(V / 32)] int32: bit i % 32 of word i // 32 is set where token i may be drawn.
    """

    rows: Tensor
    words: Tensor


def apply_masks(logits: Tensor, masks: TokenMasks) -> None:
    """In place on [B, V], any float dtype: -inf where a row's bit is not set; rows without a mask stay."""
    if logits.is_cuda:
        from pdray.kernels.sampling.mask_triton import triton_apply_masks

        return triton_apply_masks(logits, masks.rows, masks.words)
    logits[masks.rows] = logits[masks.rows].masked_fill_(~unpack_masks(masks.words, logits.shape[1]), float("-inf"))


def unpack_masks(words: Tensor, vocab_size: int) -> Tensor:
    """[R, vocab_size] bool."""
    bits = words[:, :, None] >> torch.arange(BITS, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)[:, :vocab_size]
