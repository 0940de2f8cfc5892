"""The Triton counterpart of silu_and_mul: one program for each piece of a row."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch

PIECE = 1024  # elements of a row that one program makes: 8 a thread, 16 bytes of gate and of up


@triton.jit
def silu_and_mul_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, PIECE: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    mask = element < WIDTH
    begin(DEPENDENT)
    gate = tl.load(x_ptr + row * (2 * WIDTH) + element, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDTH) + WIDTH + element, mask=mask).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + element, (activated * up).to(dtype), mask=mask)


def triton_silu_and_mul(x: Tensor) -> Tensor:
    """See activation.silu_and_mul. x: [T, 2 I], contiguous."""
    assert x.is_contiguous()
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows:
        silu_and_mul_kernel[(num_rows, triton.cdiv(width, PIECE))](
            x, out, WIDTH=width, PIECE=PIECE, num_warps=4, **dependent_launch(x.device)
        )
    return out
