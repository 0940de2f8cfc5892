"""Durations of decode steps, one way beside another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch


class Timing(NamedTuple):
    """Seconds of one step. spread_s: between the quartiles of its repetitions."""

    median_s: float
    spread_s: float


def time_in_turn(
    launches: Mapping[str, Callable[[], object]], device: torch.device, *, repetitions: int = 7
) -> dict[str, Timing]:
    """Each launch ``repetitions`` times, after one that is not counted.

    They take turns, so that what changes on the device meanwhile, as its clock, changes for all.
    """
    durations: dict[str, list[float]] = {name: [] for name in launches}
    for launch in launches.values():
        launch()
    for _ in range(repetitions):
        for name, launch in launches.items():
            durations[name].append(_time(launch, device))
    return {name: _timing(values) for name, values in durations.items()}


def _time(launch: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        launch()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    launch()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def _timing(durations: list[float]) -> Timing:
    low, median, high = np.percentile(durations, (25, 50, 75))
    return Timing(float(median), float(high - low))
