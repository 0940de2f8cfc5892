"""CUDA graphs of whole steps, from the embedding to the drawn tokens: one launch instead of hundreds.

Decode steps get a graph for each batch size of a ladder, short prompts one for each number of tokens, with room for a
few sequences, or for many that decode beside them. What is smaller is padded, with rows and sequences that hold no KV.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Protocol

import torch

from pdray.engine.batch import InputBuffers, StepInputs, StepShape
from pdray.engine.step_plan import StepPlan

# Launched one by one, a step's kernels take 12 ms of the host's time, and ten times that while another thread of the
# process is busy: more than a GPU needs for 4,096 tokens of a small model.
PREFILL_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
FEW_SEQUENCES = 8
MIXED_TOKENS = (512, 1024, 2048, 4096)  # of prompts beside a batch of any size


class Compute(Protocol):
    """Launches a step on the current stream, and puts the logits of its draws into [num_draws, vocab_size]."""

    def __call__(self, inputs: StepInputs, *, logits_out: torch.Tensor) -> torch.Tensor: ...


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then steps of 8, beyond 256 of 32, and max_num_seqs itself."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 1, 32), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


def prefill_shapes(max_num_batched_tokens: int, max_num_seqs: int) -> list[StepShape]:
    """Steps with prompts that get a graph, the smallest first; longer ones keep the device busy while launched."""
    few = min(FEW_SEQUENCES, max_num_seqs)
    wanted = {(n, few) for n in PREFILL_TOKENS} | {(n, max_num_seqs) for n in MIXED_TOKENS}
    sizes = sorted(size for size in wanted if size[0] <= max_num_batched_tokens)
    return [StepShape(num_tokens, num_seqs, num_seqs, False) for num_tokens, num_seqs in sizes]


class StepGraphs:
    """Graphs by shape. All read the same static inputs and share one memory pool, for no two of them run at once.

    Attributes:
        logits: [largest number of draws, vocab_size], which all graphs write to.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._decode_sizes: list[int] = []
        self._prefill_shapes: list[StepShape] = []
        self._pool = torch.cuda.graph_pool_handle()

    def capture_decodes(self, compute: Compute, buffers: InputBuffers, sizes: list[int]) -> None:
        """Capture decode steps of these batch sizes; ``buffers`` hold the inputs of all of them from now on."""
        self._decode_sizes = sizes
        self._capture(compute, buffers, [StepShape(size, size, size, True) for size in sizes])

    def capture_prefills(self, compute: Compute, buffers: InputBuffers, shapes: list[StepShape]) -> None:
        """Capture steps with prompts, the smallest shape first."""
        self._prefill_shapes = shapes
        self._capture(compute, buffers, shapes)

    def _capture(self, compute: Compute, buffers: InputBuffers, shapes: list[StepShape]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for shape in reversed(shapes):  # the largest first: smaller ones fit into its memory
            inputs = buffers.views(shape, StepPlan())
            with torch.cuda.stream(stream):
                compute(inputs, logits_out=self.logits[: shape.num_draws])  # compiles kernels and loads libraries
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool)
                try:
                    compute(inputs, logits_out=self.logits[: shape.num_draws])
                finally:
                    graph.capture_end()
            self._graphs[shape] = graph
        torch.cuda.current_stream().wait_stream(stream)

    def shape_for(self, plan: StepPlan) -> StepShape | None:
        """What the plan is to be padded to; None if no graph can run it."""
        if plan.is_decode:
            at = bisect_left(self._decode_sizes, len(plan.chunks))
            size = self._decode_sizes[at] if at < len(self._decode_sizes) else 0
            return StepShape(size, size, size, True) if size else None
        num_seqs = max(len(plan.chunks), plan.num_draws)
        fitting = (s for s in self._prefill_shapes if s.num_tokens >= plan.num_tokens and s.num_seqs >= num_seqs)
        return next(fitting, None)

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Launch a step of this shape, whose inputs are in the buffers. Returns the logits of its draws."""
        self._graphs[shape].replay()
        return self.logits[: shape.num_draws]
