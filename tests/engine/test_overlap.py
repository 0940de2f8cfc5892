"""Steps planned while the one before them runs: the same tokens as one step at a time, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pdray.engine.request import EngineRequest
from pdray.engine.schedule.sequence import LiveRequest, Sequence
from pdray.engine.step.graphs import StepGraphs
from pdray.testing.every_draw import EVERY_DRAW, requests_of


def requests() -> list[EngineRequest]:
    return requests_of(EVERY_DRAW)


def answers(engine: Any) -> dict[Any, Any]:
    return {key: dict(indices) for key, indices in engine.tokens.items()}


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 18, "max_num_seqs": 8}], ids=["roomy", "preempting"])
def test_every_kind_of_request_gets_the_same_tokens(llama: Any, settings: dict[str, int]) -> None:
    plain = llama.engine(async_scheduling=False, **settings).run(*requests())
    ahead = llama.engine(async_scheduling=True, **settings).run(*requests())
    assert answers(plain).keys() == EVERY_DRAW.keys()
    assert answers(ahead) == answers(plain)
    if settings:
        assert plain.stats().num_preemptions > 0 and ahead.stats().num_preemptions > 0
    for engine in (plain, ahead):
        engine.assert_empty()


def test_padded_steps_give_the_same_tokens(llama: Any) -> None:
    """As for graphs and launched steps on CUDA; here the same code computes them."""
    plain = llama.engine(async_scheduling=False).run(*requests())
    padded = llama.engine(async_scheduling=True)
    padded.lane.graphs = StepGraphs(torch.empty(8, 199), max_num_batched_tokens=64)
    assert answers(padded.run(*requests())) == answers(plain)


def test_disaggregated_engines_that_plan_ahead_give_the_same_tokens(llama: Any, disaggregated: Any) -> None:
    whole = llama.engine(async_scheduling=False).run(*requests())
    pair = disaggregated(llama.engine(async_scheduling=True), llama.engine(async_scheduling=True, max_num_seqs=16))
    decode = pair.run(*requests())
    assert answers(decode) == answers(whole)
    decode.assert_empty()


def live_objects() -> list[Any]:
    return [each for each in gc.get_objects() if type(each) in (LiveRequest, Sequence)]


@pytest.fixture
def before() -> Iterator[list[Any]]:
    """Without the garbage collector; gives what is alive already, of other tests."""
    gc.collect()
    gc.disable()
    yield live_objects()
    gc.enable()


def test_nothing_that_has_ended_waits_for_the_garbage_collector(
    llama: Any, disaggregated: Any, before: list[Any]
) -> None:
    pair = disaggregated(llama.engine(async_scheduling=True), llama.engine(async_scheduling=True, max_num_seqs=16))
    pair.run(*requests())
    whole = llama.engine(async_scheduling=True)
    for request in requests():
        whole.add(request)
    for request in requests()[::2]:  # each time, a step is in flight
        whole.step()
        whole.release(request.key)
    whole.run()
    whole.assert_empty()
    assert len(live_objects()) == len(before)
