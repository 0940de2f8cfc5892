"""A step that fails: whose it was, what it costs, and what goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import pytest

from pdray.engine.request import EngineRequest, RequestUpdate
from pdray.engine.schedule.sequence import ALONE_STEPS, Sequence
from pdray.engine.step.draws import Draws
from pdray.engine.step.inputs import InputBuffers
from pdray.errors import RequestFailedError, StepFailedError
from pdray.sampling_params import SamplingParams

Condition = Callable[[Sequence], bool]


def request(key: Hashable, n: int = 1, max_tokens: int = 10, **fields: Any) -> EngineRequest:
    params = SamplingParams(n=n, temperature=1.0, seed=3, max_tokens=max_tokens, ignore_eos=True)
    prompt = [4 + (31 * hash(key) + i) % 190 for i in range(20)]
    return EngineRequest(key, prompt, params, tuple(range(n)), **fields)


def poisoned(engine: Any, condition: Condition, error: BaseException) -> list[set[Hashable]]:
    """Makes steps raise that compute a sequence of this kind; returns the keys of every step in flight, by launch."""
    launches: list[set[Hashable]] = []
    launch = engine.lane.launch

    def failing(*arguments: Any) -> Draws:
        plans = list(engine._scheduler.plans_in_flight)
        launches.append({key for plan in plans for key in plan.keys})
        if any(condition(chunk.sequence) for chunk in plans[-1].chunks):
            raise error
        result: Draws = launch(*arguments)
        return result

    engine.lane.launch = failing
    return launches


def is_poison(position: int) -> Condition:
    return lambda sequence: sequence.request.key == "poison" and sequence.num_tokens >= 20 + position


def run(engine: Any) -> dict[Hashable, RequestUpdate]:
    """To the end; updates that tell of a failure."""
    failed = {}
    while engine.has_work():
        failed |= {update.key: update for update in engine.step() if update.failure is not None}
    return failed


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_failing_step_costs_its_requests_and_leaves_the_engine_as_it_was(
    llama: Any, async_scheduling: bool, n: int, position: int
) -> None:
    """Those of the step end with the reason and each other's names; who came later, and a retry, finish as ever."""
    engine = llama.engine(async_scheduling=async_scheduling, max_num_seqs=16)
    alone = llama.engine().run(*(request(key) for key in "abc"))
    poisoned(engine, is_poison(position), IndexError("index -1 is out of bounds"))
    for each in (request("a"), request("b"), request("poison", n)):
        engine.add(each)
    failed = run(engine)
    assert failed.keys() == {"a", "b", "poison"}
    for update in failed.values():
        assert update.failure == "IndexError: index -1 is out of bounds" and update.finished
        assert set(update.suspects) == failed.keys()
    told = {key: engine.ids(key) for key in "ab"}
    engine.assert_empty()
    for key in "ab":
        engine.add(EngineRequest(key, request(key).prompt_token_ids, request(key).params, output_token_ids=told[key]))
    engine.add(request("c"))
    assert run(engine) == {}
    assert {key: engine.ids(key) for key in "abc"} == {key: alone.ids(key) for key in "abc"}
    engine.assert_empty()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_alone_the_next_failure_is_one_requests(llama: Any, async_scheduling: bool) -> None:
    """Three suspects beside two innocent ones: only the poisonous one fails, at the same place, and by itself."""
    engine = llama.engine(async_scheduling=async_scheduling)
    expected = llama.engine().run(*(request(key, max_tokens=40) for key in "abcd"))
    launches = poisoned(engine, is_poison(2), ValueError("unknown"))
    for key in "ab":
        engine.add(request(key, max_tokens=40))
    for key in ("c", "poison", "d"):
        engine.add(request(key, max_tokens=40, alone=True))
    failed = run(engine)
    assert failed.keys() == {"poison"} and failed["poison"].suspects == ("poison",)
    for key in ("c", "d"):
        shared = [keys for keys in launches if key in keys]
        assert all(keys == {key} for keys in shared[:ALONE_STEPS]) and any(len(keys) > 1 for keys in shared)
    assert {key: engine.ids(key) for key in "abcd"} == {key: expected.ids(key) for key in "abcd"}
    engine.assert_empty()


def test_a_prompt_under_suspicion_is_computed_alone(llama: Any) -> None:
    """As on a prefill worker; the layers of a step that failed were told at most once."""
    engine = llama.engine(max_num_batched_tokens=16)
    layers = defaultdict(list)
    engine.on_layer_group = lambda ready: layers[ready.key].append((ready.layers, ready.first_block))
    launches = poisoned(engine, is_poison(0), ValueError("unknown"))
    for key in ("a", "poison", "b"):
        engine.add(request(key, prefill_only=True, alone=key != "a"))
    failed = run(engine)
    assert failed.keys() == {"poison"} and failed["poison"].suspects == ("poison",)
    assert all(len(keys) == 1 for keys in launches)
    assert layers.keys() == {"a", "b"} and all(len(set(told)) == len(told) for told in layers.values())
    for key in "ab":
        engine.release(key)
    engine.assert_empty()


class DeviceLostError(BaseException):
    """Stands for what no engine can survive."""


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_failure_that_ends_the_engine_names_the_requests_of_the_steps_in_flight(
    llama: Any, async_scheduling: bool
) -> None:
    engine = llama.engine(async_scheduling=async_scheduling, max_num_seqs=2)
    poisoned(engine, is_poison(3), DeviceLostError("gone"))
    for key in ("a", "poison", "waiting"):
        engine.add(request(key))
    with pytest.raises(StepFailedError, match="DeviceLostError: gone") as raised:
        run(engine)
    assert set(raised.value.keys) == {"a", "poison"} == set(engine.suspects())
    assert isinstance(raised.value.__cause__, DeviceLostError)


def test_a_failure_of_a_launched_step_is_never_survived(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its draws cannot be read: what it has computed is unknown, on any device."""
    engine = llama.engine()
    for key in ("a", "b"):
        engine.add(request(key))

    def fail(_: Draws) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Draws, "read", fail)
    with pytest.raises(StepFailedError, match="illegal memory access") as raised:
        engine.step()
    assert set(raised.value.keys) == {"a", "b"}


@pytest.mark.parametrize("alone", [False, True])
def test_a_scheduler_that_fails_names_those_it_looked_at(
    llama: Any, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    engine = llama.engine()
    for key in ("a", "b"):
        engine.add(request(key))
    engine.step()
    engine.add(request("poison", alone=alone))
    admit = engine._scheduler._admit

    def failing(sequence: Sequence) -> bool:
        if sequence.request.key == "poison":
            raise ZeroDivisionError("by zero")
        return bool(admit(sequence))

    monkeypatch.setattr(engine._scheduler, "_admit", failing)
    with pytest.raises(StepFailedError, match="by zero") as raised:
        run(engine)
    assert set(raised.value.keys) == ({"poison"} if alone else {"a", "b", "poison"})


class OnCuda:
    """Says that it is a GPU, to whoever asks for the type only."""

    type = "cuda"


@pytest.mark.parametrize(
    ("error", "survives"), [(OverflowError("int too large"), True), (RuntimeError("CUDA error"), False)]
)
def test_on_a_gpu_python_errors_before_the_launch_are_survived(
    llama: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, survives: bool
) -> None:
    """What torch raises there may be the last launch's."""
    engine = llama.engine()
    fill = InputBuffers.fill

    def failing(self: InputBuffers, plan: Any, *arguments: Any) -> Any:
        if "poison" in plan.keys:
            raise error
        return fill(self, plan, *arguments)

    monkeypatch.setattr(InputBuffers, "fill", failing)
    engine.add(request("poison"))
    engine.device = OnCuda()
    if survives:
        assert run(engine).keys() == {"poison"}
        engine.assert_empty()
    else:
        with pytest.raises(StepFailedError, match="CUDA error"):
            engine.step()


@pytest.mark.parametrize("door", ["add", "reserve"])
def test_a_request_that_cannot_be_looked_at_is_refused_alone(llama: Any, door: str) -> None:
    """A fault of the code, not of the client: no InvalidRequestError. The engine goes on."""
    engine = llama.engine()
    engine.add(request("a"))
    wrong = EngineRequest("r", [5, None, 7], SamplingParams(max_tokens=4, temperature=0))  # type: ignore[list-item]
    with pytest.raises(RequestFailedError, match="could not be prepared: TypeError"):
        getattr(engine, door)(wrong)
    assert run(engine) == {} and len(engine.ids("a")) == 10
    engine.assert_empty()
