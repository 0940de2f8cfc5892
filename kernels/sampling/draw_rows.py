"""The draws of a step, by kernels on CUDA: those that are part of it, those behind it, and what is reported of them.

On CUDA nothing here waits, and all of it can be captured. What is launched depends on the number of rows and on nothing
else, so that one launch of each function loads all kernels that later ones need. The uniform numbers have the
reference's bits, and the tokens are those of sample() unless two scores are closer than the rounding of a logarithm.
The boundaries of min_p and top_k are exact. The mass that top_p compares is summed in float32, in an order that depends
on nothing but V: it may differ from the float64 sum by 1e-6 of itself, and the token at which it crosses top_p by its
neighbours within that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pdray.kernels.sampling.metadata import LogprobRows
from pdray.kernels.sampling.rows import DrawTable, RowFlag
from pdray.kernels.sampling.sample import compute_logprobs, sample

if TYPE_CHECKING:
    from pdray.kernels.sampling.late_scratch import LateScratch

REPORT_HEAD = 3  # words of a report before its lists


def draw_tokens(logits: Tensor, table: DrawTable, out: Tensor) -> None:
    """A token for each row that is not LATE, and looks at no filter; adds it to the row's history where that is kept.

    Args:
        logits: [S, V], any float dtype, rows contiguous.
        out: [S] int64; LATE rows are left as they are.
    """
    if logits.is_cuda:
        from pdray.kernels.sampling.draw_triton import triton_draw_tokens

        return triton_draw_tokens(logits, table, out)
    _draw(logits, table, out, RowFlag(0))


def draw_late(
    logits: Tensor,
    table: DrawTable,
    out: Tensor,
    *,
    may_filter: bool = True,
    may_need_search: bool = True,
    scratch: LateScratch | None = None,
) -> None:
    """draw_tokens() for LATE rows, and for no other: with their filters, unless they are greedy.

    Args:
        may_filter: whether any row that is not greedy uses top_k, top_p or min_p; without, it is two launches less.
        may_need_search: whether any row uses top_k or top_p; min_p alone is one launch less.
        scratch: of make_scratch(), for at least as many rows; without one, this allocates it, and compiles or finds its
            kernels anew.
    """
    if logits.is_cuda:
        from pdray.kernels.sampling.late_draw_triton import triton_draw_late

        return triton_draw_late(
            logits, table, out, may_filter=may_filter, may_need_search=may_need_search, scratch=scratch
        )
    _draw(logits, table, out, RowFlag.LATE)


def make_scratch(num_rows: int, vocab_size: int, device: torch.device) -> LateScratch | None:
    """For draw_late() of at most ``num_rows`` rows, on one stream at a time; None where it needs none."""
    if device.type != "cuda":
        return None
    from pdray.kernels.sampling.late_scratch import LateScratch

    return LateScratch.of(num_rows, vocab_size, device)


def report(logits: Tensor, table: DrawTable, token_ids: Tensor, num_top: int) -> Tensor:
    """The drawn tokens, and what is known of them and of the most likely ones under the raw logits.

    Args:
        logits: [S, V]. token_ids: [S] int64, what the rows have drawn.

    Returns:
        [S, REPORT_HEAD + 2 * num_top] int32: token, its rank (1 + number of strictly larger logits), float32 bits of
        its log-probability; num_top ids, most likely first, equals by id, -1 beyond the vocabulary or what the row
        asked for; float32 bits of their log-probabilities. Of rows that are not REPORTED only the token has a meaning.
    """
    if logits.is_cuda:
        from pdray.kernels.sampling.report_triton import triton_report

        return triton_report(logits, table, token_ids, num_top)
    packed = torch.full((len(logits), REPORT_HEAD + 2 * num_top), -1, dtype=torch.int32)
    packed[:, 0] = token_ids
    records = table.view()
    rows = torch.from_numpy(np.flatnonzero(records["flags"] & RowFlag.REPORTED))
    if len(rows):
        logprobs = compute_logprobs(logits, token_ids, LogprobRows(rows, num_top))
        num = logprobs.top_token_ids.shape[1]
        asked = torch.from_numpy(records["num_logprobs"][rows.numpy()])
        beyond = torch.arange(num) >= asked[:, None]
        packed[rows, 1] = logprobs.sampled_rank.int()
        packed[rows, 2] = logprobs.sampled.view(torch.int32)
        packed[rows, REPORT_HEAD : REPORT_HEAD + num] = logprobs.top_token_ids.int().masked_fill(beyond, -1)
        packed[rows, REPORT_HEAD + num_top : REPORT_HEAD + num_top + num] = logprobs.top_logprobs.view(torch.int32)
    return packed


def _draw(logits: Tensor, table: DrawTable, out: Tensor, wanted: RowFlag) -> None:
    late = table.view()["flags"] & RowFlag.LATE
    rows = torch.from_numpy(np.flatnonzero(late == wanted))
    if len(rows):
        metadata = table.metadata(rows)
        out[rows] = sample(logits[rows], replace(metadata, logprobs=None)).token_ids
        table.remember(rows, out[rows])
