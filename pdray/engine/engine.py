"""One device's inference engine: the only door to scheduler, pool and runner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial

from pdray.config import Config
from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.matcher import Grammar
from pdray.engine.grammar.pieces import load_pieces
from pdray.engine.kv.block_pool import PrefixChanges
from pdray.engine.kv.integrity import check_in_pauses
from pdray.engine.kv.pool import KVPool
from pdray.engine.kv.sizing import usable_model_len
from pdray.engine.pipeline.pipeline import open_lane
from pdray.engine.ranks.orders import Ranks
from pdray.engine.request import EngineRequest, EngineStats, LayerGroupReady, RequestUpdate, Reservation, SplitState
from pdray.engine.schedule.bookkeeping import Bookkeeper
from pdray.engine.schedule.make import make_scheduler
from pdray.engine.schedule.plan import EVERYTHING, LaneName, Share, StepPlan
from pdray.engine.schedule.refusals import give_up, grammar_compiled, preparing, refuse
from pdray.engine.schedule.sequence import LiveRequest
from pdray.engine.schedule.stats import engine_room, engine_stats
from pdray.engine.step.flight import Flight, Launched, Settled, Undrawn
from pdray.engine.step.inputs import StepInputs
from pdray.engine.step.lane import Lane
from pdray.engine.step.layer_groups import OnGroup, group_callback
from pdray.engine.step.mask_filling import MaskFiller, num_fill_threads
from pdray.engine.step.times import StepSpread, StepTimes
from pdray.errors import InvalidRequestError, StepFailedError, describe_error
from pdray.models.load import LoadedModel
from pdray.outputs import SampledToken
from pdray.structured_outputs import FIELD


class Engine:
    """Computes requests in steps, and keeps their KV.

    step() belongs to one thread, the engine's. All else may be called from any thread: a short lock guards the
    state, and is never held while the model runs. What a step in flight uses stays as it is until the step is booked.

    Args:
        pool: this engine's alone to allocate from. Over a borrowed one, requests bring their blocks: see GivenBlocks.
        overlap: launch a step before the tokens of the one before it are read; default: config.async_scheduling, and
            where that says nothing, on CUDA.
        ranks: those that share the model with this one.

    Attributes:
        max_model_len: tokens of prompt and output: the configured limit, or what the pool holds of one sequence.
        on_layer_group: called by the engine's thread in the midst of a step, for prefill_only requests, after each
            group of layers (see layer_groups()); over a request's life, each block of each layer once.
        has_booked: whether the last step() has booked a step; only then may what others can take have grown.
        on_work: called, without the lock, after anything that may have given step() something to do.
        grammars: compiles structured outputs, on a thread of its own.
    """

    def __init__(
        self, config: Config, model: LoadedModel, pool: KVPool, *, overlap: bool | None = None, ranks: Ranks = None
    ) -> None:
        device = pool.device
        self.config = config = config.for_device(device.type)
        self.model, self.pool, self.device = model, pool, device
        self.block_size, self.num_blocks = pool.layout.block_size, pool.num_blocks
        self.max_model_len = usable_model_len(model.decoder.max_len, self.num_blocks, self.block_size)
        self.on_layer_group: Callable[[LayerGroupReady], None] | None = None
        self.on_work: Callable[[], None] | None = None
        self.has_booked = False
        wanted = config.async_scheduling if overlap is None else overlap
        self.overlap = device.type == "cuda" if wanted is None else wanted
        capture = device.type == "cuda" and not config.enforce_eager
        self._scheduler = make_scheduler(config, model.config, pool, self.max_model_len, padded=capture)
        self.room, limits = partial(engine_room, self._scheduler), self._scheduler.limits  # from any thread
        self.lane, self.pipeline = open_lane(config, model.decoder, pool, limits, ranks)
        self._bookkeeper = Bookkeeper(self._scheduler)
        self._in_flight: Flight | None = None  # launched by the last step(), not yet read
        self._is_beside = False  # steps of another lane take the device's time too
        self._lock = threading.Lock()
        self._mask_filler = MaskFiller(limits.vocab_size, limits.eos_token_ids, num_fill_threads(device))
        self.grammars = GrammarCompiler(partial(load_pieces, config, limits.vocab_size), num_fill_threads(device))
        self._is_stuck = False  # nothing could be scheduled, and nothing has changed since
        self._num_steps, self._step_times = 0, StepTimes()

    def add(self, request: EngineRequest) -> None:
        """Queue a request for prefill here.

        Raises:
            InvalidRequestError: it can never be served, or its key is in use.
            RequestFailedError: examining it failed; the engine has not taken it, and goes on.
        """
        live = self._prepare(request, reserved=False)
        with self._lock:
            self._scheduler.add(live, time.perf_counter())
            self._is_stuck = False
        self._watch_grammar(live)
        self._notify()

    def reserve(self, request: EngineRequest) -> Reservation | None:
        """Hold blocks for prompt, earlier outputs and head-room, and places, for every index; or nothing.

        Returns:
            None if that is not possible now: too few blocks or places, or a preempted sequence waits.

        Raises:
            InvalidRequestError: it will never be possible, or the key is in use.
            RequestFailedError: examining it failed; the engine has not taken it, and goes on.
        """
        live = self._prepare(request, reserved=True)
        with self._lock:
            reservation = self._scheduler.reserve(live)
        if reservation is not None:
            self._watch_grammar(live)
        return reservation

    def _prepare(self, request: EngineRequest, *, reserved: bool) -> LiveRequest:
        wanted = request.params.structured_outputs
        with preparing(request.key):
            grammar = None if wanted is None else self.grammars.compile(wanted)
            return self._scheduler.prepare(request, reserved=reserved, grammar=grammar)

    def _watch_grammar(self, live: LiveRequest) -> None:
        """Go on with the request when its grammar is there; end it if there is none, once nobody writes its blocks."""

        def compiled(_: Future[Grammar]) -> None:
            with self._lock:
                grammar_compiled(self._scheduler, live)
                self._is_stuck = False
            self._notify()

        if live.grammar is not None:
            live.grammar.add_done_callback(compiled)

    def lend(self, key: Hashable) -> Reservation:
        """Blocks of a reservation whose prompt another engine is to compute in this pool; KeyError if there is none."""
        with self._lock:
            return self._scheduler.lend(key)

    def is_writing(self, key: Hashable) -> bool:
        """Whether a step in flight computes this request, though it may have been released."""
        with self._lock:
            return any(key in plan.keys for plan in self._scheduler.plans_in_flight)

    def start_prefill(self, key: Hashable) -> None:
        """Compute a reserved request here.

        Raises:
            KeyError: no such reservation.
        """
        with self._lock:
            self._scheduler.start_prefill(key, time.perf_counter())
            self._is_stuck = False
        self._notify()

    def start_decode(self, key: Hashable, tokens: list[SampledToken]) -> None:
        """The KV of a reservation's blocks has arrived: go on from these first tokens, one for each index.

        Completions that end with their first token are not started; if all do, the next step says finished.

        Raises:
            KeyError: no such reservation. ValueError: the tokens' indices are not the request's.
        """
        with self._lock:
            self._scheduler.start_decode(key, tokens, time.perf_counter())
            self._is_stuck = False
        self._notify()

    def release(self, key: Hashable) -> None:
        """End a request in any state; unknown keys are ignored. No update speaks of it any more, but one that a step
        has already returned. Its blocks return at once, or with the end of the step in flight that uses them."""
        with self._lock:
            self._scheduler.release(key)
            self._is_stuck = False
        self._notify()

    def end_completion(self, key: Hashable, index: int) -> None:
        """End this completion with its next token. Unknown ones are ignored."""
        with self._lock:
            live = self._scheduler.requests.get(key)
            for sequence in live.sequences if live is not None else ():
                if sequence.index == index:
                    sequence.max_total_tokens = min(sequence.max_total_tokens, sequence.num_tokens)

    def step(self) -> list[RequestUpdate]:
        """Launch the next batch, and book the one launched before it (without overlap: this one).

        Returns at once if there is nothing to do. Engine's thread only.

        Raises:
            StepFailedError: the engine cannot go on; names the requests of the steps in flight. Where the failure is
                clearly one step's, and has touched nothing but blocks of its requests, those end instead, each with
                an update that says so, and the engine goes on.
        """
        try:
            return self._step()
        except StepFailedError:
            raise
        except BaseException as error:
            raise StepFailedError(describe_error(error), self.suspects()) from error

    def suspects(self) -> list[Hashable]:
        """Requests of all steps that were planned and not booked. Takes no lock: a step may hang with it."""
        return list(dict.fromkeys(key for plan in list(self._scheduler.plans_in_flight) for key in plan.keys))

    def _step(self) -> list[RequestUpdate]:
        done = self._in_flight
        with self._lock:
            updates, self._scheduler.updates = self._scheduler.updates, []
            plan = self._schedule()
            self._is_stuck = not plan.chunks and done is None
        self._in_flight, self.has_booked = None, False
        launched = self._launch(plan, self.lane) if plan.chunks else None
        if done is not None:
            updates += self._book(done)  # beside the device's work on the step after it
        self._in_flight, news = self._settle(plan, self.lane, launched)
        updates += news
        if not self.overlap and self._in_flight is not None:
            booked, self._in_flight = self._in_flight, None
            updates += self._book(booked)
        return updates

    def _schedule(self, share: Share = EVERYTHING) -> StepPlan:
        try:
            return self._scheduler.schedule(time.perf_counter(), share)
        except Exception as error:
            raise StepFailedError(describe_error(error), self._scheduler.planned_keys()) from error

    def _launch(self, plan: StepPlan, lane: Lane) -> Launched:
        """Launch a plan, but for its late draws if any has a mask.

        On CUDA an error may be that of any earlier launch, and the device be lost, unless it is Python's own and comes
        before this plan's first launch. The device's errors are RuntimeErrors.
        """
        launching = False
        try:
            with self._lock:
                inputs, on_group = lane.prepare(plan), self._group_callback(plan)
            launching = True
            self._before_launch(lane, inputs)
            if isinstance(launched := lane.launch(inputs, on_group), Undrawn):
                self._mask_filler.expect(plan, lane.masks)
            return launched if isinstance(launched, Undrawn) else Flight(plan, launched)
        except Exception as error:
            if (self.device.type != "cpu" or self.lane.is_shared) and (launching or isinstance(error, RuntimeError)):
                raise
            return error

    def _before_launch(self, lane: Lane, inputs: StepInputs) -> None:
        """Make the lane wait for what a step needs of others."""

    def _settle(self, plan: StepPlan, lane: Lane, launched: Launched | None) -> Settled:
        """Every token before the step's draws is known: where they have masks fill these beside the device's work, and
        draw. Returns the step that is in flight now, if any."""
        if isinstance(launched, Exception):
            return Settled(None, self._give_up(plan, launched))
        if not isinstance(launched, Undrawn):
            return Settled(launched, [])
        try:
            failures = self._mask_filler.fill()
            flight = Flight(plan, lane.draw(launched))
        except Exception as error:
            if self.device.type != "cpu" or self.lane.is_shared:
                raise
            return Settled(None, self._give_up(plan, error))
        with self._lock:
            refused = [refuse(self._scheduler, key, InvalidRequestError(why, FIELD)) for key, why in failures.items()]
            return Settled(flight, refused)

    def _give_up(self, plan: StepPlan, error: Exception) -> list[RequestUpdate]:
        with self._lock:
            self._is_stuck = False
            return give_up(self._scheduler, plan, error)

    def _book(self, flight: Flight) -> list[RequestUpdate]:
        """Wait for a step that was launched, and book it."""
        (plan, draws), wait_began = flight, time.perf_counter()
        rows = draws.read()
        ended = time.perf_counter()
        self._mask_filler.take(plan, rows)
        self.has_booked = True
        with self._lock:
            self._num_steps += 1
            self._is_stuck = False
            scores = None if draws.scores is None else draws.scores.numpy()
            updates = self._bookkeeper.update(plan, rows, ended, scores)
            if plan.lane is LaneName.MAIN:
                if not self._is_beside:
                    self._scheduler.budget.note(plan, self._step_times.since(plan.planned_at, ended))
                self._step_times.add(wait_began, ended)
                if not self._scheduler.running:
                    self._step_times.pause()
        return updates

    def _group_callback(self, plan: StepPlan) -> OnGroup | None:
        """The lane's callback after each group of layers; None if no request needs it."""
        return None if self.on_layer_group is None else group_callback(plan, self.block_size, self.on_layer_group)

    def prepare_more(self) -> bool:
        """Do some of what waits until there is no work; returns whether more is left. Engine's thread only."""
        return self.pipeline is not None and self.pipeline.prepare_more()

    def close(self) -> None:
        """Give up what the device holds beside memory. No step may follow, and none may be running. Idempotent."""
        self._in_flight = None  # what a step hands to the host remembers its lane's stream
        if self.pipeline is not None:
            self.pipeline.close()

    def split_state(self) -> SplitState | None:
        return None  # prompts and decodes share the device in one step, always

    def has_work(self) -> bool:
        """Whether step() would do something. Requests that wait for others to end are no work."""
        with self._lock:
            scheduler = self._scheduler
            has_requests = bool(scheduler.running or scheduler.waiting)
            return bool(scheduler.updates or scheduler.plans_in_flight) or (has_requests and not self._is_stuck)

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        with self._lock:
            return engine_stats(self._bookkeeper, self.num_blocks, self._num_steps, self.lane.num_pipelined)

    def step_times(self) -> StepSpread | None:
        """Durations of the last steps, and the host's share of them."""
        with self._lock:
            return self._step_times.spread()

    def take_prefix_changes(self) -> PrefixChanges:
        """Prefixes that have entered and left the cache since the last call."""
        with self._lock:
            return self._scheduler.pool.take_changes()

    def live_keys(self) -> set[Hashable]:
        """Requests that were added or reserved and have neither ended nor been released."""
        with self._lock:
            return set(self._scheduler.requests)

    def check_integrity(self) -> list[str]:
        """Problems of the block accounting; empty if there are none.

        Takes a while for a large pool, and the lock only for moments: not to be called from an event loop.
        """
        return check_in_pauses(self._scheduler, self._lock)

    def _notify(self) -> None:
        if self.on_work is not None:
            self.on_work()
