"""The example of the decode pipeline, as a user runs it where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pdray.testing.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_the_example_runs_to_the_line_of_the_fall_back(llama: Any) -> None:
    script = [sys.executable, "examples/decode_pipeline.py", str(llama.folder), "--skip-tokenizer-init"]
    small = ["--device", "cpu", "--max-model-len", "128", "--kv-cache-memory-bytes", "1000000"]
    small += ["--decode-attention-sm", "64"]  # which wants a decode_pipeline that is not off
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE_S, "env": environment}
    done = subprocess.run([*script, *small], cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    reasons = [line for line in done.stderr.splitlines() if "pipeline" in line]
    assert reasons == ["no decode pipeline, decode steps are plain: cpu has no SMs to split; only CUDA devices have"]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("0 of ") and lines[0].endswith(" steps pipelined: none")
    assert len(lines) == 5 and lines[-1] == "the same tokens as plain steps: True"
