"""silu(gate) * up against float64."""

from __future__ import annotations

import pytest
import torch

from pdray.kernels.elementwise.activation import silu_and_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", [(1, 2), (5, 160), (0, 64)])
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    kept = x.clone()
    gate, up = x.double().chunk(2, dim=-1)
    out = silu_and_mul(x)
    assert out.dtype == dtype and out.shape == (shape[0], shape[1] // 2) and out.is_contiguous()
    torch.testing.assert_close(out.double(), gate / (1 + (-gate).exp()) * up, atol=tolerance * 4, rtol=tolerance)
    assert torch.equal(x, kept)
