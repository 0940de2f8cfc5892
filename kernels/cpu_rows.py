"""What MKL must be told for a row of a product on CPU to be the same whatever rows are beside it."""

from __future__ import annotations

import os
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def steady_rows(cpu_info: Path = CPU_INFO) -> None:
    """Ask for it where MKL would not do it by itself: in this process and those that it starts.

    From the rows on to which pdray.kernels.attention.paged pads, MKL does so on AMD's processors and on Intel's with
    AVX-512. On Intel's with AVX2 alone no number of rows is enough, but its strict mode is (MKL_CBWR; what is set
    already stays). MKL looks once, at its first product: call this before.
    """
    facts = cpu_info.read_text() if cpu_info.exists() else ""
    if "GenuineIntel" in facts and "avx512f" not in facts:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
