"""Matrix product with a weight, row results independent of the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pdray.kernels.crossover import (
    FEW_ROWS_MAX,
    FEW_ROWS_MAX_WEIGHT_ELEMENTS,
    ONE_ROW_MAX_WEIGHT_ROWS,
    TILED_MAX_WEIGHT_ELEMENTS,
    TILED_MIN_ROWS,
    TILED_MIN_WEIGHT_ELEMENTS,
    TILED_ROWS_MAX,
)
from pdray.kernels.elementwise.activation import silu_and_mul

# Below this a row's result in float32 on CPU depends on the number of rows. Measured with torch 2.13 and oneDNN, one
# and two threads, plain and packed weights, oneDNN held to SSE4.1, AVX2 and AVX-512. MKL, which F.linear takes, has no
# such number on Intel's processors: of two threads, products of 200 rows differ from those of 300.
ROW_MULTIPLE = 4


class StreamingKernels(NamedTuple):
    """Attributes:
    linear: (x, weight, bias, residual) → x @ weight^T + bias + residual, as linear() says.
    norm_linear: (x, norm_weight, eps, weight, bias, gated=) → as norm_linear() says.
    """

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
    norm_linear: Callable[..., torch.Tensor]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] @ weight [N, K]^T + bias [N], + residual -> [M, N]; ``weight`` may come from pack_weight.

    On CPU, M is padded to a multiple of 4, so that a sequence's activations, in float32, do not depend on what else is
    in the batch. Rows past M are computed and cut off.

    Args:
        residual: [M, N], contiguous. Its memory may be used for the result: it must not be read afterwards.
        out: [M, N], where the result is to lie; without a residual.
    """
    if x.is_cuda:
        return _cuda_linear(x, weight, bias, residual, out)
    rows = x.shape[0]
    padding = -rows % ROW_MULTIPLE
    if padding:
        x = F.pad(x, (0, 0, 0, padding))
    by_onednn = has_onednn(weight)
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if by_onednn else F.linear(x, weight, bias)
    if padding:
        y = y[:rows]
    if out is not None:
        return out.copy_(y)
    return y if residual is None else y.add_(residual)


def _cuda_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if (kernels := streaming_kernels(x, weight)) is not None:
        y = kernels.linear(x, weight, bias, residual)
        return y if out is None else out.copy_(y)
    is_between = TILED_MIN_WEIGHT_ELEMENTS <= weight.numel() <= TILED_MAX_WEIGHT_ELEMENTS
    if is_between and TILED_MIN_ROWS <= len(x) <= TILED_ROWS_MAX and can_copy_tiles(x, weight):
        from pdray.kernels.linear import tiled_rows_triton

        y = tiled_rows_triton.triton_linear(x, weight, bias, residual)
        return y if out is None else out.copy_(y)
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is not None:
        residual += bias
    return residual.addmm_(x, weight.t())


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """silu_and_mul(linear(x, weight, bias)), x [M, K] and weight [2 I, K] -> [M, I]; the gate's rows come first."""
    if x.is_cuda and can_copy_tiles(x, weight):
        from pdray.kernels.linear import gated_prompt_triton, tiled_rows_triton

        if len(x) <= TILED_ROWS_MAX:
            return tiled_rows_triton.triton_gated_linear(x, weight, bias)
        if bias is None and gated_prompt_triton.is_gated_prompt(x, weight):
            return gated_prompt_triton.triton_gated_prompt(x, weight)
    return silu_and_mul(linear(x, weight, bias))


def can_copy_tiles(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the GPU has an engine that copies tiles of tensors (TMA), and takes these, whose rows are many enough."""
    return (
        len(x) > 1
        and x.element_size() == 2
        and x.shape[1] % 8 == 0
        and len(weight) % 16 == 0
        and x.is_contiguous()
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and is_hopper(x.device)
    )


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def streaming_kernels(x: torch.Tensor, weight: torch.Tensor) -> StreamingKernels | None:
    """Kernels that read this weight faster than the library; None if there are none."""
    if not x.is_cuda or x.element_size() != 2:
        return None
    if len(x) == 1 and len(weight) <= ONE_ROW_MAX_WEIGHT_ROWS:
        from pdray.kernels.linear import one_row_triton

        return StreamingKernels(one_row_triton.triton_linear, one_row_triton.triton_norm_linear)
    if 2 <= len(x) <= FEW_ROWS_MAX and weight.numel() <= FEW_ROWS_MAX_WEIGHT_ELEMENTS and weight.shape[1] % 16 == 0:
        from pdray.kernels.linear import few_rows_triton

        return StreamingKernels(few_rows_triton.triton_linear, few_rows_triton.triton_norm_linear)
    return None


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` [N, K] in oneDNN's blocked layout, for linear() only; to_dense() turns it back.

    A plain weight is packed anew in every product. Packed once, a product with few rows streams the weight only once:
    SmolLM2-135M's projections take 0.4 to 0.7 of the time at 4 and 8 rows.
    Anything but float32 on CPU, and a torch without oneDNN, gets ``weight`` itself back.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROW_MULTIPLE) if has_onednn(weight) else weight


def has_onednn(weight: torch.Tensor) -> bool:
    """Whether products with it are oneDNN's."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
