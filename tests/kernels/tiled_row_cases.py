"""Checks of the products whose tiles are copied by TMA against their torch references; see attention_cases.py."""

from __future__ import annotations

import itertools
import os
import sys

import torch

from pdray.kernels.elementwise.activation import silu_and_mul
from pdray.kernels.linear import gated_prompt_triton, tiled_rows_triton
from pdray.kernels.linear.gated_prompt_triton import occupancy, triton_gated_prompt
from pdray.kernels.linear.linear import gated_linear, linear
from pdray.kernels.linear.tiled_rows_triton import Tiling, choose_tiling, triton_gated_linear, triton_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
SHAPES = [(96, 192), (72, 152)]  # N, K: whole tiles, and others
ROWS = [17, 70]
TILINGS = [
    Tiling(64, 32, 64, 1, 3, 4, 0),
    Tiling(64, 16, 32, 3, 2, 4, 2),  # columns split between programs
]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def assert_close(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (out.cpu().float() - expected.float()).norm() / expected.float().norm()
    assert out.dtype in TOLERANCE and out.shape == expected.shape and error <= TOLERANCE[out.dtype], (what, error)


def gated(product: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return silu_and_mul(product.to(dtype).float())


def check_linear() -> None:
    for dtype, (n, k), rows, with_residual in itertools.product(DTYPES, SHAPES, ROWS, (False, True)):
        x, weight, bias = (random(*s, dtype=dtype) for s in ((rows, k), (n, k), (n,)))
        residual = random(rows, n, dtype=dtype) if with_residual else None
        expected = x.float() @ weight.float().T + bias.float() + (0.0 if residual is None else residual.float())
        moved = [None if a is None else a.to(DEVICE) for a in (x, weight, bias, residual)]
        for tiling in TILINGS:
            for _ in range(2):  # the second finds the counters as the first has left them
                out = triton_linear(*moved, tiling=tiling)
            assert_close(out, expected, f"{dtype}, {rows} rows, {k} to {n}, {tiling}")


def check_gated_linear() -> None:
    for dtype, (n, k), rows, with_bias in itertools.product(DTYPES, SHAPES, ROWS, (False, True)):
        x, weight = random(rows, k, dtype=dtype), random(2 * n, k, dtype=dtype)
        bias = random(2 * n, dtype=dtype) if with_bias else None
        expected = gated(x.float() @ weight.float().T + (0.0 if bias is None else bias.float()), dtype)
        moved = [None if a is None else a.to(DEVICE) for a in (x, weight, bias)]
        for tiling in TILINGS:
            for _ in range(2):
                out = triton_gated_linear(*moved, tiling=tiling)
            assert_close(out, expected, f"{dtype}, {rows} rows, {k} to {n}, bias {with_bias}, {tiling}")


def check_gated_prompt() -> None:
    """More tiles than programs, and tiles that reach beyond the tensors."""
    tilings = [gated_prompt_triton.Tiling(32, 32, 32, 2, 4, 2), gated_prompt_triton.Tiling(64, 16, 64, 2, 4, 8)]
    for dtype, (n, k), rows, tiling in itertools.product(DTYPES, SHAPES, (17, 200), tilings):
        x, weight = random(rows, k, dtype=dtype), random(2 * n, k, dtype=dtype)
        expected = gated(x.float() @ weight.float().T, dtype)
        out = triton_gated_prompt(x.to(DEVICE), weight.to(DEVICE), tiling, num_programs=5)
        assert_close(out, expected, f"{dtype}, {rows} rows, {k} to {n}, {tiling}")


def check_choices() -> None:
    """The tilings of the models that they were measured with; and half a wave more than whole ones is too little."""
    assert choose_tiling(3072, 1024, True).block_n == 32 and choose_tiling(12288, 4096, True).block_n == 64
    assert choose_tiling(4096, 1024, False).split_k == 1 and choose_tiling(1024, 3072, False).split_k == 4
    assert occupancy(132, 132) == 1.0 and occupancy(192, 132) < 0.75 and occupancy(384, 132) > 0.95


def check_gpu_choices() -> None:
    """The kernels that a GPU takes for the model's shapes give what the parts one by one do."""
    for rows, (n, k) in itertools.product((17, 40, 64, 65, 1500), ((3072, 1024), (1536, 576))):
        x, weight, down = (random(*s, dtype=torch.bfloat16).to(DEVICE) for s in ((rows, k), (2 * n, k), (k, n)))
        x, weight, down = x * 0.5, weight * 0.05, down * 0.05
        inner = gated_linear(x, weight)
        assert_close(inner, silu_and_mul(x @ weight.T).cpu(), f"{rows} rows, gated")
        residual = random(rows, k, dtype=torch.bfloat16).to(DEVICE)
        expected = (inner @ down.T + residual).cpu()
        assert_close(linear(inner, down, residual=residual), expected, f"{rows} rows, down")


CHECKS = {
    "tiled rows, linear": check_linear,
    "tiled rows, gated": check_gated_linear,
    "gated prompt": check_gated_prompt,
    "choices": check_choices,
}
if not INTERPRETED and tiled_rows_triton.dependent_launch(torch.device("cuda"))["DEPENDENT"]:
    CHECKS["choices on a GPU"] = check_gpu_choices

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        print(f"{name} passed")
