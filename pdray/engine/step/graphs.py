"""CUDA graphs of whole steps, from the embedding to the drawn tokens: one launch instead of hundreds.

Decode steps get a graph for each batch size of a ladder, prompts one for each number of tokens, with room for a few
sequences, or for many that decode beside them. What is smaller is padded, with rows and sequences that hold no KV. What
is larger is launched kernel by kernel, padded to a multiple of LAUNCHED_TOKENS: CUDA loads a kernel when it is
first needed, and waits for all work on the device to end; so every size's kernels are loaded at the start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from pdray.engine.schedule.plan import StepPlan
from pdray.engine.schedule.token_budget import STEP_SIZES
from pdray.engine.step.inputs import InputBuffers, Spans, StepInputs, StepShape
from pdray.kernels.attention.flash import are_worth_gathering

# Launched one by one, a step's kernels take 10 ms of the host's time, and three times that while another thread of the
# process is busy: more than a GPU needs for 8,192 tokens of a small model.
PREFILL_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
FEW_SEQUENCES = 8
LAUNCHED_TOKENS = 512
FLASH_TOKENS = 1024  # from so many on FlashAttention makes a step shorter by more than 3 %
# Longer steps, with a whole batch: fine enough that padding costs little where the device is slow.
LONG_TOKENS = tuple(range(4608, 8193, 512))


class Compute(Protocol):
    """Launches a step on the current stream, and puts the logits of its draws into [num_draws, vocab_size].

    Calls on_layer after each layer's KV is stored.
    """

    def __call__(
        self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None, *, logits_out: torch.Tensor
    ) -> torch.Tensor: ...


class Stored(NamedTuple):
    """A group of layers, and the event that each replay of its graph records once their KV is stored."""

    layers: range
    event: torch.cuda.Event


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then steps of 8, beyond 256 of 32, and max_num_seqs itself."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 1, 32), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


def prefill_shapes(
    max_num_batched_tokens: int, max_num_seqs: int, *, has_flash: bool = False, is_shared: bool = False
) -> list[StepShape]:
    """Steps with prompts that get a graph, the smallest first; longer ones keep the device busy while launched.

    Args:
        has_flash: FlashAttention takes the model's heads.
        is_shared: ranks share the model. Their long steps are launched: sums by copies cannot be captured.
    """
    few = min(FEW_SEQUENCES, max_num_seqs)
    long = () if is_shared else LONG_TOKENS
    wanted = {(n, few) for n in (*PREFILL_TOKENS, *long[-1:])} | {(n, max_num_seqs) for n in (*STEP_SIZES, *long)}
    return [
        StepShape(num_tokens, num_seqs, num_seqs, False, has_flash and num_tokens >= FLASH_TOKENS)
        for num_tokens, num_seqs in sorted(size for size in wanted if size[0] <= max_num_batched_tokens)
    ]


def launched_sizes(max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens of long steps that are launched: all that are longer than a graph, and some others."""
    largest = max((n for n in STEP_SIZES if n <= max_num_batched_tokens), default=0)
    sizes = range(largest + LAUNCHED_TOKENS, max_num_batched_tokens, LAUNCHED_TOKENS)
    return [*sizes, max_num_batched_tokens] if largest < max_num_batched_tokens else []


class StepGraphs:
    """Graphs by shape. All read the same static inputs and share one memory pool, for no two of them run at once.

    Args:
        logits: [max_num_seqs, vocab_size], which all graphs write to.
        decode: batch sizes in order; default: decode_sizes(). with_prompts: default: prefill_shapes().
        has_flash: FlashAttention takes the model's heads; see prefill_shapes(). What it does behind a prefix it does in
            launched steps alone. is_shared: see prefill_shapes().

    Attributes:
        launched_sizes: numbers of tokens that launched steps are padded to; of chosen graphs, those of the graphs.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        max_num_batched_tokens: int,
        *,
        decode: list[int] | None = None,
        with_prompts: list[StepShape] | None = None,
        has_flash: bool = False,
        is_shared: bool = False,
    ) -> None:
        self.logits = logits
        self._has_flash = has_flash
        self._decode_sizes = decode_sizes(len(logits)) if decode is None else decode
        if with_prompts is None:
            shapes = prefill_shapes(max_num_batched_tokens, len(logits), has_flash=has_flash, is_shared=is_shared)
            self.launched_sizes = launched_sizes(max_num_batched_tokens)
        else:
            shapes = with_prompts
            self.launched_sizes = sorted({*self._decode_sizes, *(shape.num_tokens for shape in shapes)})
        self._prefill_shapes = shapes
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._stored: dict[StepShape, list[Stored]] = {}

    def capture(
        self,
        compute: Compute,
        decode_buffers: InputBuffers,
        buffers: InputBuffers,
        groups: Callable[[StepShape], list[range]],
        rehearse: Compute,
    ) -> None:
        """Make all graphs; the buffers hold the inputs of decode steps, and of all others, from now on.

        Args:
            groups: layers of a step with prompts that get an event when their KV is stored.
            rehearse: see capture_one_by_one().
        """
        for shape in self._prefill_shapes:
            self._stored[shape] = [Stored(layers, torch.cuda.Event(external=True)) for layers in groups(shape)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for _ in self.capture_one_by_one(compute, decode_buffers, buffers, stream, rehearse):
            pass
        torch.cuda.current_stream().wait_stream(stream)

    def capture_one_by_one(
        self,
        compute: Compute,
        decode_buffers: InputBuffers,
        buffers: InputBuffers,
        stream: torch.cuda.Stream,
        rehearse: Compute,
    ) -> Iterator[StepShape]:
        """Make another graph before each value, on ``stream``: on its SMs if it has some of its own.

        Nothing may be in flight that uses the buffers or the stream; the inputs that they hold are computed, so their
        slots must be the dummy block's.

        Args:
            rehearse: runs before each capture. Launches every kernel of ``compute`` at least once: kernels cannot be
                compiled, nor libraries loaded, while a graph is captured.
        """
        pool = torch.cuda.graph_pool_handle()
        decodes = [StepShape(n, n, n, True) for n in self._decode_sizes]
        for shapes, inputs in ((self._prefill_shapes, buffers), (decodes, decode_buffers)):
            for shape in reversed(shapes):  # the largest first: smaller ones fit into its memory
                self._capture(compute, inputs.views(shape, Spans([], [])), stream, pool, rehearse)
                yield shape

    def _capture(
        self, compute: Compute, inputs: StepInputs, stream: torch.cuda.Stream, pool: Any, rehearse: Compute
    ) -> None:
        shape = inputs.shape
        with torch.cuda.stream(stream):
            rehearse(inputs, logits_out=self.logits[: shape.num_draws])
            graph = torch.cuda.CUDAGraph()
            # A partition's graphs are made while other threads run, which may free what CUDA gave them.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                compute(inputs, self._record_stored(shape), logits_out=self.logits[: shape.num_draws])
            except BaseException as error:
                try:
                    graph.capture_end()
                except RuntimeError as second:  # it must not hide the first: memory that has run out can be borne
                    error.add_note(f"then the capture could not end: {second}")
                raise
            graph.capture_end()
        self._graphs[shape] = graph

    def _record_stored(self, shape: StepShape) -> Callable[[int], None]:
        events = {group.layers.stop - 1: group.event for group in self.stored(shape)}

        def on_layer(layer: int) -> None:
            if layer in events:
                events[layer].record()  # external: a node of the graph

        return on_layer

    def stored(self, shape: StepShape) -> list[Stored]:
        """Of a step with prompts, in order. The events are of the last replay that was launched."""
        return self._stored.get(shape, [])

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._graphs

    def shape_for(self, plan: StepPlan) -> StepShape:
        """The shape to pad the plan to, a graph's where one can run it."""
        if plan.is_decode:
            size = self._padded_draws(plan.num_draws)
            return StepShape(size, size, size, True)
        num_seqs = max(len(plan.chunks), plan.num_draws)
        fitting = (s for s in self._prefill_shapes if s.num_tokens >= plan.num_tokens and s.num_seqs >= num_seqs)
        if (shape := next(fitting, None)) is not None and not self._is_better_launched(plan):
            return shape
        launched = next((size for size in self.launched_sizes if size >= plan.num_tokens), plan.num_tokens)
        return StepShape(launched, len(plan.chunks), self._padded_draws(plan.num_draws), False)

    def _is_better_launched(self, plan: StepPlan) -> bool:
        """A long step with a long chunk behind a long prefix, which FlashAttention halves: the host has time."""
        if not self._has_flash or plan.num_tokens <= STEP_SIZES[-1]:
            return False
        behind = [chunk for chunk in plan.chunks[plan.num_decodes :] if chunk.start]
        return are_worth_gathering([chunk.num_tokens for chunk in behind], [chunk.end for chunk in behind])

    def _padded_draws(self, num_draws: int) -> int:
        sizes = self._decode_sizes
        return sizes[bisect_left(sizes, num_draws)] if 0 < num_draws <= sizes[-1] else num_draws

    def replay(self, shape: StepShape) -> torch.Tensor:
        """Launch a step of this shape, whose inputs are in the buffers. Returns the logits of its draws."""
        self._graphs[shape].replay()
        return self.logits[: shape.num_draws]
