"""Drawn tokens and their log-probabilities, from what a step leaves in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdray.engine.schedule.plan import SampledRow
from pdray.kernels.sampling.draw_rows import REPORT_HEAD
from pdray.outputs import Logprob


def unpack_reports(
    packed: np.ndarray[Any, np.dtype[np.int32]], num_logprobs: list[int | None], num_top: int
) -> list[SampledRow]:
    """One row for each draw.

    Args:
        packed: see pdray.kernels.sampling.draw_rows.report.
        num_logprobs: see StepInputs. num_top: most likely tokens in each report.
    """
    width = max((number for number in num_logprobs if number is not None), default=0)
    floats = packed.view(np.float32)
    values = REPORT_HEAD + num_top
    heads, sampled = packed[:, :REPORT_HEAD].tolist(), floats[:, 2].tolist()
    top_ids = packed[:, REPORT_HEAD : REPORT_HEAD + width].tolist()
    top_values = floats[:, values : values + width].tolist()
    rows = []
    for i, number in enumerate(num_logprobs):
        token_id, rank, _ = heads[i]
        if number is None:
            rows.append(SampledRow(token_id))
            continue
        entries = {token_id: Logprob(sampled[i], rank)}
        for place, top_id in enumerate(top_ids[i][:number]):
            if top_id >= 0 and top_id != token_id:  # the vocabulary may be smaller
                entries[top_id] = Logprob(top_values[i][place], place + 1)
        rows.append(SampledRow(token_id, entries))
    return rows
