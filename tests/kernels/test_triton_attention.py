"""Runs triton_cases.py in Triton's interpreter, and on the GPU where there is one.

In a process of its own, because TRITON_INTERPRET must be set before triton is imported. The interpreter's bfloat16
``tl.dot`` is wrong, so that dtype is checked on a GPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "kernels" / "triton_cases.py"
CHECKS = ["attention", "num_splits", "store", "norms", "rotary", "gather_and_scatter"]


def run_cases(names: list[str], *, interpret: bool) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1" if interpret else "0"}
    result = subprocess.run(
        [sys.executable, str(CASES), *names], env=env, capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{name} passed" for name in names]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    run_cases(CHECKS, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu() -> None:
    run_cases(CHECKS, interpret=False)


def test_the_cpu_path_imports_no_triton() -> None:
    code = (
        "import sys, pdray.kernels.attention, pdray.kernels.kv_store, pdray.kernels.sampling\n"
        "assert 'pdray.kernels.attention_triton' not in sys.modules\n"
        "assert 'pdray.kernels.kv_store_triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=True)
