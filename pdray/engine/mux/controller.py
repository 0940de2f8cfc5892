"""The choice, while prompts and decodes both wait, between one mixed step and two lanes, and of the lanes' sizes.

With a TTFT, the arrangement is taken that loses fewest prompts and streams (see pace.py), of several the one whose
prompts delay streams least; where waiting loses less than any, prompts wait. Without one, no step should take longer
than the target, which mixed steps keep to by their token budget; of the arrangements that hold it and compute prompts
as fast as mixed steps would, the one that delays streams least is taken. Mixed steps are preferred: two lanes must
promise more. A change takes PATIENCE choices in a row, and comes no sooner than HOLD_S after the last, or HOLD_S / 4
where the steps of the present arrangement are too long, or lose more.

Pure: no clock, no device.
"""

from __future__ import annotations

from pdray.engine.mux.costs import MIXED, Arrangement, Prediction, SplitCosts
from pdray.engine.mux.load import Load
from pdray.engine.mux.pace import TPOT_MARGIN, Lateness, PacedBudget, Targets, weigh_load
from pdray.engine.schedule.token_budget import TokenBudget

HOLD_S = 0.5
PATIENCE = 3  # choices in a row before a change
GAIN = 1.1  # of the rate of prompts, or of the delay of streams, that is worth a change
WORTH_SPLIT = 1.05  # times what two lanes must promise
DEFAULT_SLOWDOWN = 2.0  # without a target, steps of two lanes may take so many times a plain one


class Controller:
    """Callers hold the engine's lock.

    Args:
        budget: of mixed steps. Where it learns no costs, throughput alone counts: mixed steps, or the smallest split.
        may_mix: mixed steps may be chosen too; else they are what there is while there is no split.

    Attributes:
        splits: SMs of the decodes' lane that may be chosen, ascending; grows while graphs are captured.
        targets: to be held from now on.
        current: what was chosen last. num_changes: of it, so far.
        fixed: chosen whatever is measured, for benchmarks.
    """

    def __init__(self, costs: SplitCosts, budget: TokenBudget, targets: Targets, *, may_mix: bool) -> None:
        self.costs = costs
        self.splits: list[int] = []
        self.num_changes = 0
        self.fixed: Arrangement | None = None
        self.targets = targets
        self.current = MIXED
        self._budget = budget if isinstance(budget, PacedBudget) else None
        self._may_mix = may_mix
        self._changed_at = float("-inf")
        self._wanted = MIXED
        self._num_wanted = 0

    def choose(self, now: float, load: Load | None, *, may_wait: bool = True) -> Arrangement | None:
        """The arrangement of the next step, and the pace of its prompts.

        Args:
            load: None: one side alone waits, and has the device; then None is returned.
            may_wait: the first prompt; not where it has its turn, see LateLast.
        """
        budget = self._budget
        if budget is not None:
            budget.pace, budget.holds, budget.target_s = None, False, self.targets.tpot_s
            if load is not None and self.is_paced:
                budget.pace = weigh_load(load, self.targets, self.lateness(), may_wait=may_wait)
        if load is None:
            return None
        if self.fixed is not None:
            self.current = self.fixed
            return self.fixed
        splits = [Arrangement(decode_sms=n) for n in self.splits]
        options = [MIXED, *splits] if self._may_mix else splits or [MIXED]
        if self.current not in options:
            self._change(now, options[0])
        if budget is None or (options == [MIXED] and budget.pace is None):
            return self.current
        known = self._predict(options, budget, load, now)
        if self.current in known:
            self._consider(now, known, load)
        if budget.pace is not None and self._may_mix and self.current in known:
            mixed = budget.predictions(load.num_decodes, load.context).values()
            splits_known = [prediction for arrangement, prediction in known.items() if arrangement.is_split]
            budget.holds = budget.pace.should_wait([*mixed, *splits_known], known[self.current])
            if budget.holds:
                return MIXED
        return self.current

    @property
    def is_paced(self) -> bool:
        """Whether there is a TTFT that decides when prompts are computed."""
        return self.targets.ttft_s is not None and self.fixed is None

    def lateness(self) -> Lateness:
        """Of prompts for the TTFT, by what is known now."""
        assert self.targets.ttft_s is not None
        return Lateness(self.targets.ttft_s, self.costs.token_s(0.0) or 0.0, self.costs.costs)

    def _predict(
        self, options: list[Arrangement], budget: PacedBudget, load: Load, now: float
    ) -> dict[Arrangement, Prediction]:
        decodes, context = load.num_decodes, load.context
        known = {
            a: self.costs.predict(a.decode_sms, decodes, context, now) for a in options if a.decode_sms is not None
        }
        known |= {a: budget.predict(decodes, load.num_queued, context) for a in options if not a.is_split}
        return {a: prediction for a, prediction in known.items() if prediction is not None}

    def _consider(self, now: float, known: dict[Arrangement, Prediction], load: Load) -> None:
        """Change to the best if it is worth it and was so for a while."""
        pace = None if self._budget is None else self._budget.pace
        current = known[self.current]
        if pace is not None:
            chosen = pace.best(known, {a: WORTH_SPLIT for a in known if a.is_split and self._may_mix})
            least = min(step.delay for step in known.values())
            is_urgent = pace.losses(known[chosen], least) < pace.losses(current, least)
            is_better = is_urgent or known[chosen].delay * GAIN < current.delay
        else:
            limit_s = self._limit_s(current.plain_s)
            if MIXED in known:  # which takes longer than the target where that is too short, or prompts wait too long
                limit_s = max(limit_s, known[MIXED].step_s)
            wanted = known[MIXED].prompt_rate if MIXED in known else float("inf")
            chosen = best_of(known, limit_s, wanted)
            best = known[chosen]
            is_urgent = current.step_s > limit_s and best.step_s < current.step_s
            is_faster = current.prompt_rate < wanted and best.prompt_rate > GAIN * current.prompt_rate
            is_smoother = best.delay * GAIN < current.delay and best.prompt_rate >= min(wanted, current.prompt_rate)
            is_better = is_urgent or is_faster or is_smoother
        if chosen == self.current or not is_better:
            self._num_wanted = 0
            return
        self._num_wanted = self._num_wanted + 1 if chosen == self._wanted else 1
        self._wanted = chosen
        if self._num_wanted >= PATIENCE and now - self._changed_at >= (HOLD_S / 4 if is_urgent else HOLD_S):
            self._change(now, chosen)

    def _limit_s(self, plain_s: float) -> float:
        return plain_s * DEFAULT_SLOWDOWN if self.targets.tpot_s is None else self.targets.tpot_s * TPOT_MARGIN

    def _change(self, now: float, arrangement: Arrangement) -> None:
        self.num_changes += 1
        self.current, self._changed_at, self._num_wanted = arrangement, now, 0


def best_of(known: dict[Arrangement, Prediction], limit_s: float, wanted: float) -> Arrangement:
    """The best of all, whatever runs now.

    Args:
        limit_s: of steps. wanted: tokens of prompts a second.
    """

    def worth(arrangement: Arrangement) -> float:
        return WORTH_SPLIT if arrangement.is_split else 1.0

    holding = {a: p for a, p in known.items() if p.step_s <= limit_s}
    if not holding:
        return min(known, key=lambda a: known[a].step_s)
    fast_enough = [a for a, p in holding.items() if p.prompt_rate >= wanted]
    if fast_enough:
        return min(fast_enough, key=lambda a: holding[a].delay * worth(a))
    return max(holding, key=lambda a: holding[a].prompt_rate / worth(a))
