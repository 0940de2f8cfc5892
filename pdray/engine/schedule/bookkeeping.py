"""Books a finished step: tokens, ends, forks, the prefix cache, and what the outside is told."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Rows
from typing import NamedTuple

from pdray.engine.request import RequestUpdate
from pdray.engine.schedule.plan import Chunk, SampledRow, StepPlan
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.sequence import LiveRequest, Sequence, SequenceStatus
from pdray.outputs import SampledToken
from pdray.prompt_scores import Words as Reports
from pdray.prompt_scores import trim
from pdray.sampling_params import SamplingParams


class Finish(NamedTuple):
    """The reason why a completion ended; see SampledToken."""

    reason: str | None = None
    stop_reason: int | None = None


GOES_ON = Finish()


def find_stop(params: SamplingParams, eos_token_ids: Rows[int], token_id: int) -> Finish:
    """Whether this token itself ends a completion."""
    if not params.ignore_eos and token_id in eos_token_ids:
        return Finish("stop")
    if token_id in params.stop_token_ids:
        return Finish("stop", token_id)
    return GOES_ON


class Bookkeeper:
    """Applies what a step has computed to the scheduler's state. Callers hold the engine's lock.

    Attributes:
        num_prompt_tokens: computed, recomputed ones included. num_output_tokens: sampled.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    def update(
        self, plan: StepPlan, rows: Rows[SampledRow], now: float, scores: Reports | None = None
    ) -> list[RequestUpdate]:
        """Book the oldest step in flight of its lane.

        Args:
            rows: one for each draw of each chunk, in order.
            scores: likewise, a report for each prompt token that is scored.
        """
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        assert next(p for p in scheduler.plans_in_flight if p.lane is plan.lane) is plan
        scheduler.plans_in_flight.remove(plan)
        scheduler.pool.free([copy.source for copy in plan.copies])
        drawn = iter(rows)
        updates: dict[Hashable, RequestUpdate] = {}
        num_scores = 0
        for chunk in plan.chunks:
            sequence, live = chunk.sequence, chunk.sequence.request
            tokens = [next(drawn) for _ in chunk.draws]
            for draw in chunk.draws:
                draw.sequence.num_pending -= 1
            if live.scores is not None and scores is not None:
                reports = scores[num_scores : num_scores + chunk.num_scores]
                live.scores[chunk.start : chunk.start + chunk.num_scores] = trim(
                    reports, live.params.prompt_logprobs or 0
                )
            num_scores += chunk.num_scores
            is_over_run = sequence.status is SequenceStatus.FINISHED
            scheduler.booked(sequence)
            if is_over_run:
                continue
            allocator.cache_computed(sequence, chunk.end)
            self.num_prompt_tokens += max(0, min(chunk.end, sequence.num_prompt_tokens) - chunk.start)
            if tokens:
                update = updates.get(live.key)
                if update is None:
                    update = updates[live.key] = RequestUpdate(live.key, whole=live.request.whole)
                    live.num_alone_steps = max(0, live.num_alone_steps - 1)
                self._book(chunk, tokens, update)
                self._note_timings(live, update, plan.launched_at, now)
        return list(updates.values())

    def _book(self, chunk: Chunk, rows: list[SampledRow], update: RequestUpdate) -> None:
        """Hand the drawn tokens to their sequences."""
        live = chunk.sequence.request
        self.num_output_tokens += len(rows)
        if not live.forked and not live.prefill_only:
            self.scheduler.fork(live)
        update.prompt_scores = live.take_scores() or update.prompt_scores
        has_ended = False
        for (sampler, _, _), row in zip(chunk.draws, rows, strict=True):
            token = self._token(sampler, row)
            update.tokens.append(token)
            if live.prefill_only:
                self.scheduler.finish(sampler, hold_blocks=sampler is live.lead)
                has_ended = True
                continue
            sampler.append(row.token_id)
            if token.finish_reason is not None:
                self.scheduler.finish(sampler)
                has_ended = True
        if has_ended and live.num_places == 0:
            update.finished = True
            if not live.prefill_only:
                del self.scheduler.requests[live.key]

    def _token(self, sequence: Sequence, row: SampledRow) -> SampledToken:
        """A drawn token, of which the sequence's rules hear unless it ends the sequence by itself."""
        position = sequence.num_output_tokens
        finish = find_stop(sequence.request.params, self.scheduler.limits.eos_token_ids, row.token_id)
        is_text = finish is GOES_ON and sequence.tell(row.token_id)
        if is_text:
            finish = Finish("stop")
        elif finish is GOES_ON and len(sequence.token_ids) + 1 >= sequence.max_total_tokens:
            finish = Finish("length")
        return SampledToken(
            sequence.index, position, row.token_id, row.logprobs, finish.reason, finish.stop_reason, is_text
        )

    @staticmethod
    def _note_timings(live: LiveRequest, update: RequestUpdate, launched_at: float, now: float) -> None:
        """Durations, once each: those of a prefill with the first token, those of a start_decode() with the next."""
        if live.queued_at is not None and live.scheduled_at is not None:
            update.num_cached_tokens = live.num_cached_tokens
            update.prefill_queue = live.scheduled_at - live.queued_at
            update.prefill = now - live.scheduled_at
            live.queued_at = live.scheduled_at = None
            live.first_token_at = now
        if live.started_at is not None and live.joined_at is not None:
            update.join_wait = live.joined_at - live.started_at
            update.first_launch = launched_at - live.joined_at
            update.first_decode_step = now - live.joined_at
            live.started_at = live.joined_at = None
