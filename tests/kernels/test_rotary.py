"""Rotary embedding against complex multiplication in float64."""

from __future__ import annotations

import pytest
import torch

from pdray.kernels.attention.rotary import apply_rotary


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("num_tokens", "heads", "head_dim"), [(1, 1, 2), (5, 3, 20), (4, 12, 64)])
def test_it_multiplies_pairs_of_halves_by_unit_complex_numbers(
    num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.randn(num_tokens, heads, head_dim).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2) * 6
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    rotated = apply_rotary(x, angles.cos(), angles.sin())
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated.double(), expected, atol=tolerance * 4, rtol=tolerance)


def test_it_takes_a_view_and_leaves_it_alone() -> None:
    qkv = torch.randn(6, 5 * 16)
    kept = qkv.clone()
    view = qkv[:, : 3 * 16].view(6, 3, 16)
    angles = torch.rand(6, 8)
    rotated = apply_rotary(view, angles.cos(), angles.sin())
    assert torch.equal(rotated, apply_rotary(view.contiguous(), angles.cos(), angles.sin()))
    assert torch.equal(qkv, kept)


def test_scores_depend_on_the_distance_alone() -> None:
    frequencies = torch.rand(8)
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        q_angles, k_angles = q_position * frequencies[None], k_position * frequencies[None]
        turned = apply_rotary(q, q_angles.cos(), q_angles.sin()), apply_rotary(k, k_angles.cos(), k_angles.sin())
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), atol=1e-4, rtol=1e-4)
