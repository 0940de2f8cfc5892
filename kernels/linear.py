"""Matrix product with a weight, row results independent of the number of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# torch 2.13, float32 on CPU: below these a row's result depends on the number of rows. Measured with one and two
# threads, the packed product also with oneDNN held to SSE4.1, AVX2 and AVX-512.
ROW_MULTIPLE = 8
PACKED_ROW_MULTIPLE = 4

# Beyond these cuBLAS reads as fast as an H100's memory gives.
LARGEST_OF_ONE_ROW = 65536  # rows of the weight
MAX_FEW_ROWS = 16
LARGEST_OF_FEW_ROWS = 1 << 23  # elements


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T + bias [N], + residual -> [M, N]; ``weight`` may come from pack_weight.

    On CPU, M is padded to a multiple of 8 (packed: 4), so that a sequence's activations do not depend on what
    else is in the batch. Rows past M are computed and cut off.

    Args:
        residual: [M, N], contiguous. Its memory may be used for the result: it must not be read afterwards.
    """
    if x.is_cuda:
        return _cuda_linear(x, weight, bias, residual)
    rows = x.shape[0]
    packed = weight.is_mkldnn
    padding = -rows % (PACKED_ROW_MULTIPLE if packed else ROW_MULTIPLE)
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if packed else F.linear(x, weight, bias)
    if padding:
        out = out[:rows]
    return out if residual is None else out.add_(residual)


def _cuda_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    if (kernels := streaming_kernels(x, weight)) is not None:
        return kernels.triton_linear(x, weight, bias, residual)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is not None:
        residual += bias
    return residual.addmm_(x, weight.t())


def streaming_kernels(x: torch.Tensor, weight: torch.Tensor) -> Any:
    """The module whose triton_linear and triton_norm_linear read this weight faster than the library; None: neither."""
    if not x.is_cuda or x.element_size() != 2:
        return None
    if len(x) == 1 and len(weight) <= LARGEST_OF_ONE_ROW:
        from pdray.kernels import one_row_linear_triton

        return one_row_linear_triton
    if 2 <= len(x) <= MAX_FEW_ROWS and weight.numel() <= LARGEST_OF_FEW_ROWS and weight.shape[1] % 16 == 0:
        from pdray.kernels import few_row_linear_triton

        return few_row_linear_triton
    return None


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` [N, K] in oneDNN's blocked layout, for linear() only; to_dense() turns it back.

    MKL packs a plain weight anew in every product. Packed once, a product with few rows streams the weight only once:
    SmolLM2-135M's projections take 0.5 of the time at 4 and 8 rows, and 0.6 of a plain one-row product's.
    Anything but float32 on CPU, and a torch without oneDNN, gets ``weight`` itself back.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROW_MULTIPLE)
