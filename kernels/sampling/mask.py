"""Which tokens may be drawn at all: one bit each, packed on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BITS = 32


class TokenMasks(NamedTuple):
    """Masks of R of a batch's rows.

    Attributes:
        rows: [R] int64, each once.
        words: [R, at least ceil(V / 32)] int32: bit i % 32 of word i // 32 is set where token i may be drawn.
    """

    rows: Tensor
    words: Tensor


def num_mask_words(vocab_size: int) -> int:
    """Words of a mask in memory: room for a bit of each token, and for one more, which says nothing of any token."""
    return vocab_size // BITS + 1


def apply_masks(logits: Tensor, masks: TokenMasks) -> None:
    """In place on [B, V], any float dtype: -inf where a row's bit is not set; rows without a mask stay."""
    logits[masks.rows] = logits[masks.rows].masked_fill_(~unpack_masks(masks.words, logits.shape[1]), float("-inf"))


def unpack_masks(words: Tensor, vocab_size: int) -> Tensor:
    """[R, vocab_size] bool."""
    bits = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(bits).bool()
