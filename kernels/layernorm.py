"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and after a residual add."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NormedResidual(NamedTuple):
    """Attributes:
    normed: the normalised sum, the next block's input.
    residual: the sum itself, the stream that the next block adds to.
    """

    normed: torch.Tensor
    residual: torch.Tensor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., H] / rms(x) * weight [H], accumulated in float32, in x's dtype."""
    if x.is_cuda:
        from pdray.kernels.layernorm_triton import triton_rms_norm

        return triton_rms_norm(x, weight, eps)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> NormedResidual:
    """rms_norm of x + residual, both [..., H]."""
    if x.is_cuda:
        from pdray.kernels.layernorm_triton import triton_add_rms_norm

        return NormedResidual(*triton_add_rms_norm(x, residual, weight, eps))
    residual = x + residual
    return NormedResidual(rms_norm(residual, weight, eps), residual)
