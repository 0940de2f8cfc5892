"""The gated activation of Llama-family MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x [T, 2 I] = gate next to up -> [T, I]; silu(gate) is rounded to x's dtype."""
    if x.is_cuda:
        from pdray.kernels.elementwise.activation_triton import triton_silu_and_mul

        return triton_silu_and_mul(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
