"""The order of prompts of which some are late."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pdray.engine.mux.late import LATE_TURN, LateLast
from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class Prompt:
    def __init__(self, number: int, *, late: bool = False, rank: int = 0, overdue: bool = False) -> None:
        self.number, self.late, self.rank, self.overdue = number, late, rank, overdue


def late_last() -> LateLast[Prompt]:
    return LateLast(lambda prompt: prompt.number, lambda prompt: prompt.rank)


def sort(order: LateLast[Prompt], queue: list[Prompt]) -> bool:
    return order.sort(queue, lambda prompt: prompt.late, lambda prompt: prompt.overdue)


def numbers(queue: list[Prompt]) -> list[int]:
    return [prompt.number for prompt in queue]


def test_prompts_in_time_go_before_late_ones_and_ranks_before_both() -> None:
    queue = [Prompt(0, late=True), Prompt(1), Prompt(2, late=True, rank=-1), Prompt(3), Prompt(4, rank=1)]
    assert not sort(late_last(), queue)
    assert numbers(queue) == [2, 1, 3, 0, 4]


def test_without_late_prompts_and_with_nothing_else_they_go_in_order() -> None:
    for late in (False, True):
        queue = [Prompt(number, late=late) for number in (3, 1, 2)]
        assert not sort(late_last(), queue)
        assert numbers(queue) == [1, 2, 3]


def test_one_that_has_waited_for_too_long_goes_first() -> None:
    queue = [Prompt(0, late=True, overdue=True), Prompt(1), Prompt(2, late=True, overdue=True)]
    assert sort(late_last(), queue) and numbers(queue) == [0, 1, 2]
    queue.append(Prompt(3, rank=-1))
    assert not sort(late_last(), queue) and numbers(queue) == [3, 0, 1, 2]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_every_few_prompts_one_is_the_first_of_the_late_ones(late: list[bool]) -> None:
    order, begun = late_last(), []
    queue = [Prompt(number, late=each) for number, each in enumerate(late)]
    while queue:
        has_turn = sort(order, queue)
        has_late = any(prompt.late for prompt in queue)
        begun.append((queue.pop(0), has_late))
        assert not has_turn or begun[-1][0].late
    for start in range(len(begun) - LATE_TURN + 1):
        window = begun[start : start + LATE_TURN]
        assert any(prompt.late for prompt, _ in window) or not all(has_late for _, has_late in window)
    for is_late in (False, True):
        group = [prompt.number for prompt, _ in begun if prompt.late is is_late]
        assert group == sorted(group)


def test_an_engine_computes_late_prompts_last(llama: Any) -> None:
    """As where a queue was long: those that came in time get their first token before them."""
    mux = llama.mux(max_num_seqs=2, max_num_batched_tokens=16, async_scheduling=False, target_ttft_ms=60_000)
    mux.add(EngineRequest("stream", [5, 6, 7], GREEDY))
    mux.step()
    for name in ("late", "later", "new"):
        mux.add(EngineRequest(name, [8, 9, 10, 11], GREEDY))
    for name in ("late", "later"):
        mux._scheduler.requests[name].queued_at -= 60.0
    mux.run()
    assert [key for key in mux.tokens if key != "stream"] == ["new", "late", "later"]


def test_late_prompts_that_are_aborted_take_no_turn(llama: Any) -> None:
    """As where clients give up on what is late: one that stays gets its first token after a few in time."""
    mux = llama.mux(max_num_seqs=2, max_num_batched_tokens=16, async_scheduling=False, target_ttft_ms=60_000)
    mux.add(EngineRequest("stream", [5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)))
    mux.step()
    for name in ("late", *range(3 * LATE_TURN)):
        mux.add(EngineRequest(name, [8, 9, 10, 11], SamplingParams(temperature=0, max_tokens=1)))
    mux._scheduler.requests["late"].queued_at -= 60.0
    kept = []  # so that no other object is where an aborted one was
    while "late" not in mux.tokens:
        mux.add(EngineRequest("given up", [8, 9, 10, 11], GREEDY))
        kept.append(mux._scheduler.requests["given up"])
        kept[-1].queued_at -= 60.0
        kept += kept[-1].sequences
        mux.step()
        mux.release("given up")
    assert len(mux.tokens) <= 2 + LATE_TURN
