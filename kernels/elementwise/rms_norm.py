"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, addend: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., H] / rms(x) * weight [H], accumulated in float32, in x's dtype.

    Args:
        addend: like x, [T, H], contiguous as x; is added to x first, in place.
    """
    if x.is_cuda:
        from pdray.kernels.elementwise.rms_norm_triton import triton_rms_norm

        return triton_rms_norm(x, weight, eps, addend)
    if addend is not None:
        x += addend
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight
