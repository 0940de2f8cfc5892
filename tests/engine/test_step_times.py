"""The engine's account of its steps."""

from __future__ import annotations

import pytest

from pdray.engine.step.times import NUM_STEPS, Spread, StepTimes


def test_steps_that_follow_each_other_count() -> None:
    times = StepTimes()
    assert times.spread() is None
    times.add(10.0, 11.0)
    assert times.spread() is None, "the first follows none"
    times.add(11.25, 11.5)
    times.pause()
    times.add(90.0, 91.0)
    times.add(91.5, 92.5)
    spread = times.spread()
    assert spread is not None
    assert spread.step.p50 == pytest.approx(1000.0)
    assert spread.step.max == pytest.approx(1500.0)
    assert (spread.host.p50, spread.host.max) == pytest.approx((375.0, 500.0))


def test_only_the_last_steps_are_kept() -> None:
    times = StepTimes()
    times.add(0.0, 0.0)
    times.add(999.0, 1000.0)
    for i in range(NUM_STEPS):
        times.add(1000.25 + i, 1001.0 + i)
    spread = times.spread()
    assert spread is not None and spread.step == Spread(1000.0, 1000.0, 1000.0)
    assert spread.host == Spread(250.0, 250.0, 250.0)


def test_a_step_takes_its_time_from_the_one_before_or_from_its_plan() -> None:
    times = StepTimes()
    assert times.since(10.0, 11.5) == 1.5
    times.add(11.0, 11.5)
    assert times.since(11.0, 12.5) == 1.0, "the device was busy with the one before"
    assert times.since(12.0, 12.5) == 0.5, "it was planned late"
    times.pause()
    assert times.since(11.0, 12.5) == 1.5
