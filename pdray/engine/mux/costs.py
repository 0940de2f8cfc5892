"""Predicted costs of each arrangement of prompts and decodes, from durations of the steps that ran.

A plain decode step reads all weights and all KV, and takes as long as that. A prompt's token takes as long as in the
last long prompts. What the two do to each other cannot be known before it is tried: each arrangement starts from a
guess, and every step that ran in it corrects the guess.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# H100, Qwen3-8B: a decode step of 32 sequences on part of the SMs, beside prompts without end on the others, over one
# that runs alone; and those prompts' rate over that of prompts alone. By the share of the SMs that decode.
SLOWDOWNS = ((0.12, 2.9), (0.24, 1.6), (0.36, 1.4), (0.48, 1.3), (1.0, 1.0))
LEFT_TO_PROMPTS = ((0.12, 0.65), (0.24, 0.63), (0.36, 0.46), (0.48, 0.37), (1.0, 0.0))
WEIGHT = 0.15  # of the newest duration in a mean
FIRST_WEIGHT = 0.5  # while there are few
OUTLIER = 4.0  # times the prediction: a step that was held up counts as that at most
FORGET_S = 60.0  # after which what was found of an arrangement that has not run counts half
OF_NEIGHBOUR = 0.5  # how far what was found of an arrangement holds, as a power, for the next of its kind
LONG_PROMPT = 512  # tokens in a step from which on its prompts' rate is that of long prompts


class Arrangement(NamedTuple):
    """How prompts and decodes that both wait share the device.

    Attributes:
        decode_sms: SMs of the decodes' lane; the prompts' has the rest. None: both in one step, on every SM. 0: two
            lanes without partitions.
        chunk: tokens of a step of both; None, of two lanes.
    """

    decode_sms: int | None = None
    chunk: int | None = None

    @property
    def is_split(self) -> bool:
        return self.decode_sms is not None

    @property
    def size(self) -> int:
        """What sets it apart from others of its kind."""
        return (self.decode_sms if self.is_split else self.chunk) or 0


class Prediction(NamedTuple):
    """Attributes:
    step_s: between two tokens of a sequence. prompt_rate: tokens of prompts a second.
    """

    step_s: float
    prompt_rate: float


class Mean:
    """An exponential moving mean that follows its first values faster."""

    def __init__(self, start: float | None = None) -> None:
        self.value = start
        self._count = 0

    def add(self, value: float) -> None:
        """Take one more value in."""
        weight = max(WEIGHT, FIRST_WEIGHT / (1 + self._count))
        self._count += 1
        self.value = value if self.value is None else (1 - weight) * self.value + weight * value


class Found(NamedTuple):
    """Attributes:
    step, rate: measured over predicted. at: when it last ran.
    """

    step: Mean
    rate: Mean
    at: float


class StepCosts:
    """See the module. Times are seconds on one clock of the caller's.

    Args:
        num_sms: of the device. tokens_per_weights: tokens whose KV is as large as all weights.
    """

    def __init__(self, num_sms: int, tokens_per_weights: float) -> None:
        self._num_sms = num_sms
        self._tokens_per_weights = tokens_per_weights
        self._empty_s = Mean()  # a plain decode step without any KV
        self._rate = Mean()
        self._found: dict[Arrangement, Found] = {}

    def plain_s(self, kv_tokens: int) -> float | None:
        """Duration of a decode step that has every SM to itself; None: none was seen yet."""
        empty_s = self._empty_s.value
        return None if empty_s is None else empty_s * self._size(kv_tokens)

    def _size(self, kv_tokens: int) -> float:
        return 1 + kv_tokens / self._tokens_per_weights

    def predict(self, arrangement: Arrangement, kv_tokens: int, now: float) -> Prediction | None:
        """None: no plain step and no prompt was seen yet."""
        guess = self._guess(arrangement, kv_tokens)
        known = arrangement if arrangement in self._found else self._nearest(arrangement)
        if guess is None or known is None:
            return guess
        found = self._found[known]
        share = 0.5 ** ((now - found.at) / FORGET_S) * (1.0 if known == arrangement else OF_NEIGHBOUR)
        step, rate = (_soften(mean.value or 1.0, share) for mean in (found.step, found.rate))
        return Prediction(guess.step_s * step, guess.prompt_rate * rate)

    def _nearest(self, arrangement: Arrangement) -> Arrangement | None:
        """One of the same kind that has run."""
        alike = [known for known in self._found if known.is_split == arrangement.is_split and known.size]
        size = arrangement.size
        return min(alike, key=lambda known: abs(math.log(known.size / size)), default=None) if size else None

    def _guess(self, arrangement: Arrangement, kv_tokens: int) -> Prediction | None:
        plain_s, rate = self.plain_s(kv_tokens), self._rate.value
        if plain_s is None or rate is None:
            return None
        if not arrangement.is_split:
            assert arrangement.chunk is not None
            step_s = math.hypot(plain_s, arrangement.chunk / rate)  # one reads memory while the other computes
            return Prediction(step_s, arrangement.chunk / step_s)
        if not arrangement.decode_sms:
            return Prediction(plain_s * 2, rate / 2)
        share = arrangement.decode_sms / self._num_sms
        return Prediction(plain_s * _interpolate(SLOWDOWNS, share), rate * _interpolate(LEFT_TO_PROMPTS, share))

    def note_plain(self, kv_tokens: int, seconds: float) -> None:
        """A step of decodes alone, on every SM, took so long."""
        expected = self.plain_s(kv_tokens)
        seconds = seconds if expected is None else min(seconds, OUTLIER * expected)
        self._empty_s.add(seconds / self._size(kv_tokens))

    def note_prompts(self, num_tokens: int, seconds: float) -> None:
        """A step of prompts, with few decodes or none, on every SM, took so long."""
        if num_tokens >= LONG_PROMPT:
            rate = num_tokens / seconds
            known = self._rate.value
            self._rate.add(rate if known is None else max(rate, known / OUTLIER))

    def note_step(self, arrangement: Arrangement, kv_tokens: int, seconds: float, now: float) -> None:
        """A step that decodes took so long, and prompts were computed in it or beside it all the time."""
        if (guess := self._guess(arrangement, kv_tokens)) is not None:
            self._find(arrangement, now).step.add(min(seconds / guess.step_s, OUTLIER))

    def note_rate(self, arrangement: Arrangement, kv_tokens: int, rate: float, now: float) -> None:
        """So many tokens of prompts a second were computed, and sequences decoded all the time."""
        guess = self._guess(arrangement, kv_tokens)
        if guess is not None and guess.prompt_rate:
            self._find(arrangement, now).rate.add(min(max(rate / guess.prompt_rate, 1 / OUTLIER), OUTLIER))

    def _find(self, arrangement: Arrangement, now: float) -> Found:
        found = self._found.get(arrangement, Found(Mean(1.0), Mean(1.0), now))
        self._found[arrangement] = found._replace(at=now)
        return found


def _soften(ratio: float, share: float) -> float:
    """The ratio, drawn towards 1 as ``share`` falls from 1 to 0."""
    return math.exp(math.log(ratio) * share)


def _interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Between the two nearest points; the first or last value beyond them."""
    before = points[0]
    for point in points:
        if x <= point[0]:
            width = point[0] - before[0]
            part = (x - before[0]) / width if width else 1.0
            return before[1] + (point[1] - before[1]) * part
        before = point
    return before[1]
