"""How many tokens a step may compute: all that fit where nothing decodes, and few enough where streams wait for it.

Each stream in the batch gets one token a step, so a prompt beside them makes all of them wait for its chunk. A small
chunk is nearly free (a decode step waits for memory, a chunk for arithmetic), a large one has the prompt done sooner.
So a chunk starts small and grows with what is queued; see Agrawal et al. 2024, "Sarathi-Serve", for the trade itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pdray.engine.schedule.order import num_queued_tokens
from pdray.engine.schedule.plan import Share, StepPlan
from pdray.engine.schedule.sequence import Sequence
from pdray.engine.schedule.step_costs import StepCosts, StepWork

if TYPE_CHECKING:
    from pdray.engine.schedule.scheduler import Scheduler

# Sizes of steps with prompts and decodes, in tokens. On CUDA they have a graph each (pdray/engine/step/graphs.py).
STEP_SIZES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
SMALL_STEP_SIZES = (16, 32, 64, 96)  # where nothing pads them

# Chosen by simulation (pdray/testing/simulated_load.py). Measured on an H100, Qwen3-8B, 7 requests/s of 2,048 tokens in
# and 256 out, with a MAX_STRETCH of 4: TPOT p50 0.86 of what steps of 2,048 tokens give, longest gaps half, TTFT p50
# 27 ms more.
BASE_STRETCH = 1.5  # a step with prompts to one without, while little is queued
MAX_STRETCH = 4.5  # the same while much is queued
DRAIN_STEPS = 4  # steps in which what is queued should be computed
LEAST_STRETCH = 1.25  # prompts get so much even where target_tpot_ms leaves no room for them
PATIENCE_S = 1.0  # a queue that takes longer to compute counts for more than target_tpot_ms
LEAST_TOKENS = 16  # of prompts in each step
GROWTH = 2  # of a step with prompts over the largest one measured
MEASURE_EVERY = 64  # steps without one that only decodes, which is then made, so that its duration stays known


class TokenBudget(Protocol):
    """Says how many tokens a step may compute, and learns from how long steps took."""

    def tokens(self, num_streams: int, num_queued: int, context: int) -> int:
        """Tokens of the next step, between ``num_streams`` and max_num_batched_tokens.

        Args:
            num_streams: tokens that it computes already: one for each sequence whose reader waits for the next.
            num_queued: tokens of prompts that could be computed now.
            context: tokens before those that come first.
        """
        ...

    def note(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long, from the end of the one before it where that was in flight when it was launched."""
        ...


class FixedBudget:
    """max_num_batched_tokens, whatever else is in the batch."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens

    def tokens(self, num_streams: int, num_queued: int, context: int) -> int:
        return self.max_tokens

    def note(self, plan: StepPlan, seconds: float) -> None:
        pass


class AdaptiveBudget:
    """The largest step that streams can be asked to wait for, by the step times measured so far. Not thread-safe.

    Args:
        max_tokens: upper bound, and the budget where nothing decodes.
        sizes: of steps, ascending; the budget beside streams is one of them.
        target_s: what a step beside streams should take at most, unless what is queued waits for longer than
            PATIENCE_S; default: BASE_STRETCH to MAX_STRETCH times what it takes without prompts, by how much is queued.
        half_context: see StepCosts.
    """

    def __init__(
        self, max_tokens: int, sizes: tuple[int, ...], *, target_s: float | None = None, half_context: float = 16384.0
    ) -> None:
        self.max_tokens = max_tokens
        self.target_s = target_s
        self.costs = StepCosts(half_context)
        self._sizes = [size for size in sizes if size < max_tokens] + [max_tokens]
        self._last_was_plain = False

    def note(self, plan: StepPlan, seconds: float) -> None:
        """See TokenBudget."""
        self.costs.note(work_of(plan), seconds)

    def tokens(self, num_streams: int, num_queued: int, context: int) -> int:
        """See TokenBudget."""
        if not num_streams:
            return self.max_tokens
        age = self.costs.plain_age(num_streams)
        self._last_was_plain = not self._last_was_plain and (age is None or age > MEASURE_EVERY)
        if self._last_was_plain:
            return num_streams
        return self._choose(self.sizes_beside(num_streams), num_streams, num_queued, context)

    def sizes_beside(self, num_streams: int) -> list[int]:
        """Of steps that have room for prompts, ascending."""
        return [size for size in self._sizes if size >= num_streams + LEAST_TOKENS] or [self.max_tokens]

    def _choose(self, sizes: list[int], num_streams: int, num_queued: int, context: int) -> int:
        """The largest size that keeps to what a step may take; larger ones too until they catch up with the queue."""
        chosen = sizes[0]
        plain = self.costs.plain(num_streams)
        if plain is None:
            return chosen
        taken = plain + (self.costs.added(chosen - num_streams, context) or 0.0)
        largest = GROWTH * self.costs.largest_prompt()
        for size in sizes[1:]:
            added = self.costs.added(size - num_streams, context)
            if added is None or self.costs.weigh(size - num_streams, context) > largest:
                break
            num_steps = num_queued / (chosen - num_streams)
            if plain + added > self._allowed(plain, num_steps, num_steps * taken):
                break
            chosen, taken = size, plain + added
        return chosen

    def _allowed(self, plain: float, num_steps: float, wait_s: float) -> float:
        """Seconds that a step may take.

        Args:
            num_steps, wait_s: until what is queued is computed, with smaller steps.
        """
        if self.target_s is None:
            return plain * (MAX_STRETCH if num_steps > DRAIN_STEPS else BASE_STRETCH)
        return max(self.target_s, plain * (MAX_STRETCH if wait_s > PATIENCE_S else LEAST_STRETCH))


def work_of(plan: StepPlan) -> StepWork:
    """What a plan computes, as far as its duration depends on it."""
    prompts = plan.chunks[plan.num_decodes :]
    num_tokens = plan.num_tokens - plan.num_decodes
    context = sum(chunk.start * chunk.num_tokens for chunk in prompts) / num_tokens if prompts else 0.0
    return StepWork(plan.num_decodes, num_tokens, context)


def tokens_beside(scheduler: Scheduler, plan: StepPlan, begun: list[Sequence], share: Share) -> int:
    """Tokens of the step that ``plan`` begins with those of decoding sequences.

    Args:
        begun: sequences of the batch whose prompts are not computed yet.
    """
    if share.prompts == 0:
        return plan.num_tokens
    if share.tokens is not None or all(chunk.sequence.request.prefill_only for chunk in plan.chunks):
        return share.budget(scheduler.limits.max_num_batched_tokens, plan.num_tokens)
    limits, pool = scheduler.limits, scheduler.pool
    num_places = limits.max_num_seqs - scheduler.num_places
    num_queued = num_queued_tokens(scheduler.waiting, num_places, pool.num_free * limits.block_size)
    num_queued += sum(s.num_uncomputed_tokens for s in begun)
    return scheduler.budget.tokens(plan.num_tokens, num_queued, begun[0].num_computed_tokens if begun else 0)
