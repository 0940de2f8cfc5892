"""How fast prompts are to be computed beside streams: as slowly as their first tokens allow.

Each token of a prompt delays every stream a little, the least in small steps, which hide it behind the reading of the
weights. So prompts get no more than what has each of them done within the TTFT, and no less than what arrives: a queue
that grows in small steps must be computed in large ones later. While streams are slower than the TPOT, prompts that
have time wait, and late ones do not hurry: otherwise both targets are missed where only one can be held.

Pure: no clock, no device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pdray.engine.mux.costs import Prediction
from pdray.engine.mux.load import Load, Stream
from pdray.engine.schedule.token_budget import GROWTH, LEAST_STRETCH, MAX_STRETCH, AdaptiveBudget

TTFT_MARGIN = 0.8  # of the target, which is for all prompts and counts from before they are queued
TPOT_MARGIN = 0.96  # of the target, which is for all streams and not for their mean
ARRIVALS_S = 3.0  # of arrivals that say how many come
ARRIVALS_MARGIN = 1.3
LEAST_STEPS = 8  # of a stream that say how fast it is
MOST_AHEAD = 64  # steps in which a stream may make up for slow ones
HURRIED_STRETCH = 3.5  # of steps to plain ones, where prompts need it
HOLD_SHARE = 0.9  # of the rate in the smallest steps: prompts that need more do not wait


@dataclass(frozen=True, slots=True)
class Targets:
    """Attributes:
    tpot_s: of streams; None: by the duration of a plain step (see AdaptiveBudget). ttft_s: of prompts; None: they are
        computed as fast as tpot_s allows.
    """

    tpot_s: float | None = None
    ttft_s: float | None = None


class Pace(NamedTuple):
    """Attributes:
    needed, wanted: tokens of prompts a second: for the first tokens to be in time, and to keep up with arrivals too.
    is_slow: streams have been slower than they may be; those that must miss their TPOT whatever comes do not count.
    """

    needed: float
    wanted: float
    is_slow: bool


class Pacer:
    """Makes a Pace of what waits, for Targets with a TTFT. Times are seconds on one clock of the caller's.

    Args:
        half_context: see StepCosts.
    """

    def __init__(self, half_context: float) -> None:
        self._half_context = half_context
        self._arriving = 0.0  # tokens of prompts a second
        self._looked_at = 0.0
        self._seen_until = -math.inf  # prompts that were queued by then are counted

    def look(self, now: float, load: Load, targets: Targets, plain_s: float | None) -> Pace:
        """Take what has come into account. Rates are of tokens that cost as much as the first prompt's next one.

        Args:
            plain_s: of a step without prompts, where that is known.
        """
        assert targets.ttft_s is not None
        each = 1 + load.context / self._half_context
        self._arriving *= math.exp((self._looked_at - now) / ARRIVALS_S)
        self._looked_at = now
        newest, left, needed = self._seen_until, 0.0, 0.0
        for wait in load.prompts:
            queued_at = now - wait.waited_s
            if queued_at > self._seen_until + 1e-6:
                self._arriving += self._weigh(wait.all_tokens, wait.all_tokens) / ARRIVALS_S
                newest = max(newest, queued_at)
            left += self._weigh(wait.num_tokens, wait.all_tokens)
            time_left = targets.ttft_s * TTFT_MARGIN - wait.waited_s
            needed = max(needed, left / each / time_left if time_left > 0 else math.inf)
        self._seen_until = newest
        is_slow = targets.tpot_s is not None and are_slow(load.streams, targets.tpot_s, plain_s or 0.0)
        return Pace(needed, max(needed, ARRIVALS_MARGIN * self._arriving / each), is_slow)

    def _weigh(self, num_tokens: int, end: int) -> float:
        """Tokens without context that cost as much as the last ``num_tokens`` of a prompt of ``end``."""
        return num_tokens * (1 + (end - num_tokens / 2) / self._half_context)


def are_slow(streams: Sequence[Stream], tpot_s: float, plain_s: float) -> bool:
    """Whether streams that can still have their TPOT have been slower so far, on average.

    The others do not count: prompts that wait for their sake would only have their first tokens late, too.
    """
    paces = []
    for age_s, num_steps, num_left in streams:
        ahead = min(num_left, MOST_AHEAD)
        if num_steps >= LEAST_STEPS and age_s + ahead * plain_s <= tpot_s * (num_steps + ahead):
            paces.append(age_s / num_steps)
    return bool(paces) and sum(paces) / len(paces) > tpot_s * TPOT_MARGIN


class PacedBudget(AdaptiveBudget):
    """An AdaptiveBudget that computes prompts at a Pace while one is set.

    It does so in the steps that delay streams least, of those that are fast enough and take no longer than they may.
    """

    pace: Pace | None = None

    def tokens(self, num_streams: int, num_queued: int, context: int) -> int:
        """See TokenBudget."""
        if num_streams and self.holds_back(num_streams, context):
            return num_streams
        return super().tokens(num_streams, num_queued, context)

    def holds_back(self, num_streams: int, context: int) -> bool:
        """Whether prompts are to wait."""
        if self.pace is None or not self.pace.is_slow:
            return False
        smallest = self.sizes_beside(num_streams)[0]
        least = self._predictions([smallest], num_streams, context).get(smallest)
        return least is not None and self.pace.needed < HOLD_SHARE * least.prompt_rate

    def predict(self, num_streams: int, num_queued: int, context: int) -> Prediction | None:
        """Of the next step with prompts; None while nothing is known."""
        size = self._choose(self.sizes_beside(num_streams), num_streams, num_queued, context)
        return self._predictions([size], num_streams, context).get(size)

    def longest_s(self, plain_s: float) -> float:
        """Seconds that a step with prompts may take, where a plain one takes ``plain_s``.

        A stream's TPOT is the mean of many: while that is held, a step may take longer if the prompts need it.
        """
        if self.target_s is None or self.pace is None:
            return plain_s * MAX_STRETCH
        stretch = LEAST_STRETCH if self.pace.is_slow else HURRIED_STRETCH
        return max(self.target_s * TPOT_MARGIN, plain_s * stretch)

    def _choose(self, sizes: list[int], num_streams: int, num_queued: int, context: int) -> int:
        if self.pace is None:
            return super()._choose(sizes, num_streams, num_queued, context)
        known = self._predictions(sizes, num_streams, context)
        fitting = {size: p for size, p in known.items() if size == sizes[0] or p.step_s <= self.longest_s(p.plain_s)}
        fast_enough = [size for size, p in fitting.items() if p.prompt_rate >= self.pace.wanted]
        if fast_enough:
            return min(fast_enough, key=lambda size: fitting[size].delay)
        return max(fitting, key=lambda size: fitting[size].prompt_rate, default=sizes[0])

    def _predictions(self, sizes: list[int], num_streams: int, context: int) -> dict[int, Prediction]:
        """Of steps of these sizes, as far as they are known, and not much larger than any that was measured."""
        plain_s, largest = self.costs.plain(num_streams), GROWTH * self.costs.largest_prompt()
        known: dict[int, Prediction] = {}
        for size in sizes:
            added_s = self.costs.added(size - num_streams, context)
            if plain_s is None or added_s is None:
                break
            if known and self.costs.weigh(size - num_streams, context) > largest:
                break
            step_s = plain_s + added_s
            known[size] = Prediction(step_s, (size - num_streams) / step_s, plain_s)
        return known
