"""Runs every *_cases.py in Triton's interpreter, and on the GPU where there is one.

In processes of their own, which conftest.py starts: TRITON_INTERPRET must be set before triton is imported. The
interpreter's bfloat16 ``tl.dot`` is wrong, so that dtype is checked on a GPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pdray.testing.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
CASES = sorted(path.name for path in Path(__file__).parent.glob("*_cases.py"))


def assert_passed(process: subprocess.Popen[str]) -> None:
    """Each check of the file prints that it has passed."""
    output, _ = process.communicate(timeout=800)
    lines = output.splitlines()
    assert process.returncode == 0 and len(lines) > 1 and all(line.endswith(" passed") for line in lines), output


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("interpreted", CASES)
def test_in_the_interpreter(interpreted: str, interpreting: Callable[[str], subprocess.Popen[str]]) -> None:
    assert_passed(interpreting(interpreted))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / name)]
    assert_passed(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


def test_the_cpu_path_imports_no_triton() -> None:
    code = (
        "import sys, pdray.models.decoder, pdray.kernels.sampling.sample\n"
        "assert not [name for name in sys.modules if name.startswith('pdray.kernels') and 'triton' in name]\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=PATIENCE_S, check=True
    )
