"""Checks of the one-row matrix products against their torch references; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch

from pdray.kernels.norm_linear import norm_linear
from pdray.kernels.skinny_linear_triton import Tiles, triton_linear, triton_norm_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(96, 64), (40, 192), (2048 + 8, 256)]  # N, K
SMALL_TILES = Tiles(8, 64, 4)  # several of K


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def check_linear() -> None:
    for dtype in DTYPES:
        for n, k in SHAPES:
            x, weight, bias = (random(*s, dtype=dtype) for s in ((1, k), (n, k), (n,)))
            for tiles in (None, SMALL_TILES):
                out = triton_linear(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), tiles).cpu()
                expected = x.float() @ weight.float().T + bias.float()
                error = (out.float() - expected).norm() / expected.norm()
                assert error <= TOLERANCE[dtype], f"{dtype} {k} to {n}, {tiles}: error {error:.1e}"


def check_norm_linear() -> None:
    for dtype in DTYPES:
        for gated, with_residual in itertools.product((False, True), repeat=2):
            n, k = 96, 192
            x, residual = random(1, k, dtype=dtype), random(1, k, dtype=dtype)
            norm, weight, bias = (random(*s, dtype=dtype) for s in ((k,), (n, k), (n,)))
            arguments = (x, residual if with_residual else None, norm, 1e-6, weight, bias)
            expected = norm_linear(*arguments, gated=gated)
            moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
            for tiles in (None, SMALL_TILES):
                out, total = triton_norm_linear(*moved, gated=gated, tiles=tiles)
                assert torch.equal(total.cpu(), expected.residual), f"{dtype} residual"
                error = (out.cpu().float() - expected.out.float()).norm() / expected.out.float().norm()
                case = f"{dtype}, gated {gated}, residual {with_residual}, {tiles}"
                assert error <= TOLERANCE[dtype], f"{case}: error {error:.1e}"


CHECKS = {"skinny linear": check_linear, "norm, linear and gate": check_norm_linear}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
