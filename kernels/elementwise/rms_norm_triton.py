"""The Triton counterpart of rms_norm: one program for each row, which it reads and writes once."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    stride_outer,
    stride_inner,
    num_inner,
    eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Every value is rounded to x's type where torch would."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED_WIDTH)
    mask = element < WIDTH
    start = row // num_inner * stride_outer + row % num_inner * stride_inner
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + element, mask=mask, other=0.0).to(tl.float32)
    begin(DEPENDENT)
    x = tl.load(x_ptr + start + element, mask=mask, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    tl.store(out_ptr + row * WIDTH + element, (normed.to(dtype).to(tl.float32) * weight).to(dtype), mask=mask)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See layernorm.rms_norm. x: [T, H], or [T, heads, H] with heads and rows anywhere but H contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    is_heads = x.dim() == 3
    width = x.shape[-1]
    num_rows = x.numel() // width
    padded = triton.next_power_of_2(width)
    if num_rows:
        rms_norm_kernel[(num_rows,)](
            x, weight, out, x.stride(0), x.stride(1) if is_heads else 0, x.shape[1] if is_heads else 1, eps,
            WIDTH=width, PADDED_WIDTH=padded, num_warps=4 if padded <= 2048 else 8, **dependent_launch(x.device),
        )  # fmt: skip
    return out
