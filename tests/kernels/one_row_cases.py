"""Checks of the one-row matrix products against their torch references; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch

from pdray.kernels.linear.norm_linear import norm_linear
from pdray.kernels.linear.one_row_triton import Tiles, triton_linear, triton_norm_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(96, 64), (40, 192), (2048 + 8, 256)]  # N, K
SMALL_TILES = Tiles(8, 64, 4)  # several of K


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def check_linear() -> None:
    for dtype, (n, k), with_residual in itertools.product(DTYPES, SHAPES, (False, True)):
        x, weight, bias = (random(*s, dtype=dtype) for s in ((1, k), (n, k), (n,)))
        residual = random(1, n, dtype=dtype) if with_residual else None
        expected = x.float() @ weight.float().T + bias.float() + (0.0 if residual is None else residual.float())
        moved = [None if a is None else a.to(DEVICE) for a in (x, weight, bias, residual)]
        for tiles in (None,) if INTERPRETED and n > 2048 else (None, SMALL_TILES):  # hundreds of small programs
            out = triton_linear(*moved, tiles=tiles).cpu()
            error = (out.float() - expected).norm() / expected.norm()
            assert error <= TOLERANCE[dtype], f"{dtype} {k} to {n}, {tiles}: error {error:.1e}"


def check_norm_linear() -> None:
    for dtype, gated in itertools.product(DTYPES, (False, True)):
        n, k = 96, 192
        x, norm, weight, bias = (random(*s, dtype=dtype) for s in ((1, k), (k,), (n, k), (n,)))
        expected = norm_linear(x, norm, 1e-6, weight, bias, gated=gated).float()
        x, norm, weight, bias = (a.to(DEVICE) for a in (x, norm, weight, bias))
        for tiles in (None, SMALL_TILES):
            out = triton_norm_linear(x, norm, 1e-6, weight, bias, gated=gated, tiles=tiles)
            error = (out.cpu().float() - expected).norm() / expected.norm()
            assert error <= TOLERANCE[dtype], f"{dtype}, gated {gated}, {tiles}: error {error:.1e}"


CHECKS = {"one row, linear": check_linear, "one row, norm, linear and gate": check_norm_linear}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
