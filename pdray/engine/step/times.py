"""Durations of the last steps and the host's share of them: the engine's jitter."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

NUM_STEPS = 512


class Spread(NamedTuple):
    """Median, 99th percentile and maximum, in milliseconds."""

    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        p50, p99, largest = np.percentile(seconds, (50, 99, 100)) * 1000
        return cls(round(float(p50), 3), round(float(p99), 3), round(float(largest), 3))


class StepSpread(NamedTuple):
    """Statistics over the last NUM_STEPS steps that followed another without a pause.

    Attributes:
        step: from one step's tokens to the next one's.
        host: the part in which the host did not wait for the device: booking, messages, planning, launching, and
            whatever kept it from running. Where it stays below the device's time for a step, it costs nothing.
    """

    step: Spread
    host: Spread


class StepTimes:
    """Callers hold the engine's lock."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=NUM_STEPS)
        self._last_end: float | None = None

    def since(self, planned_at: float, ended: float) -> float:
        """Seconds of a step that is not added yet: since the end of the one before, or since it was planned."""
        return ended - max(planned_at, -math.inf if self._last_end is None else self._last_end)

    def add(self, wait_began: float, ended: float) -> None:
        """A step's tokens were waited for, and came. Both of time.perf_counter()."""
        if self._last_end is not None:
            self._steps.append((ended - self._last_end, wait_began - self._last_end))
        self._last_end = ended

    def pause(self) -> None:
        """Note a pause: the next step does not follow the last one."""
        self._last_end = None

    def spread(self) -> StepSpread | None:
        """The statistics; None while no step has followed another."""
        if not self._steps:
            return None
        steps, hosts = zip(*self._steps, strict=True)
        return StepSpread(Spread.of(list(steps)), Spread.of(list(hosts)))
