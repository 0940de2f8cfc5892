"""RMSNorm against float64."""

from __future__ import annotations

import pytest
import torch

from pdray.kernels.elementwise.rms_norm import rms_norm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 48), (7, 576), (3, 5, 20)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.rand(shape[-1]).to(dtype)
    normed = rms_norm(x, weight, 1e-5)
    assert normed.dtype == dtype and normed.shape == x.shape
    torch.testing.assert_close(
        normed.double(), exact(x, weight, 1e-5), atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype]
    )


def test_it_equals_transformers_bitwise_in_bfloat16() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # takes seconds, in every process that collects

    theirs = LlamaRMSNorm(64, 1e-6).bfloat16()
    x = torch.randn(9, 64).bfloat16()
    theirs.weight.data.normal_()
    assert torch.equal(rms_norm(x, theirs.weight, 1e-6), theirs(x))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_extreme_rows_stay_finite(scale: float) -> None:
    x = torch.randn(2, 16) * scale
    assert torch.isfinite(rms_norm(x, torch.ones(16), 1e-6)).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_added_first_stays(dtype: torch.dtype) -> None:
    x, addend, weight = (torch.randn(7, 48).to(dtype) for _ in range(3))
    total = x + addend
    assert torch.equal(rms_norm(x, weight[0], 1e-5, addend), rms_norm(total, weight[0], 1e-5))
    assert torch.equal(x, total)


def test_rows_are_independent() -> None:
    x, weight = torch.randn(33, 576), torch.rand(576)
    whole = rms_norm(x, weight, 1e-5)
    for i in range(33):
        assert torch.equal(rms_norm(x[i : i + 1], weight, 1e-5)[0], whole[i])
