"""The Triton counterparts of layernorm's functions: one program for each row, which it reads and writes once."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,  # added first, and replaced by the sum, in sum_ptr
    sum_ptr,
    weight_ptr,
    out_ptr,
    stride_outer,
    stride_inner,
    num_inner,
    eps,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    ADD: tl.constexpr,
):
    """Every value is rounded to x's type where torch would."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED_WIDTH)
    mask = element < WIDTH
    start = row // num_inner * stride_outer + row % num_inner * stride_inner
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + element, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x = (x + tl.load(residual_ptr + row * WIDTH + element, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * WIDTH + element, x, mask=mask)
        x = x.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + element, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + element, (normed.to(dtype).to(tl.float32) * weight).to(dtype), mask=mask)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See layernorm.rms_norm. x: [T, H], or [T, heads, H] with heads and rows anywhere but H contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner = x.shape[1] if x.dim() == 3 else 1
    _launch(x, None, None, weight, out, (x.stride(0), x.stride(1) if x.dim() == 3 else 0, inner), eps)
    return out


def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See layernorm.add_rms_norm. x, residual: [T, H], contiguous."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, total, weight, out, (x.stride(0), 0, 1), eps)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    out: Tensor,
    strides: tuple[int, int, int],
    eps: float,
) -> None:
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows:
        padded = triton.next_power_of_2(width)
        rms_norm_kernel[(num_rows,)](
            x,
            residual,
            total,
            weight,
            out,
            *strides,
            eps,
            WIDTH=width,
            PADDED_WIDTH=padded,
            ADD=residual is not None,
            num_warps=4 if padded <= 2048 else 8,
        )
