"""Checks of the kernel that applies token masks; see attention_cases.py."""

from __future__ import annotations

import os

import torch

from pdray.kernels.sampling.mask import TokenMasks, apply_masks
from pdray.kernels.sampling.mask_triton import TILE, triton_apply_masks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def check(dtype: torch.dtype, num_rows: int, num_masks: int, vocab_size: int) -> None:
    """Exactly the reference, also where the logits' rows are part of a larger tensor."""
    logits = torch.randn(num_rows, vocab_size + 3).to(dtype)
    num_words = -(-vocab_size // 32)
    words = torch.randint(-(2**31), 2**31, (num_masks, num_words + 1), dtype=torch.int64).to(torch.int32)[:, :num_words]
    rows = torch.randperm(num_rows)[:num_masks]
    expected, out = logits.clone(), logits.to(DEVICE)
    apply_masks(expected[:, :vocab_size], TokenMasks(rows, words))
    triton_apply_masks(out[:, :vocab_size], rows.to(DEVICE), words.to(DEVICE))
    assert torch.equal(out.cpu(), expected)
    print(f"mask {dtype} {num_rows}x{vocab_size}, {num_masks} masks passed")


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, num_masks, vocab_size in ((1, 1, 31), (3, 2, 199), (5, 5, TILE), (4, 3, 2 * TILE + 77)):
            check(dtype, num_rows, num_masks, vocab_size)
