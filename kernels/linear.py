"""Matrix product with a weight, row results independent of the number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 8  # torch's float32 CPU GEMM: a row's result differs with the row count below this


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T + bias [N] -> [M, N].

    On CPU, M is padded to a multiple of 8, so that a sequence's activations do not depend on what
    else is in the batch.
    """
    rows = x.shape[0]
    padding = -rows % ROW_MULTIPLE
    if padding and x.device.type == "cpu":
        return F.linear(F.pad(x, (0, 0, 0, padding)), weight, bias)[:rows]
    return F.linear(x, weight, bias)
