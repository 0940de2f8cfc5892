"""Random weights that every worker agrees on, for tests and benchmarks."""

from __future__ import annotations

import hashlib

import torch


def fill_dummy(parameters: dict[str, torch.Tensor], seed: int, initializer_range: float) -> None:
    """Fill parameters in place, on their device: norms with ones, all else normal(0, initializer_range).

    Each tensor has its own generator, seeded from ``seed`` and its Hugging Face name: values depend on neither order
    nor on what else there is. CPU and CUDA, and different dtypes, give different values.
    """
    for name, tensor in parameters.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest[:7], "big"))
        tensor.normal_(0.0, initializer_range, generator=generator)
