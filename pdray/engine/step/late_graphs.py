"""CUDA graphs of what follows a decode step's own graph: late draws, and reports of what was drawn.

Seven launches from Python take longer than a small model's step of few rows. These graphs are apart from the step's, so
that steps that need neither do not pay for them. Steps of more rows leave the host time enough to launch.
"""

from __future__ import annotations

import torch

from pdray.kernels.sampling.draw_rows import draw_late, report
from pdray.kernels.sampling.rows import DrawTable
from pdray.sampling_params import MAX_LOGPROBS

MAX_ROWS = 32


class LateGraphs:
    """Graphs by the padded number of draws, over tensors that stay where they are. No two of them run at once.

    Args:
        logits: [max_num_seqs, vocab_size]. sampled: [max_num_seqs] int64. table: of as many rows.
        sizes: numbers of rows; those beyond MAX_ROWS get no graph.
    """

    def __init__(self, logits: torch.Tensor, sampled: torch.Tensor, table: DrawTable, sizes: list[int]) -> None:
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._draws: dict[int, torch.cuda.CUDAGraph] = {}
        self._reports: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        with torch.cuda.stream(stream):
            for size in reversed(
                [size for size in sizes if size <= MAX_ROWS]
            ):  # the largest first: smaller ones fit into its memory
                rows = table._replace(records=table.records[:size])
                graph = self._draws[size] = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    draw_late(logits[:size], rows, sampled[:size])
                finally:
                    graph.capture_end()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    packed = report(logits[:size], rows, sampled[:size], MAX_LOGPROBS)
                finally:
                    graph.capture_end()
                self._reports[size] = graph, packed
        torch.cuda.current_stream().wait_stream(stream)

    def __contains__(self, size: int) -> bool:
        return size in self._draws

    def draw(self, size: int) -> None:
        """draw_late() for the first ``size`` rows."""
        self._draws[size].replay()

    def report(self, size: int) -> torch.Tensor:
        """report() of the first ``size`` rows; the next call overwrites it."""
        graph, packed = self._reports[size]
        graph.replay()
        return packed
