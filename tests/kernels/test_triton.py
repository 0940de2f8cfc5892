"""Runs every *_cases.py in Triton's interpreter, and on the GPU where there is one.

In processes of their own, because TRITON_INTERPRET must be set before triton is imported. The interpreter's bfloat16
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
CASES = sorted(path.name for path in Path(__file__).parent.glob("*_cases.py"))


def run_cases(name: str, *, interpret: bool) -> None:
    """Each check of the file prints that it has passed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, str(Path(__file__).parent / name)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) > 1 and all(line.endswith(" passed") for line in lines)


@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str) -> None:
    run_cases(name, interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name: str) -> None:
    run_cases(name, interpret=False)


def test_the_cpu_path_imports_no_triton() -> None:
    code = (
        "import sys, pdray.models.decoder, pdray.kernels.sampling\n"
        "assert not [name for name in sys.modules if name.startswith('pdray.kernels') and 'triton' in name]\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=True)
