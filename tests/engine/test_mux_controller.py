"""The controller against a simulated GPU, whose costs are those that an H100 showed; no clock but the simulation's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.engine.mux.controller import HOLD_S, Controller
from pdray.engine.mux.costs import FORGET_S, MIXED, Arrangement, SplitCosts
from pdray.engine.mux.load import Load, Stream, Wait
from pdray.engine.mux.pace import OVERDUE, TPOT_MARGIN, PacedBudget, Targets
from pdray.engine.schedule.step_costs import StepWork
from pdray.engine.schedule.token_budget import LEAST_STRETCH, STEP_SIZES

# Qwen3-8B, 32 sequences of 1,024 tokens beside prompts of 4,096: ms of a step, and prompt tokens a second.
NUM_DECODES = 32
PLAIN_MS = 8.3
MIXED_MS = {128: 10.6, 256: 11.9, 384: 14.3, 512: 17.6, 768: 23.3, 1024: 29.9, 1536: 42.0, 2048: 55.0, 4096: 107.0}
MIXED_MS[8192] = 212.0
SMALL = (128, 256, 384, 512, 768)
SPLITS = {16: (24.5, 25400.0), 32: (13.2, 24500.0), 48: (11.7, 17000.0), 64: (11.0, 14400.0)}
HALF_CONTEXT = 12_000.0
ENDLESS = Load(NUM_DECODES, [Wait(4096, 0.0, 4096)] * 2, 0)


class SimulatedGpu:
    """Runs one step after the other as the controller says, and tells it what each took.

    Args:
        noise: of durations, as a share. hides: a few tokens of prompts cost little in a step of decodes.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        splits: tuple[int, ...] = tuple(SPLITS),
        may_mix: bool = True,
        noise: float = 0.03,
        hides: bool = True,
    ) -> None:
        self.mixed_ms = MIXED_MS if hides else MIXED_MS | {n: PLAIN_MS + (n - NUM_DECODES) * 0.0228 for n in SMALL}
        self.budget = PacedBudget(8192, STEP_SIZES, half_context=HALF_CONTEXT)
        self.costs = SplitCosts(self.budget.costs, 132)
        self.controller = Controller(self.costs, self.budget, targets, may_mix=may_mix)
        self.controller.splits = list(splits)
        self.now = 0.0
        self.slowdown: Callable[[Arrangement], float] = lambda arrangement: 1.0
        self.noise = noise
        self._rng = np.random.default_rng(0)
        self.steps: list[tuple[Arrangement, float, float]] = []
        self.changes: list[float] = []
        for _ in range(5):  # a server's first moments: prompts alone, then decodes alone, then both
            self.budget.costs.note(StepWork(0, 4096), 4096 / 38_800)
        for _ in range(5):
            self.budget.costs.note(StepWork(NUM_DECODES, 0), PLAIN_MS / 1000)
        for size in STEP_SIZES:
            for _ in range(3):
                self.budget.costs.note(StepWork(NUM_DECODES, size - NUM_DECODES), self.mixed_ms[size] / 1000)

    def run(self, seconds: float, queued: Load | None = None) -> None:
        """The same prompts all the time, which grow older; default: prompts without end, each as young as the last."""
        began, until = self.now, self.now + seconds
        while self.now < until:
            newest = [step_s for _, step_s, _ in self.steps[-64:]]
            load = ENDLESS._replace(streams=[Stream(sum(newest), len(newest), 192)])
            if queued is not None:
                since = self.now - began
                load = load._replace(
                    prompts=[wait._replace(waited_s=wait.waited_s + since) for wait in queued.prompts],
                    context=queued.context,
                )
            before = self.controller.num_changes
            arrangement = self.controller.choose(self.now, load)
            assert arrangement is not None
            if self.controller.num_changes > before:
                self.changes.append(self.now)
            slowdown = self.slowdown(arrangement) * (1 + self.noise * float(self._rng.standard_normal()))
            if arrangement.decode_sms is None:
                tokens = arrangement.chunk or self.budget.tokens(load.num_decodes, load.num_queued, load.context)
                num_prompt_tokens = tokens - NUM_DECODES
                step_s = (self.mixed_ms[tokens] if num_prompt_tokens else PLAIN_MS) / 1000 * slowdown
                rate = num_prompt_tokens / step_s
                self.budget.costs.note(StepWork(NUM_DECODES, num_prompt_tokens), step_s)
            else:
                ms, rate = SPLITS[arrangement.decode_sms]
                step_s = ms / 1000 * slowdown
                self.costs.note_step(arrangement.decode_sms, NUM_DECODES, step_s, self.now)
                self.costs.note_rate(arrangement.decode_sms, load.context, rate, self.now)
            self.now += step_s
            self.steps.append((arrangement, step_s, rate))

    def last(self, number: int = 100) -> list[tuple[Arrangement, float, float]]:
        return self.steps[-number:]

    def mean_ms(self) -> float:
        return float(np.mean([step_s for _, step_s, _ in self.last()])) * 1000

    def mean_rate(self) -> float:
        seconds = sum(step_s for _, step_s, _ in self.last())
        return sum(step_s * rate for _, step_s, rate in self.last()) / seconds

    def settled(self) -> Arrangement:
        return Counter(arrangement for arrangement, _, _ in self.last()).most_common(1)[0][0]


def waiting(*waited_s: float, num_tokens: int = 2048) -> Load:
    return Load(NUM_DECODES, [Wait(num_tokens, each, num_tokens) for each in waited_s], 0)


@pytest.mark.parametrize("limit_ms", [13, 14.5, 16, 20, 32, 60])
@pytest.mark.parametrize("splits", [True, False])
def test_without_a_ttft_it_finds_what_computes_most_prompts_within_the_target(limit_ms: float, splits: bool) -> None:
    gpu = SimulatedGpu(Targets(limit_ms / 1000), splits=tuple(SPLITS) if splits else ())
    gpu.run(10)
    fitting = [(size - NUM_DECODES) / ms * 1000 for size, ms in MIXED_MS.items() if ms <= 0.94 * limit_ms]
    assert gpu.mean_ms() <= limit_ms
    assert gpu.mean_rate() >= max(fitting) * 0.9
    assert splits or not gpu.settled().is_split


def test_two_lanes_are_chosen_only_where_they_promise_more() -> None:
    tight, loose = (SimulatedGpu(Targets(limit_ms / 1000), hides=False) for limit_ms in (14.2, 32))
    tight.run(10)
    loose.run(10)
    hidden = SimulatedGpu(Targets(0.0142))
    hidden.run(10)
    assert tight.settled().is_split
    assert loose.settled() == hidden.settled() == MIXED


def test_a_target_that_nothing_holds_gets_short_steps() -> None:
    gpu = SimulatedGpu(Targets(0.005))
    gpu.run(10)
    assert gpu.mean_ms() <= PLAIN_MS * LEAST_STRETCH * 1.05


def test_changes_are_few_and_apart() -> None:
    gpu = SimulatedGpu(Targets(0.0142), noise=0.15, hides=False)
    gpu.run(60)
    assert 1 <= len(gpu.changes) <= 25
    assert min(np.diff(gpu.changes), default=1.0) >= HOLD_S / 4
    assert len([at for at in gpu.changes if at > 20]) <= 10


def test_it_goes_away_from_what_has_become_slow_and_comes_back() -> None:
    """As when another process takes memory bandwidth: only what ran is known to be slow."""
    gpu = SimulatedGpu(Targets(0.0142), noise=0.01, hides=False)
    gpu.run(5)
    assert gpu.settled() == Arrangement(decode_sms=32)
    gpu.slowdown = lambda arrangement: 1.5 if arrangement.is_split else 1.0
    gpu.run(5)
    assert gpu.settled() == MIXED
    gpu.slowdown = lambda arrangement: 1.0
    gpu.run(6 * FORGET_S)
    assert gpu.settled() == Arrangement(decode_sms=32)


def test_late_prompts_leave_a_split_whose_tokens_have_become_dear() -> None:
    """As with more streams, although it computes more prompts than mixed steps within the target."""
    gpu = SimulatedGpu(Targets(0.015, 1.0), noise=0.01, hides=False)
    gpu.run(5, waiting(*([2.0] * 8)))
    assert gpu.settled().is_split
    gpu.slowdown = lambda arrangement: 2.0 if arrangement.is_split else 1.0
    gpu.run(5, waiting(*([2.0] * 8)))
    assert gpu.settled() == MIXED and gpu.mean_ms() <= 15


def test_prompts_that_have_time_are_computed_in_the_steps_that_delay_streams_least() -> None:
    """224 tokens for 3.6 ms are cheaper than 96 for 2.3 or 352 for 6, and a split delays streams by 15 us for each."""
    gpu = SimulatedGpu(Targets(0.030, 1.0), splits=())
    gpu.run(0.5, waiting(0.01))
    assert gpu.mean_ms() == pytest.approx(MIXED_MS[256], rel=0.05)


def test_prompts_that_have_less_time_are_computed_faster_and_late_ones_are_not() -> None:
    few, many, late = (SimulatedGpu(Targets(0.060, 1.0), splits=()) for _ in range(3))
    few.run(0.5, waiting(0.01))
    many.run(0.5, waiting(*([0.01] * 8)))  # 16,384 tokens in 0.8 s
    late.run(0.5, waiting(*([2.0] * 8)))
    assert few.mean_rate() < 16_384 / 0.8 <= many.mean_rate() * 1.05
    assert late.mean_rate() == pytest.approx(few.mean_rate(), rel=0.05)


def test_while_streams_are_too_slow_prompts_that_have_time_wait() -> None:
    gpu = SimulatedGpu(Targets(0.0095, 2.0), splits=())
    gpu.run(1.0, waiting(0.01))
    assert 0.1 < np.mean([rate > 0 for _, _, rate in gpu.last(80)]) < 0.9
    assert gpu.mean_ms() <= 9.5


SLOW = Stream(0.9, 90, 166)  # 10.0 ms so far for 9.5; the rest in plain steps of 8.3 makes up for it


@pytest.mark.parametrize(
    ("streams", "waits"),
    [
        ([], False),
        ([SLOW], True),
        ([Stream(0.8, 90, 166)], False),  # can pay for a prompt
        ([SLOW, Stream(0.64, 80, 176)], True),  # although they are within the target on average
        ([Stream(1.8, 90, 166)], False),  # lost, whatever comes
        ([Stream(1.8, 90, 166), SLOW], True),
        ([Stream(0.9, 90, 2)], False),  # lost, too: has no time left to make up for it
        ([Stream(0.0, 0, 255)], False),  # a prompt may always begin beside one that has just begun
    ],
)
def test_prompts_wait_for_streams_that_they_would_cost_their_tpot(streams: list[Stream], waits: bool) -> None:
    gpu = SimulatedGpu(Targets(0.0095, 2.0), splits=())
    gpu.controller.choose(0.0, waiting(0.01)._replace(streams=streams))
    assert gpu.budget.holds == waits
    assert (gpu.budget.tokens(NUM_DECODES, 2048, 0) == NUM_DECODES) == waits


@pytest.mark.parametrize(("num_prompts", "waits"), [(1, True), (2, False), (6, False)])
def test_where_not_all_can_be_in_time_the_fewest_are_lost(num_prompts: int, waits: bool) -> None:
    """A stream, or prompts that are in time only if they begin now; a stream counts for two of them."""
    gpu = SimulatedGpu(Targets(0.0095, 2.0), splits=())
    load = waiting(*([1.3] * num_prompts), num_tokens=1024)
    gpu.controller.choose(0.0, load._replace(streams=[SLOW]))
    assert gpu.budget.holds == waits


def test_a_late_prompt_waits_for_streams_until_it_has_its_turn() -> None:
    gpu = SimulatedGpu(Targets(0.0095, 2.0), splits=())
    load = waiting(3.0)._replace(streams=[SLOW])
    for may_wait in (True, False):
        gpu.controller.choose(0.0, load, may_wait=may_wait)
        assert gpu.budget.holds == may_wait
    begun = load._replace(num_begun=1)
    gpu.controller.choose(0.0, begun)
    assert gpu.budget.pace is not None and not gpu.budget.pace.is_late


def test_a_preempted_stream_does_not_wait_for_others() -> None:
    """Its reader waits for the next token, as theirs do."""
    gpu = SimulatedGpu(Targets(0.0095, 2.0), splits=())
    for is_stream in (False, True):
        preempted = Wait(2048, 3.0, 2048, is_stream)
        gpu.controller.choose(0.0, waiting(3.0)._replace(prompts=[preempted], streams=[SLOW]))
        assert gpu.budget.holds is not is_stream


def test_a_split_that_seems_faster_than_a_plain_step_delays_nothing() -> None:
    gpu = SimulatedGpu(Targets(0.030, 1.0))
    for _ in range(50):
        gpu.costs.note_step(32, NUM_DECODES, PLAIN_MS / 2000, 0.0)
    prediction = gpu.costs.predict(32, NUM_DECODES, 0, 0.0)
    assert prediction is not None and prediction.step_s < prediction.plain_s and prediction.delay == 0.0


@pytest.mark.parametrize("num_begun", [0, 1])
def test_no_prompt_waits_for_streams_for_ever(num_begun: int) -> None:
    """As it would where they are endless, and gain next to nothing in each plain step."""
    gpu = SimulatedGpu(Targets(PLAIN_MS / 1000 / TPOT_MARGIN + 1e-6, 1.0), splits=())
    for waited_s in (0.8 * OVERDUE, 1.2 * OVERDUE):
        ahead = Stream(1000 * PLAIN_MS / 1000 - 0.01, 1000, 256)
        gpu.controller.choose(0.0, waiting(waited_s)._replace(streams=[ahead], num_begun=num_begun))
        assert gpu.budget.holds == (waited_s < OVERDUE)


def test_late_prompts_do_not_slow_streams_beyond_their_target() -> None:
    """Their first tokens are late whatever happens; the streams need not be."""
    gpu = SimulatedGpu(Targets(0.0125, 1.0), splits=())
    gpu.run(4.0, waiting(*([2.0] * 8)))
    assert sum(rate > 0 for _, _, rate in gpu.last()) >= 95, "some measure plain steps"
    assert gpu.mean_ms() <= 12.5


def test_two_lanes_whenever_both_wait_if_asked_for() -> None:
    gpu = SimulatedGpu(Targets(0.030), splits=(), may_mix=False)
    assert gpu.controller.choose(0.0, ENDLESS) == MIXED, "no split is ready"
    gpu.controller.splits = [32, 64]
    gpu.run(5)
    assert gpu.settled() == Arrangement(decode_sms=32)
    assert all(arrangement.is_split for arrangement, _, _ in gpu.steps)


def test_where_two_lanes_are_asked_for_a_ttft_chooses_between_them() -> None:
    """64 SMs delay streams least by what is known then, but leave prompts 14,400 tokens a second."""
    few, many = (SimulatedGpu(Targets(0.015, 1.0), may_mix=False) for _ in range(2))
    few.run(0.75, waiting(0.0))
    many.run(0.75, waiting(*([0.0] * 7)))
    assert all(arrangement.is_split for gpu in (few, many) for arrangement, _, _ in gpu.steps)
    assert [gpu.steps[-1][0].decode_sms for gpu in (few, many)] == [64, 32]


def test_one_side_alone_has_no_arrangement_and_no_pace() -> None:
    gpu = SimulatedGpu(Targets(0.030, 1.0))
    gpu.run(1)
    assert gpu.budget.pace is not None
    assert gpu.controller.choose(gpu.now, None) is None and gpu.budget.pace is None


def test_streams_may_take_the_whole_of_a_step() -> None:
    gpu = SimulatedGpu(Targets(0.0095, 1.0), splits=())
    gpu.budget = PacedBudget(NUM_DECODES, STEP_SIZES)
    gpu.controller = Controller(SplitCosts(gpu.budget.costs, 132), gpu.budget, Targets(0.0095, 1.0), may_mix=True)
    gpu.budget.costs.note(StepWork(1, 31), 0.009)
    for _ in range(5):
        gpu.budget.costs.note(StepWork(NUM_DECODES, 0), 0.0083)
    assert gpu.controller.choose(0.0, waiting(0.0)._replace(streams=[SLOW])) == MIXED
    assert gpu.budget.tokens(NUM_DECODES, 2048, 0) == NUM_DECODES and gpu.budget.predict(NUM_DECODES, 2048, 0) is None


@given(st.lists(st.tuples(st.sampled_from(["step", "rate", "plain", "prompts"]), st.floats(1e-6, 1e3)), max_size=60))
def test_whatever_was_measured_predictions_are_finite_and_a_choice_is_made(noted: list[tuple[str, float]]) -> None:
    budget = PacedBudget(2048, STEP_SIZES)
    costs = SplitCosts(budget.costs, 132)
    controller = Controller(costs, budget, Targets(0.01, 1.0), may_mix=True)
    controller.splits = [16, 64]
    now = 0.0
    for kind, value in noted:
        now += value
        chosen = controller.choose(now, waiting(value)._replace(streams=[Stream(value, round(value), 10)]))
        assert chosen in (MIXED, Arrangement(16), Arrangement(64))
        assert NUM_DECODES <= budget.tokens(NUM_DECODES, 2048, 0) <= 2048
        if kind == "step":
            costs.note_step(16, NUM_DECODES, value, now)
        elif kind == "rate":
            costs.note_rate(16, 0, value, now)
        else:
            budget.costs.note(StepWork(NUM_DECODES, 0 if kind == "plain" else 512), value)
        for prediction in (costs.predict(16, NUM_DECODES, 0, now), budget.predict(NUM_DECODES, 2048, 0)):
            assert prediction is None or (0 < prediction.step_s < 1e9 and 0 < prediction.prompt_rate < 1e12)


def test_what_large_steps_of_prompts_take_is_known_after_many_small_ones() -> None:
    """Which hide their tokens behind the reading of the weights, and would promise too much."""
    gpu = SimulatedGpu(Targets())
    before = gpu.costs.predict(32, NUM_DECODES, 0, 0.0)
    for _ in range(2000):
        gpu.budget.costs.note(StepWork(NUM_DECODES, 224), 0.0119)
    after = gpu.costs.predict(32, NUM_DECODES, 0, 0.0)
    assert before is not None and after is not None and after.prompt_rate == pytest.approx(before.prompt_rate)
    assert SplitCosts(PacedBudget(8192, STEP_SIZES).costs, 132).predict(32, NUM_DECODES, 0, 0.0) is None
