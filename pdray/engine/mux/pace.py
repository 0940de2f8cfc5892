"""Which prompts and streams can still be in time, and what a step costs either side.

A token of a prompt delays every stream; a prompt that waits has its own first token late. Where both targets can be
held, prompts are computed in the steps that delay streams least. Where not, the choice is the one that loses least: a
stream is lost by a delay that it cannot make up for, a prompt by a rate at which its turn comes too late. Prompts wait,
in a plain step, where that loses less than any step with them.

Pure: no clock, no device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from pdray.engine.mux.costs import Prediction
from pdray.engine.mux.load import Load, Wait
from pdray.engine.schedule.step_costs import StepCosts
from pdray.engine.schedule.token_budget import GROWTH, MAX_STRETCH, AdaptiveBudget

TTFT_MARGIN = 0.8  # of the target, which counts from before prompts are queued
TPOT_MARGIN = 0.985  # of the target
LEAST_AHEAD = 16  # steps whose time a stream may have spent on prompts before it is paid back
PROMPTS_AHEAD = 1.2  # prompts of which a stream may have paid in any case
STREAM_WEIGHT = 2.0  # lost prompts that a lost stream counts for: it has been served so far
OVERDUE = 20  # times the TTFT that a prompt waits at most for others to go first, or for streams
HURRIED_STRETCH = 9.0  # of steps to plain ones, where prompts need it

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Targets:
    """Attributes:
    tpot_s: of streams; None: by the duration of a plain step (see AdaptiveBudget). ttft_s: of prompts; None: they are
        computed as fast as tpot_s allows.
    """

    tpot_s: float | None = None
    ttft_s: float | None = None


class Due(NamedTuple):
    """A prompt that can be in time.

    Attributes:
        num_tokens: that are left, counted as the first prompt's next one. time_left_s: in which to compute them.
    """

    num_tokens: float
    time_left_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Pace:
    """What waits, as it is weighed. Tokens are counted as the first prompt's next one.

    Attributes:
        first_left, first_all: tokens of the first prompt: that are left, and of all of it.
        prompts: those that have begun, and those that can be in time, in their order.
        behind_s: [streams whose TPOT counts] what each has taken beyond tpot_s for every token.
        num_left: [those streams] tokens that are expected to come.
        tpot_s: with its margin.
        may_wait: the first prompt. is_late: it has missed its TTFT, and has not begun.
    """

    first_left: float
    first_all: float
    prompts: Sequence[Due]
    behind_s: np.ndarray
    num_left: np.ndarray
    tpot_s: float
    may_wait: bool
    is_late: bool

    def best(self, options: Mapping[T, Prediction], caution: Mapping[T, float] | None = None) -> T:
        """The option that loses least; of several, or for a late prompt, the one that delays streams least.

        Args:
            caution: factors of the delay, where they are not 1.
        """

        def delay(option: T) -> float:
            return options[option].delay * (caution or {}).get(option, 1.0)

        if self.is_late:
            return min(options, key=delay)
        least = min(step.delay for step in options.values())
        return min(options, key=lambda option: (self.losses(options[option], least), delay(option)))

    def losses(self, step: Prediction, least_delay: float) -> float:
        """How much is lost by such steps, as a number of prompts; see STREAM_WEIGHT."""
        return STREAM_WEIGHT * int(self._lost_streams(step, least_delay).sum()) + self._lost_prompts(step.prompt_rate)

    def should_wait(self, options: Collection[Prediction], step: Prediction) -> bool:
        """Whether prompts are to wait, in plain steps, rather than be computed in ``step``, one of the options.

        What waiting loses is counted as if it lasted until the first of the streams ends that ``step`` would lose.
        """
        if not self.may_wait:
            return False
        least, fastest = min(each.delay for each in options), max(each.prompt_rate for each in options)
        lost = self._lost_streams(step, least)
        if self.is_late or not lost.any():
            return bool(lost.any())
        waited_s = float(self.num_left[lost].min()) * step.plain_s
        return self._lost_prompts(fastest, waited_s) < self.losses(step, least)

    def _lost_streams(self, step: Prediction, least_delay: float) -> np.ndarray:
        """[streams] bool: that cannot make up for what is left of the first prompt in such steps.

        A stream may be behind its TPOT by no more than what it makes up for in a few steps, so that those that come
        later find room, but may always pay for a prompt: long ones take all that it has at once.
        """
        gained_s = self.tpot_s - step.plain_s
        ahead = float(LEAST_AHEAD)
        if gained_s > 0:
            ahead = max(ahead, PROMPTS_AHEAD * least_delay * self.first_all / gained_s)
        cost_s, slower_s = step.delay * self.first_left, step.step_s - step.plain_s
        left = self.num_left
        is_saved = self.behind_s <= left * gained_s  # by plain steps alone
        can_pay = np.minimum(left, ahead) * gained_s - self.behind_s >= np.minimum(cost_s, left * slower_s)
        return is_saved & ~can_pay

    def _lost_prompts(self, rate: float, after_s: float = 0.0) -> int:
        """How many prompts are late at so many tokens a second, where those that are let the others go first."""
        at_s, num_lost = after_s, 0
        for num_tokens, time_left_s in self.prompts:
            end_s = at_s + num_tokens / rate
            if end_s <= time_left_s:
                at_s = end_s
            else:
                num_lost += 1
        return num_lost


@dataclass(frozen=True, slots=True)
class Lateness:
    """Of prompts that have not begun, by what is known now.

    Attributes:
        ttft_s: the target. token_s: seconds for each token in large steps. costs: of steps.
    """

    ttft_s: float
    token_s: float
    costs: StepCosts

    def is_late(self, wait: Wait) -> bool:
        """Whether it must miss its TTFT."""
        tokens = self.costs.weigh(wait.num_tokens, wait.num_tokens / 2)
        return wait.waited_s + self.token_s * tokens > TTFT_MARGIN * self.ttft_s

    def is_overdue(self, wait: Wait) -> bool:
        """Whether it has waited for so long that it goes before all others."""
        return wait.waited_s > OVERDUE * self.ttft_s


def weigh_load(load: Load, targets: Targets, lateness: Lateness, *, may_wait: bool) -> Pace:
    """The Pace of what waits for targets with a TTFT.

    Args:
        may_wait: see Pace; one that is overdue, begun or not, may not in any case, nor may a preempted stream.
    """
    costs = lateness.costs
    each = costs.weigh(1, load.context)

    def weigh(num_tokens: int, end: int) -> float:
        return costs.weigh(num_tokens, end - num_tokens / 2) / each

    def due(wait: Wait) -> Due:
        return Due(weigh(wait.num_tokens, wait.all_tokens), TTFT_MARGIN * lateness.ttft_s - wait.waited_s)

    begun, waiting = load.prompts[: load.num_begun], load.prompts[load.num_begun :]
    first = load.prompts[0]
    tpot_s = (targets.tpot_s or 0.0) * TPOT_MARGIN
    streams = load.streams if targets.tpot_s is not None else ()
    return Pace(
        first_left=weigh(first.num_tokens, first.all_tokens),
        first_all=weigh(first.all_tokens, first.all_tokens),
        prompts=[due(wait) for wait in (*begun, *(each for each in waiting if not lateness.is_late(each)))],
        behind_s=np.array([stream.age_s - stream.num_steps * tpot_s for stream in streams]),
        num_left=np.array([stream.num_left for stream in streams], dtype=np.int64),
        tpot_s=tpot_s,
        may_wait=may_wait and not first.is_stream and not lateness.is_overdue(first),
        is_late=not begun and lateness.is_late(first),
    )


class PacedBudget(AdaptiveBudget):
    """An AdaptiveBudget that computes prompts at a Pace while one is set.

    Attributes:
        pace: of what waits; None: streams alone decide.
        holds: prompts wait, and steps are plain. Set by Controller.choose() before each step, as is pace.
    """

    pace: Pace | None = None
    holds: bool = False
    _last_known: tuple[object, dict[int, Prediction]] = None, {}  # predictions(), by what they depend on

    def tokens(self, num_streams: int, num_queued: int, context: int) -> int:
        """See TokenBudget."""
        if num_streams and self.holds:
            return num_streams
        return super().tokens(num_streams, num_queued, context)

    def predict(self, num_streams: int, num_queued: int, context: int) -> Prediction | None:
        """Of the next step with prompts; None while nothing is known."""
        size = self._choose(self.sizes_beside(num_streams), num_streams, num_queued, context)
        return self.predictions(num_streams, context).get(size)

    def _choose(self, sizes: list[int], num_streams: int, num_queued: int, context: int) -> int:
        if self.pace is None:
            return super()._choose(sizes, num_streams, num_queued, context)
        known = self.predictions(num_streams, context)
        return self.pace.best(known) if known else sizes[0]

    def predictions(self, num_streams: int, context: int) -> dict[int, Prediction]:
        """Predictions by size: of steps with room for prompts, not much larger than any measured one, and not too long.

        Empty while nothing is known. A stream's TPOT is the mean of many steps, of which some may take much longer.
        """
        state = (num_streams, context, self.target_s is None, self.costs.num_steps)
        if self._last_known[0] != state:
            self._last_known = state, self._predictions(num_streams, context)
        return self._last_known[1]

    def _predictions(self, num_streams: int, context: int) -> dict[int, Prediction]:
        plain_s, largest = self.costs.plain(num_streams), GROWTH * self.costs.largest_prompt()
        stretch = MAX_STRETCH if self.target_s is None else HURRIED_STRETCH
        known: dict[int, Prediction] = {}
        for size in self.sizes_beside(num_streams):
            added_s = self.costs.added(size - num_streams, context)
            if plain_s is None or added_s is None or size <= num_streams:
                break
            step_s = plain_s + added_s
            if known and (step_s > plain_s * stretch or self.costs.weigh(size - num_streams, context) > largest):
                break
            known[size] = Prediction(step_s, (size - num_streams) / step_s, plain_s)
        return known
