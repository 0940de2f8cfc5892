"""Silence is measured while its observer is awake."""

from __future__ import annotations

import pytest

from pdray.control.suspicions import Suspicions
from pdray.control.wanted import NOT_LISTED_TIMES, UNWATCHED_LIMIT_S, Wanted

INTERVAL_S = 0.25


def table(limit_s: float = 2.0) -> Suspicions:
    made = Suspicions(INTERVAL_S)
    made.expect(0.0, "decode-0", "a", limit_s, sign="no heartbeat", next="it is killed")
    return made


def first_due(suspicions: Suspicions, since: float, until: float) -> float | None:
    """When somebody is first suspected, of looks at every interval."""
    for step in range(int((until - since) / INTERVAL_S) + 1):
        if suspicions.due(since + step * INTERVAL_S):
            return since + step * INTERVAL_S
    return None


def test_silence_is_noticed_at_its_limit_and_told_again_after_another() -> None:
    suspicions = table()
    assert first_due(suspicions, 0.0, 10.0) == 2.0
    assert first_due(suspicions, 2.25, 10.0) == 4.0


def test_a_sign_of_life_starts_the_limit_anew_and_only_from_the_right_process() -> None:
    suspicions = table()
    assert first_due(suspicions, 0.0, 1.5) is None
    suspicions.heard(1.5, "decode-0", "another")
    suspicions.heard(1.5, "decode-1", "a")
    suspicions.heard(1.5, "decode-0", "a")
    assert first_due(suspicions, 1.75, 10.0) == 3.5
    suspicions.forget("decode-0", "another")
    suspicions.forget("decode-0", "a")
    assert first_due(suspicions, 3.75, 20.0) is None


@pytest.mark.parametrize("silent_before", [0.0, 1.0, 1.75])
@pytest.mark.parametrize("asleep", [1.0, 10.0, 90.0])
def test_who_slept_suspects_nobody_for_it(silent_before: float, asleep: float) -> None:
    """The answer lies ready, and is read a moment after the first look."""
    suspicions = table()
    assert first_due(suspicions, 0.0, silent_before) is None
    woken = silent_before + asleep
    assert first_due(suspicions, woken, woken + 0.5) is None
    suspicions.heard(woken + 0.75, "decode-0", "a")
    assert first_due(suspicions, woken + 0.75, woken + 2.5) is None


def test_who_is_silent_after_the_sleep_is_noticed() -> None:
    suspicions = table()
    assert first_due(suspicions, 0.0, 1.0) is None
    found = first_due(suspicions, 91.0, 200.0)
    assert found is not None and 91.0 + 1.0 <= found <= 91.0 + 2 * 2.0


def test_an_observer_that_always_lags_still_notices() -> None:
    suspicions = table()
    assert any(suspicions.due(float(second)) for second in range(1, 60))


def test_suspicions_grow_before_they_are_acted_on() -> None:
    suspicions = table()
    assert first_due(suspicions, 0.0, 1.25) is None
    (growing,) = suspicions.growing(1.25)
    assert str(growing) == "decode-0: no heartbeat for 1.2 s; it is killed"


def unwatched_until(wanted: Wanted, since: float, until: float, step: float = 1.0) -> tuple[float, str] | None:
    now = since
    while now <= until:
        if reason := wanted.reason_to_end(now):
            return now, reason
        now += step
    return None


def test_what_serve_lists_is_wanted_however_silent_its_routers_are() -> None:
    wanted = Wanted(0.0, 1.0)
    for second in range(0, 2000, 2):
        wanted.serve_answered(float(second), is_listed=True)
        assert wanted.reason_to_end(float(second)) is None


def test_what_serve_lists_no_more_ends_and_one_answer_is_not_enough() -> None:
    wanted = Wanted(0.0, 1.0)
    wanted.serve_answered(1.0, is_listed=False)
    assert wanted.reason_to_end(1.0) is None
    wanted.serve_answered(3.0, is_listed=True)
    for second in range(NOT_LISTED_TIMES):
        assert wanted.reason_to_end(4.0 + second) is None
        wanted.serve_answered(4.0 + second, is_listed=False)
    assert wanted.reason_to_end(10.0) == "the application has left Serve"


def test_without_serves_word_routers_keep_it_and_their_long_silence_ends_it() -> None:
    wanted = Wanted(0.0, 1.0)
    assert unwatched_until(wanted, 0.0, UNWATCHED_LIMIT_S - 1) is None
    wanted.router_seen(UNWATCHED_LIMIT_S - 1)
    found = unwatched_until(wanted, UNWATCHED_LIMIT_S, 3 * UNWATCHED_LIMIT_S)
    assert found is not None and found[0] == 2 * UNWATCHED_LIMIT_S - 1


def test_a_coordinator_that_slept_does_not_end_its_application() -> None:
    wanted = Wanted(0.0, 1.0)
    assert wanted.reason_to_end(1.0) is None
    assert wanted.reason_to_end(2 * UNWATCHED_LIMIT_S) is None
