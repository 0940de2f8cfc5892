"""Checks of the fused kernels around the matrix products; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch
from torch import Tensor

from pdray.kernels.attention.rotary_store import rotate_and_store
from pdray.kernels.attention.rotary_store_triton import triton_rotate_and_store
from pdray.kernels.elementwise.activation import silu_and_mul
from pdray.kernels.elementwise.activation_triton import triton_silu_and_mul
from pdray.kernels.elementwise.embedding import embed
from pdray.kernels.elementwise.embedding_triton import triton_embed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter rounds float32 to bfloat16 towards zero.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_nearly_equal(out: Tensor, expected: Tensor, case: str) -> None:
    """Equal but for single roundings that the order of a float32 sum, or a fused multiply-add, turns over."""
    assert out.dtype == expected.dtype and out.shape == expected.shape, case
    out, expected = out.cpu(), expected.cpu()
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case}: {text}")
    if expected.dtype != torch.float32:
        share = float((out != expected).float().mean()) if out.numel() else 0.0
        assert share < 0.01, f"{case}: {share:.1%} differ"


def check_rotate_and_store() -> None:
    """Queries and the whole KV layer, untouched slots too, against the torch composition; any head width."""
    head_shapes = [(4, 2, 64), (3, 1, 80), (2, 2, 96), (5, 1, 128), (16, 8, 128)]
    for (num_heads, num_kv_heads, head_dim), has_norm, dtype in itertools.product(head_shapes, (False, True), DTYPES):
        for num_tokens in (1, 5):
            qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
            norms = [(torch.rand(head_dim) + 0.5).to(dtype) if has_norm else None for _ in range(2)]
            angles = torch.randn(50, head_dim // 2)
            positions = torch.randint(50, (num_tokens,))
            kv_layer = torch.randn(4, 2, 16, num_kv_heads, head_dim).to(dtype)
            slots = torch.randperm(64)[:num_tokens]
            stored, expected_stored = kv_layer.to(DEVICE), kv_layer.clone()
            rest = [1e-6, angles.cos(), angles.sin(), positions]
            expected = torch.cat(rotate_and_store(qkv, *norms, *rest, expected_stored, slots, num_heads), dim=1)
            rotated = qkv.to(DEVICE, copy=True)
            arguments = (rotated, *norms, *rest, stored, slots, num_heads)
            triton_rotate_and_store(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments))
            case = f"{dtype}, heads {(num_heads, num_kv_heads, head_dim)}, norm {has_norm}, {num_tokens} tokens"
            assert_nearly_equal(rotated.view(expected.shape), expected, case)
            assert_nearly_equal(stored, expected_stored, case)
            untouched = torch.ones(64, dtype=torch.bool)
            untouched[slots] = False
            kept = stored.cpu().transpose(1, 2).flatten(0, 1)[untouched]
            assert torch.equal(kept, kv_layer.transpose(1, 2).flatten(0, 1)[untouched]), case
            values = qkv.view(num_tokens, -1, head_dim)[:, -num_kv_heads:]
            assert torch.equal(stored[slots // 16, 1, slots % 16].cpu(), values), case


def check_silu_and_mul() -> None:
    for dtype, (rows, width) in itertools.product(DTYPES, ((1, 1), (3, 96), (2, 3072), (5, 1030), (0, 64))):
        x = (torch.randn(rows, 2 * width) * 3).to(dtype)
        assert_nearly_equal(triton_silu_and_mul(x.to(DEVICE)), silu_and_mul(x), f"{dtype}, {rows} rows of {width}")
    large = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    assert triton_silu_and_mul(large.to(DEVICE)).tolist() == [[0.0, 200.0]]


def check_embed() -> None:
    for dtype, width in itertools.product(DTYPES, (64, 100)):
        table = torch.randn(30, width).to(dtype)
        ids, sampled = torch.tensor([3, -1, 29, -4, 0, -2]), torch.tensor([11, 0, 9, 29])
        out = triton_embed(*(x.to(DEVICE) for x in (ids, table, sampled))).cpu()
        assert torch.equal(out, table[[3, 11, 29, 29, 0, 0]])
        assert torch.equal(out, embed(ids, table, sampled))
        known = ids.clamp(min=0)
        out = triton_embed(known.to(DEVICE), table.to(DEVICE), sampled[:0].to(DEVICE)).cpu()
        assert torch.equal(out, embed(known, table, sampled[:0]))
        own = (5, 5 + len(table))  # of a rank that has some of the vocabulary
        out = triton_embed(*(x.to(DEVICE) for x in (ids, table, sampled)), own).cpu()
        assert torch.equal(out, embed(ids, table, sampled, own))


CHECKS = {
    "rotate and store": check_rotate_and_store,
    "silu and mul": check_silu_and_mul,
    "embed": check_embed,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
