"""Random weights that every worker agrees on, for tests and benchmarks."""

from __future__ import annotations

import hashlib

import torch

from pdray.models.shards import Cut


def fill_dummy(
    parameters: dict[str, torch.Tensor], seed: int, initializer_range: float, cuts: dict[str, Cut] | None = None
) -> None:
    """Fill parameters in place, on their device: norms with ones, all else normal(0, initializer_range).

    Each tensor has its own generator, seeded from ``seed`` and its Hugging Face name: values depend on neither order
    nor on what else there is. CPU and CUDA, and different dtypes, give different values.

    Args:
        cuts: see Part.cuts(). What is cut has the values that it has in the whole tensor, which is made for a moment.
    """
    for name, tensor in parameters.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest[:7], "big"))
        cut = (cuts or {}).get(name)
        whole = tensor if cut is None else tensor.new_empty(cut.whole_shape(tensor.shape))
        whole.normal_(0.0, initializer_range, generator=generator)
        if cut is not None:
            tensor.copy_(whole[cut.indices])
