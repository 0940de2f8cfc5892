"""Residual add, RMSNorm, a matrix product and the gated activation as one operation, for the two halves of a layer.

With a few rows on CUDA it is one kernel: the product streams the weight, and what surrounds it costs no launch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pdray.kernels.activation import silu_and_mul
from pdray.kernels.layernorm import add_rms_norm, rms_norm
from pdray.kernels.linear import linear, streams_weight


class NormLinear(NamedTuple):
    """Attributes:
    out: the product. residual: x + residual, the stream that the next half adds to.
    """

    out: Tensor
    residual: Tensor


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
) -> NormLinear:
    """linear(rms_norm(x + residual)), and silu_and_mul of that if ``gated``; rounded as those are one by one.

    Args:
        x, residual: [M, K]; without a residual, x is the sum already.
        weight: [N, K]; gated: gate above up. bias: [N].

    Returns:
        out [M, N], gated [M, N / 2]; residual [M, K].
    """
    if streams_weight(x, weight):
        from pdray.kernels.skinny_linear_triton import triton_norm_linear

        return NormLinear(*triton_norm_linear(x, residual, norm_weight, eps, weight, bias, gated=gated))
    if residual is None:
        normed, residual = rms_norm(x, norm_weight, eps), x
    else:
        normed, residual = add_rms_norm(x, residual, norm_weight, eps)
    out = linear(normed, weight, bias)
    return NormLinear(silu_and_mul(out) if gated else out, residual)
