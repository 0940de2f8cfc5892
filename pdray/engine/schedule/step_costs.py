"""Learned durations of steps: of one that only decodes, and what prompts add to it.

A decode step's duration is known by its number of sequences, in classes of powers of two; a prompt's share of a step as
seconds for a token, by the number of tokens, in classes half as wide; each with a quantile of its last measurements.
Steps that something else has held up do no harm as long as they are fewer than the others, nor do those that follow
them, which seem too short.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

NUM_SAMPLES = 9
NUM_SURE = 5  # samples of which three may be too long, and one too short
NUM_TRIED = 3  # samples of prompts after which a class speaks for itself
QUANTILE = 1 / 3  # of the sorted samples: more are too long than too short
MAX_AGE = 512  # steps; what is older may be of another load


class StepWork(NamedTuple):
    """What a step computes.

    Attributes:
        num_decodes: sequences with one token.
        num_prompt_tokens: of all others.
        context: tokens before each of those, on average.
    """

    num_decodes: int
    num_prompt_tokens: int
    context: float = 0.0


class Samples:
    """The last measurements of one class, with the number of the step that gave each."""

    __slots__ = ("_samples", "typical")

    def __init__(self) -> None:
        self._samples: deque[tuple[int, float]] = deque(maxlen=NUM_SAMPLES)
        self.typical = 0.0

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def last_step(self) -> int:
        return self._samples[-1][0]

    def add(self, step: int, value: float) -> None:
        while self._samples and step - self._samples[0][0] > MAX_AGE:
            self._samples.popleft()
        self._samples.append((step, value))
        values = sorted(value for _, value in self._samples)
        self.typical = values[int((len(values) - 1) * (QUANTILE if len(values) >= NUM_SURE else 0.5))]


class StepCosts:
    """Durations by what is computed. Not thread-safe.

    Args:
        half_context: tokens of context whose attention costs as much as everything else that is done for a token.

    Attributes:
        num_steps: that were noted.
    """

    def __init__(self, half_context: float) -> None:
        self.half_context = half_context
        self.num_steps = 0
        self._plain: dict[int, Samples] = {}
        self._per_token: dict[int, Samples] = {}

    def note(self, work: StepWork, seconds: float) -> None:
        """A step took so long."""
        self.num_steps += 1
        if not work.num_prompt_tokens:
            self._plain.setdefault(size_class(work.num_decodes), Samples()).add(self.num_steps, seconds)
            return
        plain = self.plain(max(1, work.num_decodes)) or 0.0
        tokens = self.weigh(work.num_prompt_tokens, work.context)
        samples = self._per_token.setdefault(half_class(tokens), Samples())
        samples.add(self.num_steps, max(0.0, seconds - plain) / tokens)
        for key in [key for key, each in self._per_token.items() if self.num_steps - each.last_step > MAX_AGE]:
            del self._per_token[key]

    def weigh(self, num_tokens: int, context: float) -> float:
        """Tokens without context that cost as much as these."""
        return num_tokens * (1 + context / self.half_context)

    def plain(self, num_decodes: int) -> float | None:
        """Seconds of a step that decodes so many sequences; None while nothing is known."""
        samples = nearest(self._plain, size_class(num_decodes), 1)
        return None if samples is None else samples.typical

    def plain_age(self, num_decodes: int) -> int | None:
        """Steps since such a step was last measured; None while that was not often enough to be sure."""
        samples = self._plain.get(size_class(num_decodes))
        return None if samples is None or len(samples) < NUM_SURE else self.num_steps - samples.last_step

    def added(self, num_tokens: int, context: float) -> float | None:
        """Seconds that so many tokens of prompts add to a step; None while nothing is known."""
        tokens = self.weigh(num_tokens, context)
        key = half_class(tokens)
        own, tried = self._per_token.get(key), nearest(self._per_token, key, NUM_TRIED)
        if own is not None and len(own) >= NUM_TRIED:
            return own.typical * tokens
        known = [each.typical for each in (own, tried or nearest(self._per_token, key, 1)) if each is not None]
        return min(known) * tokens if known else None

    def largest_prompt(self) -> float:
        """Tokens up to which prompts' shares of steps have been measured, in weighed tokens."""
        return class_limit(max(self._per_token)) if self._per_token else 0.0


def size_class(number: int) -> int:
    """Numbers up to 1, 2, 4, 8, … are in classes 0, 1, 2, 3, …"""
    return max(0, number - 1).bit_length()


def half_class(number: float) -> int:
    """Numbers up to 1, 1.5, 2, 3, 4, 6, 8, 12, … are in classes -1, 0, 1, 2, 3, …"""
    exponent = size_class(math.ceil(number))
    return 2 * exponent - (number <= class_limit(2 * exponent - 1))


def class_limit(key: int) -> float:
    """The largest number of a half_class()."""
    return 2.0 ** (key / 2) if key % 2 == 0 else 0.75 * 2.0 ** ((key + 1) / 2)


def nearest(classes: dict[int, Samples], key: int, num_samples: int) -> Samples | None:
    """Of the classes with that many samples, the one next to ``key``, and the smaller of two."""
    known = [each for each, samples in classes.items() if len(samples) >= num_samples]
    return classes[min(known, key=lambda each: (abs(each - key), each))] if known else None
