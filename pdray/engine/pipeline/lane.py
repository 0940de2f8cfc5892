"""A lane whose decode steps may be computed in micro-batches, on two halves of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from pdray.engine.pipeline.halves import Halves
from pdray.engine.pipeline.micro_batches import pipelined_forward
from pdray.engine.step.graphs import StepGraphs
from pdray.engine.step.inputs import StepInputs, StepShape
from pdray.engine.step.lane import Lane, Place
from pdray.engine.step.layer_groups import OnGroup


class Way(NamedTuple):
    """One arrangement of pipelined decode steps.

    Attributes:
        sizes: of batches that have a graph. graphs: None: steps of any size are launched kernel by kernel.
    """

    halves: Halves
    num_micro_batches: int
    sizes: tuple[int, ...] = ()
    graphs: StepGraphs | None = None

    @property
    def name(self) -> str:
        """As tables and logs call it."""
        return f"{self.halves.name}, {self.num_micro_batches} micro-batches"


class PipelinedLane(Lane):
    """See the module, and Lane. Partitions that the lane is moved to compute plain steps.

    Attributes:
        choose: the way of a decode step, by its number of sequences, padding included, and their mean length; where it
            returns None, or is None, the plain one.
        num_pipelined: steps that were launched another way.
        rehearsed: what rehearse() has filled in.
    """

    rehearsed: StepInputs

    choose: Callable[[int, float], Way | None] | None = None
    num_pipelined = 0

    def _run(self, inputs: StepInputs, on_group: OnGroup | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        way = None if on_group is not None else self._way_of(inputs)
        if way is None:
            return super()._run(inputs, on_group)
        self.num_pipelined += 1
        return self.compute_in(way, inputs) if way.graphs is None else way.graphs.replay(inputs.shape), None

    def _way_of(self, inputs: StepInputs) -> Way | None:
        lens = inputs.attention.kv_lens
        if self.choose is None or self.stream is not None or not inputs.shape.is_decode or len(lens) < 2:
            return None
        way = self.choose(inputs.shape.num_seqs, sum(lens) / len(lens))
        has_size = way is not None and (way.graphs is None or inputs.shape in way.graphs)
        return way if has_size else None

    @torch.inference_mode()
    def compute_in(
        self, way: Way, inputs: StepInputs, on_layer: object = None, *, logits_out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As compute(), of a decode step; nobody hears of its layers."""
        halves = way.num_micro_batches, way.halves
        hidden = pipelined_forward(self.decoder, inputs, self.pool.tensor, self.sampled, *halves)
        return self._draw(hidden, inputs, logits_out)

    def make_way(self, halves: Halves, num_micro_batches: int, sizes: list[int] | None) -> Way:
        """A way with graphs of these batch sizes, none of which is captured yet; None: without graphs."""
        if sizes is None:
            return Way(halves, num_micro_batches)
        return Way(halves, num_micro_batches, tuple(sizes), self.more_graphs(sizes, []))

    def capture_way(self, way: Way) -> Iterator[StepShape]:
        """Capture another graph of it before each value, the largest first; see capture_one_by_one()."""
        place = Place(torch.cuda.Stream(self.pool.device), way.graphs)
        return self.capture_one_by_one(place, partial(self.compute_in, way))

    def rehearse(self, num_seqs: int, kv_len: int) -> None:
        """Fill the inputs for measuring, until the next step; see InputBuffers.fill_alike()."""
        self.ahead.drop()
        self.rehearsed = self._decode_buffers.fill_alike(num_seqs, kv_len, self.pool.num_blocks)
