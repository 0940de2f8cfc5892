"""The controller against a simulated GPU, whose costs are those that an H100 showed; no clock but the simulation's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.engine.mux.controller import CHUNKS, HOLD_S, Controller, Load, Targets
from pdray.engine.mux.costs import FORGET_S, Arrangement, StepCosts

# Qwen3-8B, 32 sequences of 1,024 tokens beside prompts of 4,096: ms of a step, and prompt tokens a second.
PLAIN_MS = 8.3
ALONE_RATE = 36000.0
MIXED_MS = {128: 10.6, 256: 11.9, 384: 14.3, 512: 17.6, 768: 23.3, 1024: 29.9, 2048: 55.0, 4096: 107.0, 8192: 212.0}
SPLITS = {16: (24.5, 25400.0), 32: (13.2, 24500.0), 48: (11.7, 17000.0), 64: (11.0, 14400.0)}
KV_TOKENS = 32 * 1024
ENDLESS = Load(KV_TOKENS, 100_000, 0.0)


class SimulatedGpu:
    """Runs one step after the other as the controller says, and tells it what each took.

    Args:
        size: of the decodes' work, relative to the measured one. noise: of durations, as a share.
    """

    def __init__(
        self, targets: Targets, *, splits: tuple[int, ...] = tuple(SPLITS), may_mix: bool = True, noise: float = 0.03
    ) -> None:
        self.costs = StepCosts(132, 110_000)
        self.controller = Controller(self.costs, targets, may_mix=may_mix, most_tokens=8192)
        self.controller.splits = list(splits)
        self.now = 0.0
        self.slowdown: Callable[[Arrangement], float] = lambda arrangement: 1.0
        self.noise = noise
        self._rng = np.random.default_rng(0)
        self.steps: list[tuple[Arrangement, float]] = []
        self.changes: list[float] = []
        self.num_tokens = 0.0
        for _ in range(5):  # a server's first moments: prompts alone, then decodes alone
            self.costs.note_prompts(4096, 4096 / ALONE_RATE)
        for _ in range(5):
            self.costs.note_plain(KV_TOKENS, PLAIN_MS / 1000)

    def true_cost(self, arrangement: Arrangement) -> tuple[float, float]:
        """Seconds of a step, and tokens of prompts a second."""
        if arrangement.is_split:
            ms, rate = SPLITS[arrangement.decode_sms or 0]
            return ms / 1000 * self.slowdown(arrangement), rate
        assert arrangement.chunk is not None
        seconds = MIXED_MS[arrangement.chunk] / 1000 * self.slowdown(arrangement)
        return seconds, (arrangement.chunk - 32) / seconds

    def run(self, seconds: float, load: Load = ENDLESS) -> None:
        until = self.now + seconds
        while self.now < until:
            before = self.controller.num_changes
            arrangement = self.controller.choose(self.now, load)
            if self.controller.num_changes > before:
                self.changes.append(self.now)
            step_s, rate = self.true_cost(arrangement)
            step_s *= 1 + self.noise * float(self._rng.standard_normal())
            self.now += step_s
            self.num_tokens += rate * step_s
            self.steps.append((arrangement, step_s))
            self.costs.note_step(arrangement, KV_TOKENS, step_s, self.now)
            self.costs.note_rate(arrangement, KV_TOKENS, rate, self.now)

    def last(self, number: int = 100) -> list[tuple[Arrangement, float]]:
        return self.steps[-number:]

    def settled(self) -> Arrangement:
        return Counter(arrangement for arrangement, _ in self.last()).most_common(1)[0][0]


def best_rate(limit_ms: float, *, splits: bool) -> float:
    """Of all arrangements whose steps are short enough."""
    fitting = [(chunk - 32) / ms * 1000 for chunk, ms in MIXED_MS.items() if ms <= limit_ms]
    fitting += [rate for ms, rate in SPLITS.values() if ms <= limit_ms and splits]
    return max(fitting)


@pytest.mark.parametrize("limit_ms", [13, 14, 16, 20, 30, 60])
@pytest.mark.parametrize("splits", [True, False])
def test_it_finds_what_computes_most_prompts_within_the_target(limit_ms: float, splits: bool) -> None:
    gpu = SimulatedGpu(Targets(limit_ms / 1000), splits=tuple(SPLITS) if splits else ())
    gpu.run(10)
    steps, rate = [seconds for _, seconds in gpu.last()], gpu.true_cost(gpu.settled())[1]
    assert np.mean(steps) * 1000 <= limit_ms
    assert rate >= best_rate(limit_ms * 0.94, splits=splits) * 0.9
    assert splits or not gpu.settled().is_split


def test_two_lanes_are_chosen_only_where_they_promise_more() -> None:
    tight, loose = (SimulatedGpu(Targets(limit_ms / 1000)) for limit_ms in (14.2, 30))
    tight.run(10)
    loose.run(10)
    assert tight.settled() == Arrangement(decode_sms=32)
    assert not loose.settled().is_split


def test_a_target_that_nothing_holds_gets_the_shortest_steps() -> None:
    gpu = SimulatedGpu(Targets(0.005))
    gpu.run(10)
    assert np.mean([seconds for _, seconds in gpu.last()]) <= 0.0115


def test_without_a_target_steps_take_at_most_twice_a_plain_one() -> None:
    gpu = SimulatedGpu(Targets())
    gpu.run(10)
    assert np.mean([seconds for _, seconds in gpu.last()]) * 1000 <= 2 * PLAIN_MS
    assert gpu.true_cost(gpu.settled())[1] >= 24000


def test_changes_are_few_and_apart() -> None:
    gpu = SimulatedGpu(Targets(0.014), noise=0.15)
    gpu.run(60)
    assert len(gpu.changes) <= 25
    assert min(np.diff(gpu.changes)) >= HOLD_S / 4
    assert len([at for at in gpu.changes if at > 20]) <= 10


def test_it_goes_away_from_what_has_become_slow_and_comes_back() -> None:
    """As when another process takes memory bandwidth: only what ran is known to be slow."""
    gpu = SimulatedGpu(Targets(0.0147))
    gpu.run(5)
    assert gpu.settled() == Arrangement(decode_sms=32)
    gpu.slowdown = lambda arrangement: 1.5 if arrangement.is_split else 1.0
    gpu.run(5)
    assert not gpu.settled().is_split
    gpu.slowdown = lambda arrangement: 1.0
    gpu.run(4 * FORGET_S)
    assert gpu.settled() == Arrangement(decode_sms=32)


def test_a_ttft_that_is_easily_held_buys_shorter_steps() -> None:
    few, many = (SimulatedGpu(Targets(0.030, 1.0)) for _ in range(2))
    few.run(10, Load(KV_TOKENS, 4_000, 0.0))
    many.run(10, Load(KV_TOKENS, 26_000, 0.0))
    shorter, longer = (np.mean([seconds for _, seconds in gpu.last()]) for gpu in (few, many))
    assert shorter <= 0.0125 < longer <= 0.030
    assert many.true_cost(many.settled())[1] >= 26_000


def test_two_lanes_whenever_both_wait_if_asked_for() -> None:
    gpu = SimulatedGpu(Targets(0.030), splits=(), may_mix=False)
    assert gpu.controller.choose(0.0, ENDLESS) == Arrangement(chunk=8192), "no split is ready"
    gpu.controller.splits = [32, 64]
    gpu.run(5)
    assert gpu.settled() == Arrangement(decode_sms=32)
    assert not any(not arrangement.is_split for arrangement, _ in gpu.steps)


def test_before_anything_was_measured_it_leaves_all_as_it_is() -> None:
    controller = Controller(StepCosts(132, 110_000), Targets(0.01), may_mix=True, most_tokens=1000)
    controller.splits = [32]
    assert [controller.choose(i / 10, ENDLESS) for i in range(50)] == [Arrangement(chunk=1000)] * 50
    assert max(n for n in CHUNKS if n < 1000) == 768


@given(st.lists(st.tuples(st.sampled_from(["step", "rate", "plain", "prompts"]), st.floats(1e-6, 1e3)), max_size=60))
def test_whatever_was_measured_predictions_are_finite_and_a_choice_is_made(noted: list[tuple[str, float]]) -> None:
    costs = StepCosts(132, 1000.0)
    controller = Controller(costs, Targets(0.01, 1.0), may_mix=True, most_tokens=2048)
    controller.splits = [16, 64]
    now = 0.0
    for kind, value in noted:
        now += value
        chosen = controller.choose(now, Load(500, 1000, value))
        if kind == "step":
            costs.note_step(chosen, 500, value, now)
        elif kind == "rate":
            costs.note_rate(chosen, 500, value, now)
        elif kind == "plain":
            costs.note_plain(500, value)
        else:
            costs.note_prompts(2048, value)
        prediction = costs.predict(chosen, 500, now)
        assert prediction is None or (0 < prediction.step_s < 1e9 and 0 < prediction.prompt_rate < 1e12)
    assert chosen in {*(Arrangement(chunk=n) for n in (*CHUNKS, 2048)), *map(Arrangement, (16, 64))} if noted else True
