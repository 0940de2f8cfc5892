"""The Triton counterpart of mask.apply_masks."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # token ids of a program


@triton.jit
def mask_kernel(
    logits_ptr, rows_ptr, words_ptr, stride_row, stride_words, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr
):
    tile, mask_row = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + mask_row).to(tl.int64)
    token_ids = tile * TILE + tl.arange(0, TILE)
    inside = token_ids < VOCAB_SIZE
    words = tl.load(words_ptr + mask_row * stride_words + token_ids // 32, mask=inside, other=-1)
    banned = ((words >> (token_ids % 32)) & 1) == 0
    minus_infinity = tl.full([TILE], float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride_row + token_ids, minus_infinity, mask=inside & banned)


def triton_apply_masks(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """See mask.apply_masks; rows of logits and words contiguous. One launch on the current stream."""
    vocab_size = logits.shape[1]
    assert logits.stride(1) == 1 and words.stride(1) == 1
    if len(rows):
        mask_kernel[(triton.cdiv(vocab_size, TILE), len(rows))](
            logits, rows, words, logits.stride(0), words.stride(0), VOCAB_SIZE=vocab_size, TILE=TILE
        )
