"""Loads the kernels of draws that a step's graph does not hold, before the first request needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pdray.kernels.sampling.draw_rows import draw_late, draw_tokens, report
from pdray.kernels.sampling.history import BIASES, Join, pack_joins, remember
from pdray.kernels.sampling.rows import WORDS, DrawTable
from pdray.sampling_params import MAX_LOGPROBS

if TYPE_CHECKING:
    from pdray.kernels.sampling.late_scratch import LateScratch


def load_late_draws(
    history: torch.Tensor, masks: torch.Tensor, dtype: torch.dtype, scratch: LateScratch | None = None
) -> None:
    """Draw in every way, for one row and for as many as there can be; nothing remains of it.

    Compiling takes seconds, and to load a kernel CUDA waits for all work on the device to end.

    Args:
        history, masks: see DrawTable. dtype: of logits. scratch: see draw_late().
    """
    max_num_seqs, vocab_size = len(history), history.shape[1] - BIASES
    remember(history, pack_joins([Join(0, (), (), ())], pin_memory=history.is_cuda))
    for num in {1, max_num_seqs}:
        logits = torch.zeros(num, vocab_size, dtype=dtype, device=history.device)
        table = DrawTable(torch.zeros(num, WORDS, dtype=torch.int32, device=history.device), history, masks)
        out = torch.empty(num, dtype=torch.int64, device=history.device)
        draw_tokens(logits, table, out)
        for may_filter in (False, True):
            draw_late(logits, table, out, may_filter=may_filter, scratch=scratch)
        report(logits, table, out, MAX_LOGPROBS)
