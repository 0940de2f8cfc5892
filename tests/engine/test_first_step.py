"""The first step behind KV that comes from elsewhere: prepared while that is under way, used only where it fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdray.engine.loop import EngineLoop
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.plan import StepPlan
from pdray.engine.step.inputs import StepInputs
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
REPORTED = SamplingParams(temperature=1.1, top_p=0.9, seed=7, max_tokens=6, ignore_eos=True, logprobs=2)
FIRST = [SampledToken(0, 0, 77)]


def make(key: str, length: int = 21, params: SamplingParams = GREEDY, indices: tuple[int, ...] = (0,)) -> EngineRequest:
    return EngineRequest(key, [4 + (7 * len(key) + 3 * n) % 190 for n in range(length)], params, indices)


def decode_engine(llama: Any, **settings: Any) -> Any:
    """Whatever its blocks hold stands for KV that has come."""
    engine = llama.engine(**settings)
    engine.pool.tensor.normal_(generator=torch.Generator().manual_seed(3))
    return engine


def count_fills(engine: Any) -> list[StepPlan]:
    """Plans whose inputs are filled from now on, prepared ones included."""
    plans: list[StepPlan] = []
    fill = engine.lane._decode_buffers.fill

    def counted(plan: StepPlan, padded: Any = None) -> StepInputs:
        plans.append(plan)
        filled: StepInputs = fill(plan, padded)
        return filled

    engine.lane._decode_buffers.fill = counted
    return plans


def finish(engine: Any) -> dict[Any, Any]:
    while engine.has_work():
        engine.step()
    engine.assert_empty()
    return {key: dict(indices) for key, indices in engine.tokens.items()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("params", [GREEDY, REPORTED])
def test_a_prepared_step_draws_what_it_would_draw_anyway(llama: Any, params: SamplingParams, overlap: bool) -> None:
    answers = []
    for is_expected in (False, True):
        engine = decode_engine(llama, async_scheduling=overlap)
        for key in ("a", "bb"):  # the second finds what the first has left
            engine.reserve(make(key, params=params))
            if is_expected:
                engine.expect(key)
                assert engine.prepare_more() is False
            fills = count_fills(engine)
            engine.start_decode(key, FIRST)
            engine.step()
            assert (not fills) is is_expected, "its inputs were there"
            answers.append(finish(engine))
    assert len(answers[0]["a"][0]) == 5
    assert answers[:2] == answers[2:]


def another_starts_first(engine: Any) -> None:
    engine.start_decode("bb", FIRST)
    engine.step()


def a_prompt_comes_first(engine: Any) -> None:
    engine.add(make("ccc"))
    engine.step()


def it_is_released(engine: Any) -> None:
    engine.release("a")
    engine.reserve(make("a", 30))


def its_blocks_change(engine: Any) -> None:
    engine._scheduler.requests["a"].lead.num_computed_tokens = 32  # as if all of it had been cached
    engine.lend("a")


@pytest.mark.parametrize("between", [another_starts_first, a_prompt_comes_first, it_is_released, its_blocks_change])
def test_what_happens_in_between_makes_a_prepared_step_void(llama: Any, between: Callable[[Any], None]) -> None:
    answers = []
    for is_expected in (False, True):
        engine = decode_engine(llama)
        engine.reserve(make("a", 32))
        engine.reserve(make("bb"))
        if is_expected:
            engine.expect("a")
            engine.expect("bb")
            engine.prepare_more()
            assert engine.lane.ahead.sequence.request.key == "a", "the first of two that are expected"
        between(engine)
        engine.start_decode("a", FIRST)
        engine.step()
        if between is not another_starts_first:
            engine.start_decode("bb", FIRST)
        answers.append(finish(engine))
        assert engine.lane.ahead.sequence is None
    assert len(answers[0]["a"][0]) == len(answers[0]["bb"][0]) == 5
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "request_",
    [
        make("a", indices=(0, 1), params=SamplingParams(n=2, temperature=0.0, max_tokens=6)),
        make("a", params=SamplingParams(temperature=0.0, max_tokens=6, repetition_penalty=1.3)),
        make("a", params=SamplingParams(temperature=0.0, max_tokens=6, min_tokens=3)),
        EngineRequest("a", [5, 6, 7], GREEDY, alone=True),
    ],
    ids=["completions", "penalty", "min_tokens", "alone"],
)
def test_what_depends_on_earlier_tokens_is_not_prepared(llama: Any, request_: EngineRequest) -> None:
    engine = decode_engine(llama)
    engine.reserve(request_)
    engine.expect("a")
    engine.prepare_more()
    assert engine.lane.ahead.sequence is None


def test_what_cannot_be_prepared_fails_with_its_step_and_alone(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decode_engine(llama)
    engine.reserve(make("a"))
    engine.reserve(make("bb"))
    fill = engine.lane._decode_buffers.fill

    def failing(plan: StepPlan, padded: Any = None) -> StepInputs:
        if "a" in plan.keys:
            raise ValueError("its inputs")
        filled: StepInputs = fill(plan, padded)
        return filled

    engine.lane._decode_buffers.fill = failing
    engine.expect("a")
    assert engine.prepare_more() is False
    engine.start_decode("a", FIRST)
    (update,) = engine.step()
    assert update.failure is not None and "its inputs" in update.failure
    engine.start_decode("bb", FIRST)
    assert len(finish(engine)["bb"][0]) == 5


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_engine_that_sleeps_prepares_what_it_expects_and_starts_together_what_comes_together(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdray.engine.step.first_step.NEAR_S", PATIENCE_S)
    engine, steps = decode_engine(llama), list[list[Any]]()
    engine.first_steps.stays_awake = True
    engine.lane.on_logits = lambda logits: steps.append(engine._scheduler.plans_in_flight[-1].keys)
    given: list[int] = []
    give_token = engine.lane.give_token
    engine.lane.give_token = lambda token_id: (given.append(token_id), give_token(token_id))
    loop = EngineLoop(engine, lambda updates: None)
    loop.start()
    try:
        for key in ("a", "bb"):
            engine.reserve(make(key))
        engine.expect("a")
        wait_until(lambda: engine.lane.ahead.sequence is not None)
        wait_until(lambda: len(given) > 1)  # it does not sleep while the step is near
        engine.on_work = None
        for key in ("a", "bb"):
            engine.start_decode(key, FIRST)
            time.sleep(0.01)  # many looks of an engine that would not wait to be woken
        assert not steps
        loop.wake()
        wait_until(lambda: not engine.has_work())
    finally:
        loop.stop()
    assert sorted(steps[0]) == ["a", "bb"]


def test_graphs_are_captured_once_no_first_step_is_near(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdray.engine.step.first_step.NEAR_S", PATIENCE_S)
    engine, num_captured = decode_engine(llama), 0

    def capture() -> bool:
        nonlocal num_captured
        num_captured += 1
        return num_captured % 3 > 0

    engine.pipeline = SimpleNamespace(prepare_more=capture)
    loop = EngineLoop(engine, lambda updates: None)
    engine.reserve(make("a"))
    engine.expect("a")
    loop.start()
    try:
        wait_until(lambda: engine.lane.ahead.sequence is not None)
        loop.wake()
        assert num_captured == 0
        engine.start_decode("a", FIRST)
        wait_until(lambda: not engine.has_work())
        assert num_captured == 0, "more may come"
        engine.first_steps._near_until = time.perf_counter() + 0.01
        loop.wake()
        wait_until(lambda: num_captured == 3)
    finally:
        loop.stop()


def test_a_step_that_does_not_come_is_not_waited_for_for_ever(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdray.engine.step.first_step.NEAR_S", 0.0)
    engine = decode_engine(llama)
    engine.first_steps.stays_awake = True
    engine.reserve(make("a"))
    engine.expect("a")
    engine.prepare_more()
    assert engine.lane.ahead.sequence is not None and engine.first_steps.keep_warm() is False
    monkeypatch.setattr("pdray.engine.step.first_step.NEAR_S", PATIENCE_S)
    engine.expect("a")  # more of it has come
    assert engine.first_steps.keep_warm() is True
    engine.release("a")
    assert engine.first_steps.keep_warm() is False


def test_what_has_come_is_cached_once_its_first_step_is_launched(llama: Any) -> None:
    engine = decode_engine(llama)
    engine.reserve(make("a", 40))
    engine.start_decode("a", FIRST)
    assert engine._scheduler.pool.num_cached == 0
    engine.step()
    assert engine._scheduler.pool.num_cached == 2
    engine.release("a")
    finish(engine)
    assert engine.reserve(make("a", 40)).num_cached_tokens == 32
