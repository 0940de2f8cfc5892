"""Predicted costs of each split: what a decode step takes there, and what prompts beside it get.

Both are known in terms of steps that have every SM, whose costs the token budget learns. What the two lanes do to each
other cannot be known before it is tried: each split starts from a guess, and every step that ran in it corrects that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pdray.engine.schedule.step_costs import StepCosts

# H100, Qwen3-8B: a decode step of 32 sequences on part of the SMs, beside prompts without end on the others, over one
# that runs alone; and those prompts' rate over what they get in large steps. By the share of the SMs that decode.
SLOWDOWNS = ((0.12, 2.9), (0.24, 1.6), (0.36, 1.4), (0.48, 1.3), (1.0, 1.0))
LEFT_TO_PROMPTS = ((0.12, 0.55), (0.24, 0.48), (0.36, 0.38), (0.48, 0.31), (1.0, 0.0))
WITHOUT_PARTITIONS = (2.5, 0.5)  # the same of two plain streams
LARGE_STEP = 2048  # tokens of prompt
WEIGHT = 0.15  # of the newest duration in a mean
FIRST_WEIGHT = 0.5  # while there are few
OUTLIER = 4.0  # times the prediction: a step that was held up counts as that at most
FORGET_S = 60.0  # after which what was found of a split that has not run counts half
OF_NEIGHBOUR = 0.5  # how far what was found of a split holds, as a power, for the next one


class Arrangement(NamedTuple):
    """How prompts and decodes that both wait share the device.

    Attributes:
        decode_sms: SMs of the decodes' lane; the prompts' has the rest. None: both in one step, on every SM. 0: two
            lanes without partitions.
        chunk: tokens of a step of both; None: as the token budget says.
    """

    decode_sms: int | None = None
    chunk: int | None = None

    @property
    def is_split(self) -> bool:
        return self.decode_sms is not None


MIXED = Arrangement()


class Prediction(NamedTuple):
    """Attributes:
    step_s: between two tokens of a sequence. prompt_rate: tokens of prompts a second. plain_s: see step_s, without any.
    """

    step_s: float
    prompt_rate: float
    plain_s: float

    @property
    def delay(self) -> float:
        """By how much each token of a prompt delays every stream, in seconds, not below 0."""
        return max(0.0, 1 - self.plain_s / self.step_s) / self.prompt_rate


class Mean:
    """An exponential moving mean that follows its first values faster."""

    def __init__(self, start: float) -> None:
        self.value = start
        self._count = 0

    def add(self, value: float) -> None:
        """Take one more value in."""
        weight = max(WEIGHT, FIRST_WEIGHT / (1 + self._count))
        self._count += 1
        self.value = (1 - weight) * self.value + weight * value


class Found(NamedTuple):
    """Attributes:
    step, rate: measured over guessed. at: when it last ran.
    """

    step: Mean
    rate: Mean
    at: float


class SplitCosts:
    """See the module. Times are seconds on one clock of the caller's.

    Args:
        costs: of steps that have every SM. num_sms: of the device.
    """

    def __init__(self, costs: StepCosts, num_sms: int) -> None:
        self.costs = costs
        self._num_sms = num_sms
        self._found: dict[int, Found] = {}  # by decode_sms
        self._last_token_s: float | None = None  # of when there was a large step

    def predict(self, decode_sms: int, num_decodes: int, context: float, now: float) -> Prediction | None:
        """Of a split beside so many decodes. None: no plain step, or no large one of prompts, was seen yet.

        Args:
            context: tokens before those of the prompt.
        """
        guess = self._guess(decode_sms, num_decodes, context)
        if guess is None or not self._found:
            return guess
        nearest = min(self._found, key=lambda known: abs(math.log(max(known, 1) / max(decode_sms, 1))))
        found = self._found[nearest]
        share = 0.5 ** ((now - found.at) / FORGET_S) * (1.0 if nearest == decode_sms else OF_NEIGHBOUR)
        step, rate = (_soften(mean.value, share) for mean in (found.step, found.rate))
        return guess._replace(step_s=guess.step_s * step, prompt_rate=guess.prompt_rate * rate)

    def _guess(self, decode_sms: int, num_decodes: int, context: float) -> Prediction | None:
        plain_s, token_s = self.costs.plain(num_decodes), self.token_s(context)
        if plain_s is None or not token_s:
            return None
        share = decode_sms / self._num_sms
        points = SLOWDOWNS, LEFT_TO_PROMPTS
        slower, left = (interpolate(each, share) for each in points) if decode_sms else WITHOUT_PARTITIONS
        return Prediction(plain_s * slower, left / token_s, plain_s)

    def token_s(self, context: float) -> float | None:
        """Seconds for each token of a large step; small ones, whose tokens take less, say nothing of it."""
        if self.costs.largest_prompt() >= LARGE_STEP / 2 and (added_s := self.costs.added(LARGE_STEP, 0.0)):
            self._last_token_s = added_s / LARGE_STEP
        last = self._last_token_s
        return None if last is None else last * self.costs.weigh(1, context)

    def note_step(self, decode_sms: int, num_decodes: int, seconds: float, now: float) -> None:
        """A step that decodes took so long, and prompts were computed beside it all the time."""
        if (guess := self._guess(decode_sms, num_decodes, 0.0)) is not None:
            self._find(decode_sms, now).step.add(min(seconds / guess.step_s, OUTLIER))

    def note_rate(self, decode_sms: int, context: float, rate: float, now: float) -> None:
        """So many tokens of prompts a second were computed, and sequences decoded all the time."""
        if (guess := self._guess(decode_sms, 1, context)) is not None:
            self._find(decode_sms, now).rate.add(min(max(rate / guess.prompt_rate, 1 / OUTLIER), OUTLIER))

    def _find(self, decode_sms: int, now: float) -> Found:
        found = self._found.get(decode_sms, Found(Mean(1.0), Mean(1.0), now))
        self._found[decode_sms] = found._replace(at=now)
        return found


def _soften(ratio: float, share: float) -> float:
    """The ratio, drawn towards 1 as ``share`` falls from 1 to 0."""
    return math.exp(math.log(ratio) * share)


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Between the two nearest points; the first or last value beyond them."""
    before = points[0]
    for point in points:
        if x <= point[0]:
            width = point[0] - before[0]
            part = (x - before[0]) / width if width else 1.0
            return before[1] + (point[1] - before[1]) * part
        before = point
    return before[1]
