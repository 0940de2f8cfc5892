"""CUDA graphs of whole decode steps, from the embedding to the drawn tokens: one launch instead of hundreds."""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import torch

from pdray.engine.batch import InputBuffers, StepInputs
from pdray.engine.step_plan import StepPlan


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then steps of 8, beyond 256 of 32, and max_num_seqs itself."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 1, 32), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


class Compute(Protocol):
    """Launches a step on the current stream, and puts the logits of its draws into [size, vocab_size]."""

    def __call__(self, inputs: StepInputs, *, logits_out: torch.Tensor) -> torch.Tensor: ...


class DecodeGraphs:
    """A graph for each batch size of a ladder; a batch in between is padded with rows that hold no KV.

    All graphs read the same static inputs and share one memory pool, for no two of them run at once.

    Args:
        compute: what to capture.
        logits: [largest size, vocab_size], which all graphs write to.
    """

    def __init__(self, compute: Compute, buffers: InputBuffers, sizes: list[int], logits: torch.Tensor) -> None:
        self.sizes = sizes
        self._logits = logits
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for size in reversed(sizes):  # the largest first: smaller ones fit into its memory
            inputs = buffers.views(StepPlan(), size)
            with torch.cuda.stream(stream):
                compute(inputs, logits_out=logits[:size])  # compiles kernels and loads libraries
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    compute(inputs, logits_out=logits[:size])
                finally:
                    graph.capture_end()
            self._graphs[size] = graph
        torch.cuda.current_stream().wait_stream(stream)

    def padded_size(self, num_seqs: int) -> int:
        """Rows that a batch of so many sequences is padded to; itself if it is too large for any graph."""
        at = bisect_left(self.sizes, num_seqs)
        return self.sizes[at] if at < len(self.sizes) else num_seqs

    def replay(self, inputs: StepInputs) -> torch.Tensor | None:
        """Launch the graph of this size; the inputs lie in the buffers. None if there is none."""
        size = len(inputs.input_ids)
        graph = self._graphs.get(size)
        if graph is None:
            return None
        graph.replay()
        return self._logits[:size]
