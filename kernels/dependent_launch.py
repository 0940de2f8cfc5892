"""Programmatic dependent launch (CUDA's name for it): a kernel starts while the one before it ends.

A step of a small model is hundreds of kernels of 2 to 10 us, and 1 us between two of them. A kernel that takes part
may load what no kernel of the step writes (weights, the KV of earlier tokens) at once; everything else only after
begin(), which waits until the kernel before it, and so all before that one, have ended and their results can be seen.
The step's first kernel, the embedding, takes no part: it starts when all that was launched before has ended.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """Let the next kernel start, then wait for the one before. Every kernel launched with ``**dependent_launch()``
    calls this once, in every program, before it reads what a kernel may have written, or writes anything.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@lru_cache(maxsize=16)
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Options of a kernel's launch: ``DEPENDENT`` for begin(), and launch_pdl where the GPU can (Hopper and later)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}
