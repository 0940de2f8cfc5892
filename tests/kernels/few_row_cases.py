"""Checks of the matrix products of a few rows against their torch references; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch

from pdray.kernels.linear.few_rows_triton import Tiling, triton_linear, triton_norm_linear
from pdray.kernels.linear.norm_linear import norm_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(96, 64), (40, 272), (256 + 16, 336) if INTERPRETED else (2048 + 16, 1088)]  # N, K
ROWS = [2, 7, 16]
TILINGS = [
    None,
    Tiling(32, 64, 1, 2, 4, weight_first=True),  # several tiles of columns, some loaded ahead
    Tiling(16, 64, 2, 1, 4, weight_first=False),  # columns split between programs
]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (out.cpu().float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[out.dtype], f"{what}: error {error:.1e}"


def check_linear() -> None:
    for dtype, (n, k), rows, with_residual in itertools.product(DTYPES, SHAPES, ROWS, (False, True)):
        if INTERPRETED and (n, rows) == (SHAPES[-1][0], ROWS[0]):  # the slowest of them
            continue
        x, weight, bias = (random(*s, dtype=dtype) for s in ((rows, k), (n, k), (n,)))
        residual = random(rows, n, dtype=dtype) if with_residual else None
        expected = x.float() @ weight.float().T + bias.float() + (0.0 if residual is None else residual.float())
        moved = [None if a is None else a.to(DEVICE) for a in (x, weight, bias, residual)]
        for tiling in TILINGS:
            for _ in range(2):  # the second finds the counters as the first has left them
                out = triton_linear(*moved, tiling=tiling)
            assert_close(out, expected, f"{dtype}, {rows} rows, {k} to {n}, {tiling}")


def check_norm_linear() -> None:
    for dtype, rows, gated in itertools.product(DTYPES, ROWS, (False, True)):
        n, k = 96, 192
        x, norm, weight, bias = (random(*s, dtype=dtype) for s in ((rows, k), (k,), (n, k), (n,)))
        expected = norm_linear(x, norm, 1e-6, weight, bias, gated=gated)
        x, norm, weight, bias = (a.to(DEVICE) for a in (x, norm, weight, bias))
        for tiling in TILINGS:
            out = triton_norm_linear(x, norm, 1e-6, weight, bias, gated=gated, tiling=tiling)
            assert_close(out, expected, f"{dtype}, {rows} rows, gated {gated}, {tiling}")


CHECKS = {"few rows, linear": check_linear, "few rows, norm, linear and gate": check_norm_linear}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
