"""The Triton counterpart of apply_rotary: one program for each token, all heads."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_token,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,  # of NUM_HEADS * HALF
):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PADDED)
    mask = pair < NUM_HEADS * HALF
    head, at = pair // HALF, pair % HALF
    source = x_ptr + token * stride_token + head * stride_head + at
    first = tl.load(source, mask=mask).to(tl.float32)
    second = tl.load(source + HALF, mask=mask).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + at, mask=mask)
    sin = tl.load(sin_ptr + token * HALF + at, mask=mask)
    target = out_ptr + (token * NUM_HEADS + head) * (2 * HALF) + at
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask)


def triton_apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See rotary.apply_rotary. x: [T, heads, d], contiguous in d; cos, sin: [T, d/2] contiguous."""
    num_tokens, num_heads, width = x.shape
    out = torch.empty((num_tokens, num_heads, width), dtype=x.dtype, device=x.device)
    if num_tokens:
        rotary_kernel[(num_tokens,)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            x.stride(0),
            x.stride(1),
            NUM_HEADS=num_heads,
            HALF=width // 2,
            PADDED=triton.next_power_of_2(num_heads * width // 2),
        )
    return out
