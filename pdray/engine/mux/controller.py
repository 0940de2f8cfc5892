"""The choice, while prompts and decodes both wait, between one mixed step and two lanes, and of the lanes' sizes.

What decodes get is held first: no step should take longer than the target. Of the arrangements that hold it the one
with the highest rate of prompts is taken, or, where a TTFT is to be held and several hold it, the one with the shortest
steps. Mixed steps are preferred: two lanes must promise more than they. A change takes a while of the same mind, and
comes no sooner than HOLD_S after the last, unless steps are too long as it is.

Pure: no clock, no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pdray.engine.mux.costs import Arrangement, Prediction, StepCosts

CHUNKS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # that have a graph: pdray/engine/step/graphs.py
HOLD_S = 0.5
PATIENCE = 3  # choices in a row before a change
GAIN = 1.1  # of the rate of prompts that is worth a change
WORTH_SPLIT = 1.05  # of the best mixed step's rate that two lanes must promise
DEFAULT_SLOWDOWN = 2.0  # without a target, steps may take so many times a plain one
MARGIN = 0.95  # of the target, which is for all steps and not for their mean


class Load(NamedTuple):
    """What waits.

    Attributes:
        kv_tokens: in the KV of sequences that decode.
        prompt_tokens: of prompts that are not computed. oldest_wait_s: of the prompt that has waited longest.
    """

    kv_tokens: int
    prompt_tokens: int
    oldest_wait_s: float


@dataclass(frozen=True, slots=True)
class Targets:
    """Attributes:
    tpot_s: of a step that decodes; None: DEFAULT_SLOWDOWN times a plain one. ttft_s: of prompts; None: none.
    """

    tpot_s: float | None = None
    ttft_s: float | None = None


class Controller:
    """Callers hold the engine's lock.

    Args:
        may_mix: mixed steps may be chosen too; else they are what there is while there is no split.
        most_tokens: of a mixed step.

    Attributes:
        splits: SMs of the decodes' lane that may be chosen; grows while graphs are captured.
        targets: to be held from now on.
        current: what was chosen last. num_changes: of it, so far.
        fixed: chosen whatever is measured, for benchmarks.
    """

    def __init__(self, costs: StepCosts, targets: Targets, *, may_mix: bool, most_tokens: int) -> None:
        self.costs = costs
        self.splits: list[int] = []
        self.num_changes = 0
        self.fixed: Arrangement | None = None
        self.targets = targets
        chunks = [n for n in CHUNKS if n < most_tokens] + [most_tokens]
        self._may_mix = may_mix
        self._mixed = [Arrangement(chunk=n) for n in chunks]
        self.current = self._mixed[-1]
        self._changed_at = float("-inf")
        self._wanted = self.current
        self._num_wanted = 0

    def choose(self, now: float, load: Load) -> Arrangement:
        """The arrangement of the next step, while both sides wait."""
        if self.fixed is not None:
            self.current = self.fixed
            return self.fixed
        splits = [Arrangement(decode_sms=n) for n in self.splits]
        options = self._mixed + splits if self._may_mix else splits or self._mixed[-1:]
        if self.current not in options:
            self._change(now, options[-1])
        predictions = {a: self.costs.predict(a, load.kv_tokens, now) for a in options}
        known = {a: prediction for a, prediction in predictions.items() if prediction is not None}
        if known:
            self._consider(now, self._best(known, load), known, self._limit_s(load))
        return self.current

    def _limit_s(self, load: Load) -> float:
        if self.targets.tpot_s is not None:
            return self.targets.tpot_s * MARGIN
        return (self.costs.plain_s(load.kv_tokens) or 0.0) * DEFAULT_SLOWDOWN

    def _best(self, known: dict[Arrangement, Prediction], load: Load) -> Arrangement:
        """The best of all, whatever runs now."""
        limit_s, ttft_s = self._limit_s(load), self.targets.ttft_s
        holding = {a: p for a, p in known.items() if p.step_s <= limit_s}
        if not holding:
            return min(known, key=lambda a: known[a].step_s)
        if ttft_s is not None:
            quick = [a for a, p in holding.items() if load.oldest_wait_s + load.prompt_tokens / p.prompt_rate <= ttft_s]
            if quick:
                return min(quick, key=lambda a: holding[a].step_s)
        return max(holding, key=lambda a: holding[a].prompt_rate / (WORTH_SPLIT if a.is_split else 1.0))

    def _consider(self, now: float, best: Arrangement, known: dict[Arrangement, Prediction], limit_s: float) -> None:
        """Change to the best if it is worth it and was so for a while."""
        current = known[self.current]
        is_too_long = current.step_s > limit_s and known[best].step_s < current.step_s
        is_faster = known[best].prompt_rate > GAIN * current.prompt_rate
        is_smoother = self.targets.ttft_s is not None and known[best].step_s * GAIN < current.step_s
        if best == self.current or not (is_too_long or is_faster or is_smoother):
            self._num_wanted = 0
            return
        self._num_wanted = self._num_wanted + 1 if best == self._wanted else 1
        self._wanted = best
        if self._num_wanted >= PATIENCE and now - self._changed_at >= (HOLD_S / 4 if is_too_long else HOLD_S):
            self._change(now, best)

    def _change(self, now: float, arrangement: Arrangement) -> None:
        self.num_changes += 1
        self.current, self._changed_at, self._num_wanted = arrangement, now, 0
