"""What the kernels of late draws pass on to each other, allocated once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pdray.kernels.crossover import DRAW_SHORT_SPAN
from pdray.kernels.launcher import Launcher
from pdray.kernels.sampling.draw_triton import Bounds
from pdray.kernels.sampling.groups_triton import GROUP

MOST_GROUPS = 128  # that are looked into before a row is searched


class LateScratch(NamedTuple):
    """For draws that are launched one after the other on one stream.

    Attributes:
        group_max, group_mass: [S, ceil(vocab_size / GROUP)] float32; see survey_kernel.
        chosen: [S, most_groups] int32. bounds: of S rows; see choose_kernel.
        scores, token_ids: [S, most programs a row] float32 and int32; see draw_kernel.
        launcher: of the kernels.
    """

    group_max: Tensor
    group_mass: Tensor
    chosen: Tensor
    bounds: Bounds
    scores: Tensor
    token_ids: Tensor
    launcher: Launcher

    @classmethod
    def of(cls, num_rows: int, vocab_size: int, device: torch.device, most_groups: int = MOST_GROUPS) -> LateScratch:
        """Args:
        num_rows: at most so many are drawn.
        """
        num_groups, num_splits = triton.cdiv(vocab_size, GROUP), triton.cdiv(vocab_size, DRAW_SHORT_SPAN)

        def make(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((num_rows, width), dtype=dtype, device=device)

        return cls(
            make(num_groups, torch.float32),
            make(num_groups, torch.float32),
            make(most_groups, torch.int32),
            Bounds(*(torch.empty(num_rows, dtype=t, device=device) for t in (torch.float32, torch.int32, torch.int32))),
            make(num_splits, torch.float32),
            make(num_splits, torch.int32),
            Launcher(),
        )
