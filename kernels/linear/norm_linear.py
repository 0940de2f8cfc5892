"""RMSNorm, a matrix product and the gated activation as one operation, for the two halves of a layer.

With few rows on CUDA it is one kernel: the product streams the weight, and what surrounds it costs no launch.
"""

from __future__ import annotations

from torch import Tensor

from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.kernels.linear.linear import gated_linear, linear, streaming_kernels


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """linear(rms_norm(x)), and silu_and_mul of that if ``gated``; rounded as those are one by one, or less often.

    Args:
        x: [M, K]. weight: [N, K]; gated: gate above up. bias: [N].

    Returns:
        [M, N], gated [M, N / 2].
    """
    if (kernels := streaming_kernels(x, weight)) is not None:
        return kernels.norm_linear(x, norm_weight, eps, weight, bias, gated=gated)
    normed = rms_norm(x, norm_weight, eps)
    return gated_linear(normed, weight, bias) if gated else linear(normed, weight, bias)
