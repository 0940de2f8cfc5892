"""Tokens for whole answers: in few messages, none lost, and nothing else kept waiting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.actors import told_late
from pdray.actors.told_late import TOLD_AFTER_S, TOLD_STEPS, TOLD_TOKENS, ToldLate
from pdray.engine.request import RequestUpdate
from pdray.outputs import SampledToken

WHOLE, STREAMED = "whole", "streamed"


def update(key: str, position: int, **news: object) -> RequestUpdate:
    tokens = [SampledToken(0, position, 100 + position)]
    return RequestUpdate(key, tokens, whole=key.startswith(WHOLE), **news)  # type: ignore[arg-type]


def positions(updates: list[RequestUpdate]) -> list[int]:
    return [token.position for each in updates for token in each.tokens]


def test_tokens_of_many_steps_are_told_at_once() -> None:
    told = ToldLate()
    assert positions(told.take([update(WHOLE, 0, prefill=0.1)]) or []) == [0]
    assert positions(told.take([update(WHOLE, 1, first_decode_step=0.1)]) or []) == [1]
    taken = [told.take([update(WHOLE, position)]) for position in range(2, 2 + TOLD_STEPS)]
    assert taken[:-1] == [None] * (TOLD_STEPS - 1)
    (joined,) = taken[-1] or []
    assert positions([joined]) == list(range(2, 2 + TOLD_STEPS))
    assert told.take([update(WHOLE, 2 + TOLD_STEPS)]) is None  # counted anew


def test_a_large_batch_is_told_more_often() -> None:
    """Its last message is booked when the device has nothing left to do."""
    told, number = ToldLate(), TOLD_TOKENS // 4
    keys = [f"{WHOLE}-{i}" for i in range(number)]
    taken = [told.take([update(key, position) for key in keys]) for position in range(2, 10)]
    assert [joined and len(joined) for joined in taken] == [None, None, None, number] * 2
    assert sorted(positions(taken[3] or [])) == sorted([2, 3, 4, 5] * number)


def test_all_completions_of_a_request_count() -> None:
    told = ToldLate()
    tokens = [SampledToken(index, 2, 100) for index in range(TOLD_TOKENS)]
    assert told.take([RequestUpdate(WHOLE, tokens, whole=True)]) is not None


def test_what_cannot_wait_takes_the_rest_along() -> None:
    for urgent in (
        update(STREAMED, 7),
        update(WHOLE, 7, finished=True),
        update(WHOLE + "2", 0, prefill=0.1, prefill_queue=0.1),
        update(WHOLE + "2", 5, join_wait=0.1, first_decode_step=0.1),
        update(WHOLE + "2", 3, num_cached_tokens=0),  # of a replayed leg
        RequestUpdate(WHOLE + "2", failure="lost", suspects=(WHOLE + "2",)),
    ):
        told = ToldLate()
        assert told.take([update(WHOLE, 5), update(WHOLE + "3", 9)]) is None
        assert told.take([update(WHOLE, 6)]) is None
        news = told.take([urgent]) or []
        expected = {WHOLE: [5, 6], WHOLE + "3": [9]}
        expected[str(urgent.key)] = expected.get(str(urgent.key), []) + [token.position for token in urgent.tokens[-1:]]
        assert {str(each.key): positions([each]) for each in news} == expected
        assert urgent in news
        assert told.take([]) == []  # nothing is told twice; a step without news is told


def test_nothing_waits_for_longer_than_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 0.0, TOLD_AFTER_S))
    monkeypatch.setattr(told_late, "time", SimpleNamespace(monotonic=lambda: next(times)))
    told = ToldLate()
    assert told.take([update(WHOLE, 5)]) is None
    assert positions(told.take([update(WHOLE, 6)]) or []) == [5, 6]


@given(st.lists(st.lists(st.sampled_from([WHOLE, WHOLE + "2", STREAMED]), unique=True), max_size=60))
def test_every_token_is_told_once_and_in_order(steps: list[list[str]]) -> None:
    told, sent = ToldLate(), dict[str, list[int]]()
    drawn: dict[str, int] = {}
    for keys in steps:
        updates = []
        for key in keys:
            drawn[key] = drawn.get(key, -1) + 1
            updates.append(update(key, drawn[key]))
        for each in told.take(updates) or []:
            sent.setdefault(str(each.key), []).extend(positions([each]))
    for each in told.take([update(key, num + 1, finished=True) for key, num in drawn.items()]) or []:
        sent.setdefault(str(each.key), []).extend(positions([each]))
    assert sent == {key: list(range(num + 2)) for key, num in drawn.items()}
