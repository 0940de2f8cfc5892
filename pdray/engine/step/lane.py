"""Runs steps on a device: block copies, the model, sampling, and the one late read of what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from pdray.engine.kv.pool import KVPool
from pdray.engine.ranks.orders import LaneRanks, StepOrder
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import BlockCopy, StepPlan
from pdray.engine.step.draws import DrawReader, Draws
from pdray.engine.step.first_step import Ahead
from pdray.engine.step.flight import Undrawn
from pdray.engine.step.graphs import Compute, StepGraphs, decode_sizes
from pdray.engine.step.histories import Histories
from pdray.engine.step.inputs import InputBuffers, StepInputs, StepShape
from pdray.engine.step.layer_groups import WORTH_BYTES, OnGroup, layer_groups
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.engine.step.scores import ScoreInputs, compute_scores, follow_scores, make_scores, score_piece
from pdray.engine.step.warm_up import load_late_draws
from pdray.kernels.attention.flash import load_gather, takes_heads
from pdray.kernels.kv.blocks import copy_blocks
from pdray.kernels.sampling.draw_rows import draw_late, draw_tokens, make_scratch, report
from pdray.kernels.sampling.history import remember
from pdray.models.decoder import Decoder
from pdray.sampling_params import MAX_LOGPROBS


class Place(NamedTuple):
    """Where a lane's steps run.

    Attributes:
        stream: None: the thread's current one. graphs: that were captured for it; None: none.
    """

    stream: torch.cuda.Stream | None = None
    graphs: StepGraphs | None = None


class Lane:
    """Launches plans one after the other: input buffers, padding, graphs. For one thread.

    Several lanes may serve one pool, each with draws of its own: a sequence changes lanes only once the host has read
    what it drew (see Scheduler). What penalties look at follows it: lanes that take sequences over share ``histories``.

    Args:
        histories: default: its own.
        largest_group: layers that are told of together at most; see layer_groups().
        capture: make CUDA graphs, and load what launched steps need.
        ranks: of a worker of several, each with a lane of its own: this one tells the others what it launches, or is
            told. All are made at the same time. Tokens are drawn by rank 0.

    Attributes:
        sampled: the last launched step's draws. masks: of those that wait for any.
        stream: that steps are launched on; None: the thread's current one.
        graphs: of decode steps and short prompts; None: every step is launched kernel by kernel.
        ahead: inputs that were prepared before their plan.
        is_shared: other ranks do their part of each step that is launched, which cannot be taken back.
        on_logits: sees every step's logits [S, vocab_size] before sampling; for tests and tools.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        limits: EngineLimits,
        *,
        histories: Histories | None = None,
        largest_group: int = 16,
        capture: bool = False,
        ranks: LaneRanks | None = None,
    ) -> None:
        self.decoder = decoder
        self.pool = pool
        device = pool.device
        self.limits = limits
        self.sampled = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=device)
        self.graphs: StepGraphs | None = None
        self.ahead = Ahead()
        self.stream: torch.cuda.Stream | None = None
        self.on_logits: Callable[[torch.Tensor], None] | None = None
        self._largest_group = largest_group
        self._has_flash = takes_heads(device, decoder.dtype, decoder.config.head_dim)
        self._score_piece = score_piece(decode_sizes(limits.max_num_seqs))
        self._relay = torch.cuda.Stream(device) if device.type == "cuda" else None
        draws = limits.max_num_seqs, decoder.config.vocab_size, device
        self.histories, self.masks = histories or Histories(*draws), MaskBuffer(*draws)
        self._announce, self.is_shared = None if ranks is None else ranks.announce, ranks is not None
        memory, follows = None if ranks is None else ranks.memory, self.is_shared and self._announce is None
        self._decode_buffers, self._buffers = (
            InputBuffers(limits, num, device, self.histories, self.masks, memory=memory, follows=follows)
            for num in (limits.max_num_seqs, limits.max_num_batched_tokens)
        )
        self._reader, self._scratch = DrawReader(limits.max_num_seqs, device), make_scratch(*draws)
        if device.type == "cuda":
            self.sampled.fill_(1)  # loads the kernel: see give_token()
            load_late_draws(self.histories.words, self.masks.words, decoder.dtype, self._scratch)
            copy_blocks(pool.tensor, [(0, 0)])  # the dummy block: loads the kernels before the first fork needs them
            load_gather(pool.tensor[0])
        self._logits: torch.Tensor | None = None  # that graphs write
        if capture:
            self._capture()

    def _capture(self) -> None:
        logits, num = self._graph_logits(), self.limits.max_num_batched_tokens
        self.graphs = StepGraphs(logits, num, has_flash=self._has_flash, is_shared=self.is_shared)
        self.graphs.capture(self.compute, self._decode_buffers, self._buffers, self.groups, self._rehearse)
        for num_tokens in self.graphs.launched_sizes:
            self.decoder.run_products(num_tokens)

    def _graph_logits(self) -> torch.Tensor:
        if self._logits is None:
            shape = (len(self.sampled), self.decoder.config.vocab_size)
            self._logits = torch.empty(shape, dtype=self.decoder.dtype, device=self.pool.device)
        return self._logits

    def more_graphs(self, decode: list[int], with_prompts: list[StepShape]) -> StepGraphs:
        """Graphs for another place, of these sizes (see StepGraphs); none is captured yet."""
        num = self.limits.max_num_batched_tokens
        return StepGraphs(self._graph_logits(), num, decode=decode, with_prompts=with_prompts)

    def capture_one_by_one(self, place: Place, compute: Compute | None = None) -> Iterator[StepShape]:
        """Capture another of the place's graphs before each value; while values are taken, no step is in flight.

        Where a graph with prompts is replayed nobody hears of groups of layers.
        """
        assert place.graphs is not None and place.stream is not None
        buffers = self._decode_buffers, self._buffers
        rehearse = self._rehearse if compute is None else compute
        captures = place.graphs.capture_one_by_one(compute or self.compute, *buffers, place.stream, rehearse)
        while True:
            self.ahead.drop()
            self._decode_buffers.clear()
            self._buffers.clear()
            place.stream.wait_stream(torch.cuda.current_stream(self.pool.device))
            try:
                shape = next(captures, None)
            finally:  # also where memory has run out: the buffers are filled again by the next step
                torch.cuda.current_stream(self.pool.device).wait_stream(place.stream)
            if shape is None:
                return
            yield shape

    def prepare(self, plan: StepPlan) -> StepInputs:
        """The plan's inputs, padded for a graph where one can run it. Reads the sequences: under the engine's lock."""
        if (known := self.ahead.take(self, plan)) is not None:
            return known
        padded = None if self.graphs is None else self.graphs.shape_for(plan)
        if padded is not None and plan.num_scores:  # no graph runs it: it has the sequences of other launched steps
            padded = padded._replace(num_seqs=len(plan.chunks))
        with self._on_stream():
            inputs = (self._decode_buffers if plan.is_decode else self._buffers).fill(plan, padded)
            return inputs._replace(scores=make_scores(plan, self._score_piece, self.pool.device))

    def take_back(self) -> None:
        """Nothing is launched with what the last prepare() of a decode step has returned."""
        self._decode_buffers.take_back()

    def give_token(self, token_id: int) -> None:
        """Let the next step take it for the first one that the step before has drawn. No step may be in flight."""
        with self._on_stream():
            self.sampled[:1].fill_(token_id)

    @property
    def place(self) -> Place:
        """Where the next step runs."""
        return Place(self.stream, self.graphs)

    def move(self, place: Place) -> None:
        """Run the next steps there, the first of them once all launched before have ended. Between two launches."""
        if place.stream is not self.stream:
            before = self.stream or torch.cuda.current_stream(self.pool.device)
            (place.stream or torch.cuda.current_stream(self.pool.device)).wait_stream(before)
        self.stream, self.graphs = place

    def wait_for(self, other: Lane) -> None:
        """The next step begins once all that the other lane has launched is done."""
        if self.pool.device.type == "cuda":
            mine, its = (lane.stream or torch.cuda.current_stream(self.pool.device) for lane in (self, other))
            mine.wait_stream(its)

    def close(self) -> None:
        """Wait for what was launched, and give up graphs and all pinned memory, which remembers the streams that it was
        copied on. Idempotent; nothing can be launched any more."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize(self.pool.device)
        self.stream = self.graphs = None
        for name in ("_decode_buffers", "_buffers", "masks", "_reader"):
            self.__dict__.pop(name, None)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def groups(self, shape: StepShape) -> list[range]:
        """Layers of such a step that are told of together."""
        layout = self.pool.layout
        worth_bytes = 0 if self._relay is None else WORTH_BYTES  # a CPU takes longer for a layer than for a message
        layer_bytes = shape.num_tokens * layout.token_bytes // layout.num_layers
        return layer_groups(layout.num_layers, layer_bytes, self._largest_group, worth_bytes)

    @torch.inference_mode()
    def launch(self, inputs: StepInputs, on_group: OnGroup | None) -> Draws | Undrawn:
        """Start the step, which reads ``sampled`` and then overwrites it; on CPU, compute it.

        Args:
            on_group: called when a group's KV is stored; on CUDA, when the work is launched that does so.

        Returns:
            Undrawn if draws wait for masks: then ``masks`` are to be filled and draw() is to follow, before the next
            launch.
        """
        with self._on_stream():
            if self._announce is not None:
                self._announce(StepOrder.of(inputs))
            return self._launch(inputs, on_group)

    @torch.inference_mode()
    def follow(self, order: StepOrder) -> None:
        """Do this rank's part of a step that rank 0 launches; nothing here waits for a device."""
        shape, scored = order.step_shape, order.scored
        with self._on_stream():
            buffers = self._decode_buffers if shape.is_decode else self._buffers
            inputs = buffers.receive(order.host, shape, order.spans)
            if scored is not None:
                inputs = inputs._replace(scores=follow_scores(scored, self.pool.device))
            copy_blocks(self.pool.tensor, [BlockCopy(*copy) for copy in order.copies])
            self._run(inputs, None)

    def _launch(self, inputs: StepInputs, on_group: OnGroup | None) -> Draws | Undrawn:
        copy_blocks(self.pool.tensor, list(inputs.copies))
        if inputs.needs.joins is not None:
            remember(self.histories.words, inputs.needs.joins)
        num_draws = len(inputs.num_logprobs)
        logits, scores = self._run(inputs, on_group)
        if self.on_logits is not None and num_draws:
            self.on_logits(logits[:num_draws].float())
        undrawn = Undrawn(inputs, logits, scores)
        return undrawn if inputs.needs.num_masks else self.draw(undrawn)

    def _run(self, inputs: StepInputs, on_group: OnGroup | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the step's draws, and its scores."""
        if self.graphs is not None and inputs.shape in self.graphs and inputs.scores is None:
            logits = self.graphs.replay(inputs.shape)
            if on_group is not None:
                for layers, stored in self.graphs.stored(inputs.shape):
                    on_group(layers, self._event_after(stored))
            return logits, None
        on_layer = None if on_group is None else self._on_layer(inputs.shape, on_group)
        if inputs.scores is not None:
            return self._compute_scored(inputs, inputs.scores, on_layer)
        return self.compute(inputs, on_layer), None

    @torch.inference_mode()
    def draw(self, undrawn: Undrawn) -> Draws:
        """Launch the late draws of the step launched last, by what ``masks`` hold; nothing here waits."""
        with self._on_stream():
            self.masks.send()
            return self._end(*undrawn)

    def _on_layer(self, shape: StepShape, on_group: OnGroup) -> Callable[[int], None]:
        by_last_layer = {group.stop - 1: group for group in self.groups(shape)}

        def on_layer(layer: int) -> None:
            if layer in by_last_layer:
                on_group(by_last_layer[layer], self._event_after(None))

        return on_layer

    def _event_after(self, stored: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """An event of this launch alone, after ``stored`` or else after what was launched so far; None on CPU.

        A graph's own event is recorded again by its next replay, which may be launched before whoever hears of this one
        has made a stream wait. The relay stream waits at once, and records what can be waited for at any time.
        """
        if self._relay is None:
            return None
        event = torch.cuda.Event()
        if stored is None:
            event.record()
        else:
            self._relay.wait_event(stored)
            event.record(self._relay)
        return event

    @torch.inference_mode()
    def compute(
        self,
        inputs: StepInputs,
        on_layer: Callable[[int], None] | None = None,
        logits_out: torch.Tensor | None = None,
        *,
        is_rehearsal: bool = False,
    ) -> torch.Tensor:
        """Logits of the step's draws, which go to ``sampled`` but for late ones. Can be captured.

        Args:
            is_rehearsal: compute just enough to load the step's kernels; see Decoder.forward.
        """
        self._share_sampled()
        tokens = inputs.input_ids, inputs.positions
        rows = None if inputs.shape.is_decode else inputs.logit_rows
        kv, meta = self.pool.tensor, inputs.attention
        hidden = self.decoder.forward(*tokens, kv, meta, on_layer, self.sampled, rows, is_rehearsal=is_rehearsal)
        return self._draw(hidden, inputs, logits_out)

    def _rehearse(
        self, inputs: StepInputs, on_layer: Callable[[int], None] | None = None, *, logits_out: torch.Tensor
    ) -> torch.Tensor:
        return self.compute(inputs, on_layer, logits_out, is_rehearsal=True)

    def _compute_scored(
        self, inputs: StepInputs, scores: ScoreInputs, on_layer: Callable[[int], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """compute(), and the scores; of a step that is no decode step."""
        self._share_sampled()
        num = len(inputs.logit_rows)
        rows = torch.cat((inputs.logit_rows, scores.rows))
        tokens = inputs.input_ids, inputs.positions
        hidden = self.decoder.forward(*tokens, self.pool.tensor, inputs.attention, on_layer, self.sampled, rows)
        logits = self._draw(hidden[:num], inputs, None)
        return logits, compute_scores(self.decoder, hidden[num:], scores, inputs.draws, self._score_piece)

    def _share_sampled(self) -> None:
        """Let every rank know what rank 0 has drawn in the step before: late draws, too, are made by now."""
        if self.decoder.group is not None:
            self.decoder.group.broadcast(self.sampled)

    def _draw(self, hidden: torch.Tensor, inputs: StepInputs, logits_out: torch.Tensor | None) -> torch.Tensor:
        logits = self.decoder.compute_logits(hidden, logits_out)
        if len(logits):
            draw_tokens(logits, inputs.draws, self.sampled[: len(logits)])
        return logits

    def _end(self, inputs: StepInputs, logits: torch.Tensor, scores: torch.Tensor | None) -> Draws:
        """Late draws, and what the host is to read; nothing here waits."""
        num, needs = len(inputs.num_logprobs), inputs.needs
        sampled, num_top = self.sampled[:num], None
        table = inputs.draws._replace(records=inputs.draws.records[:num])
        if needs.has_late:
            filters = {"may_filter": needs.may_filter, "may_need_search": needs.may_need_search}
            draw_late(logits[:num], table, sampled, scratch=self._scratch, **filters)
        packed = None
        if needs.has_reports:
            num_top = MAX_LOGPROBS
            packed = report(logits[:num], table, sampled, num_top)
        return self._reader.send(sampled, inputs.num_logprobs, packed, num_top, scores)
