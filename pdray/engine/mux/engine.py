"""An engine whose prompts and decodes may run beside each other, on partitions of one GPU's SMs.

Both lanes use one pool and one copy of the weights: a prompt's KV is where its decode reads it, and handing it over
moves nothing. A prompt is computed in pieces, of which two are in flight, so that the prompts' SMs never wait for the
host; decode steps are launched and read in between, by the same thread.

Where both sides wait, a Controller chooses between this and one mixed step on every SM. Where one side alone waits, it
has every SM.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from operator import attrgetter

from pdray.config import Config
from pdray.engine.budget import half_context, make_budget
from pdray.engine.engine import Engine
from pdray.engine.kv.pool import KVPool
from pdray.engine.mux.controller import Controller
from pdray.engine.mux.costs import Arrangement, SplitCosts
from pdray.engine.mux.late import LateLast
from pdray.engine.mux.load import Lengths, measure_load, num_steps_of, wait_of
from pdray.engine.mux.meter import LaunchNote, Meter
from pdray.engine.mux.pace import PacedBudget, Targets
from pdray.engine.mux.partitions import LADDER, PIECE_TOKENS, Partitions
from pdray.engine.request import EngineRequest, EngineStats, RequestUpdate, SplitState
from pdray.engine.schedule.plan import EVERYTHING, LaneName, Share, StepPlan
from pdray.engine.schedule.sequence import LiveRequest, Sequence, SequenceStatus
from pdray.engine.schedule.step_costs import StepCosts
from pdray.engine.step.flight import Flight, Launched
from pdray.engine.step.graphs import FEW_SEQUENCES
from pdray.engine.step.inputs import StepInputs
from pdray.engine.step.lane import Lane
from pdray.kernels.green_context import SmSplit, open_splits
from pdray.models.load import LoadedModel

DECODES = Share(prompts=0)


class MuxEngine(Engine):
    """See the module, and Engine; it runs no prefill_only requests.

    Args:
        splits: of the device, all of them partitions or one of plain streams; default: what sm_partition asks for.
        piece_tokens: of a prompt, computed in one step of the prompts' lane.

    Attributes:
        prompt_lane: computes pieces of prompts beside decodes.
        num_sms: of the device; on CPU 0.
    """

    def __init__(
        self,
        config: Config,
        model: LoadedModel,
        pool: KVPool,
        *,
        overlap: bool | None = None,
        splits: list[SmSplit] | None = None,
        piece_tokens: int = PIECE_TOKENS,
    ) -> None:
        super().__init__(config, model, pool, overlap=overlap)
        limits = self._scheduler.limits
        tokens = min(piece_tokens, limits.max_num_batched_tokens)
        limits = replace(limits, max_num_batched_tokens=max(tokens, limits.max_num_seqs))
        self.prompt_lane = Lane(model.decoder, pool, limits, histories=self.lane.histories)
        splits = splits or open_splits(self.device, wanted_sizes(self.config))
        captures = self.lane.graphs is not None
        self._partitions = Partitions(self.lane, self.prompt_lane, splits, capture=captures)
        self.num_sms = splits[0].num_sms
        budget = make_budget(self.config, model.config, padded=captures, adaptive=PacedBudget)
        self._scheduler.budget = budget
        costs = budget.costs if isinstance(budget, PacedBudget) else StepCosts(half_context(model.config))
        targets = Targets(_seconds(self.config.target_tpot_ms), _seconds(self.config.target_ttft_ms))
        split_costs, may_mix = SplitCosts(costs, max(1, self.num_sms)), self.config.sm_partition == "auto"
        self.controller = Controller(split_costs, budget, targets, may_mix=may_mix)
        self._late_last = LateLast[Sequence](
            attrgetter("order"),
            rank=lambda s: (not s.preempted, s.order[0]),
            has_begun=lambda s: s.request.queued_at is None or s.request.scheduled_at is not None,
        )
        self._lengths = Lengths()
        self._meter = Meter(self.controller)
        self._pieces: deque[tuple[Flight, LaunchNote]] = deque()
        self._main_note = LaunchNote(StepPlan(), 0.0, None)  # of the step in flight
        self._num_pieces = 0
        self._pieces_share = Share(LaneName.PROMPTS, False, tokens, FEW_SEQUENCES)
        self._learn_ready()

    def _prepare(self, request: EngineRequest, *, reserved: bool) -> LiveRequest:
        assert not request.prefill_only, "nobody would hear of its layers"
        return super()._prepare(request, reserved=reserved)

    def prepare_more(self) -> bool:
        """Capture the next graph of a partition."""
        more = self._partitions.capture_next()
        self._learn_ready()
        return more or super().prepare_more()

    def close(self) -> None:
        self._pieces.clear()
        super().close()
        self._partitions.close()
        self._learn_ready()

    def _learn_ready(self) -> None:
        """Without partitions two lanes get in each other's way: plain streams (0) are used only where asked for."""
        is_forced = self.config.sm_partition == "on"
        self.controller.splits = [num_sms for num_sms in self._partitions.ready if num_sms or is_forced]

    def split_state(self) -> SplitState:
        with self._lock:
            current = self.controller.current
            ready, unavailable = tuple(self._partitions.ready), self._partitions.unavailable
            changes, pieces = self.controller.num_changes, self._num_pieces
            chunk = None if current.is_split else current.chunk or self.config.max_num_batched_tokens
            return SplitState(current.decode_sms, chunk, self.num_sms, ready, changes, pieces, unavailable)

    def stats(self) -> EngineStats:
        state = self.split_state()
        return replace(
            super().stats(),
            decode_sms=state.decode_sms or 0,
            num_split_changes=state.num_changes,
            num_prompt_pieces=state.num_pieces,
        )

    def _step(self) -> list[RequestUpdate]:
        done, done_note = self._in_flight, self._main_note
        self.has_booked = False
        with self._lock:
            updates, self._scheduler.updates = self._scheduler.updates, []
            wanted = self._arrange(time.perf_counter())
        if wanted is not None and wanted.is_split:
            updates += self._launch_pieces(wanted)
        if self._pieces:  # until they have ended decodes keep off their SMs
            wanted = self._pieces[-1][1].arrangement
        with self._lock:
            plan = self._schedule(_main_share(wanted))
            is_idle = not plan.chunks and done is None and not self._pieces
            if is_idle and wanted is not None and wanted.is_split:  # as when decodes are to be preempted
                plan = self._schedule(EVERYTHING._replace(tokens=self._pieces_share.tokens))
            self._is_stuck = is_idle and not plan.chunks
        launched = self._launch_main(plan, wanted) if plan.chunks else None
        if done is not None:
            updates += self._book_main(done, done_note)
        self._in_flight, news = self._settle(plan, self.lane, launched)
        updates += news
        if not self.overlap and self._in_flight is not None:
            booked, self._in_flight = self._in_flight, None
            updates += self._book_main(booked, self._main_note)
        return updates + self._book_pieces(must_wait=done is None and not plan.chunks)

    def _book_main(self, flight: Flight, note: LaunchNote) -> list[RequestUpdate]:
        self._is_beside = bool(self._pieces)
        updates = self._book(flight)
        for chunk in flight.plan.chunks:
            if chunk.sequence.status is SequenceStatus.FINISHED and not chunk.sequence.num_in_flight:
                self._lengths.note(num_steps_of(chunk.sequence))
        self._meter.main_ended(note, time.perf_counter(), is_beside=self._is_beside)
        return updates

    def _arrange(self, now: float) -> Arrangement | None:
        """What is to be in force; None where one side alone waits. Late prompts go behind the others."""
        scheduler, controller = self._scheduler, self.controller
        if scheduler.turns.has_alone:
            return controller.choose(now, None)
        has_turn = False
        if controller.is_paced:
            lateness = controller.lateness()
            has_turn = self._late_last.sort(
                scheduler.waiting,
                lambda sequence: lateness.is_late(wait_of(sequence, now)),
                lambda sequence: lateness.is_overdue(wait_of(sequence, now)),
            )
        return controller.choose(now, measure_load(scheduler, now, self._lengths), may_wait=not has_turn)

    def _launch_main(self, plan: StepPlan, arrangement: Arrangement | None) -> Launched:
        """Launch a step of the main lane: on the decodes' SMs while pieces are in flight, else on all."""
        place = self._partitions.whole
        if arrangement is not None and self._pieces:
            place, _ = self._partitions.places(arrangement.decode_sms or 0)
        self.lane.move(place)
        self._main_note = LaunchNote(plan, time.perf_counter(), arrangement)
        return self._launch(plan, self.lane)

    def _launch_pieces(self, arrangement: Arrangement) -> list[RequestUpdate]:
        """Keep the prompts' lane busy: launch pieces until two are in flight, without overlap one."""
        updates: list[RequestUpdate] = []
        while len(self._pieces) < (2 if self.overlap else 1):
            with self._lock:
                plan = self._schedule(self._pieces_share)
            if not plan.chunks:
                break
            self.prompt_lane.move(self._partitions.places(arrangement.decode_sms or 0)[1])
            note = LaunchNote(plan, time.perf_counter(), arrangement)
            flight, news = self._settle(plan, self.prompt_lane, self._launch(plan, self.prompt_lane))
            updates += news
            if flight is None:
                break
            self._pieces.append((flight, note))
        return updates

    def _book_pieces(self, *, must_wait: bool) -> list[RequestUpdate]:
        """Book those that have ended; with ``must_wait`` the first one in any case."""
        updates: list[RequestUpdate] = []
        while self._pieces and (must_wait or self._pieces[0][0].draws.is_done()):
            flight, note = self._pieces.popleft()
            updates += self._book(flight)
            is_beside = self._in_flight is not None or not self.overlap
            self._meter.piece_ended(note, time.perf_counter(), is_beside=is_beside)
            self._num_pieces += 1
            must_wait = False
        return updates

    def _before_launch(self, lane: Lane, inputs: StepInputs) -> None:
        """A step in flight in the other lane may still write to the slots of histories that this one takes over."""
        if inputs.needs.joins is not None:
            lane.wait_for(self.lane if lane is self.prompt_lane else self.prompt_lane)


def wanted_sizes(config: Config) -> tuple[int, ...]:
    """SMs of the decodes' lane that the configuration asks for."""
    return LADDER if config.decode_sms is None else (config.decode_sms,)


def _main_share(arrangement: Arrangement | None) -> Share:
    """What the main lane computes: where prompts are to have a lane of their own they wait for it."""
    if arrangement is None:
        return EVERYTHING
    return DECODES if arrangement.is_split else EVERYTHING._replace(tokens=arrangement.chunk)


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
