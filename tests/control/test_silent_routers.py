"""A router replica is ended only if it was seen, has fallen silent twice in a row, and nothing speaks for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdray.control.silent_routers import SILENT_LIMIT_S, EndRouter, Look, RouterEffect, RouterProcess, SilentRouters

INTERVAL_S = 0.25
SESSION_LIMIT_S = 2.0
PROCESS = RouterProcess("abc", "actor-abc", 10, "node")


def table() -> SilentRouters:
    made = SilentRouters(INTERVAL_S, SESSION_LIMIT_S)
    made.watched(0.0, "router-a", PROCESS)
    return made


def effects(routers: SilentRouters, since: float, until: float) -> list[RouterEffect]:
    """All that is due, of looks at every interval."""
    steps = range(int((until - since) / INTERVAL_S))
    return [effect for step in steps for effect in routers.tick(since + step * INTERVAL_S)]


def one(routers: SilentRouters, since: float, until: float) -> RouterEffect:
    (effect,) = effects(routers, since, until)
    return effect


LOOK_S = SILENT_LIMIT_S + INTERVAL_S  # long enough for one look to be due


def silent_twice(routers: SilentRouters) -> EndRouter:
    """The end that follows."""
    assert routers.silent(one(routers, 0.0, LOOK_S)) is None
    end = routers.silent(one(routers, LOOK_S, 2 * LOOK_S))
    assert end is not None
    return end


def test_a_router_that_watches_is_left_alone() -> None:
    routers = table()
    for second in range(1, 60, 2):
        routers.watched(float(second), "router-a", PROCESS)
        assert effects(routers, float(second), second + 2.0) == []


def test_one_that_is_silent_is_asked_twice_and_then_ended() -> None:
    routers = table()
    assert one(routers, 0.0, LOOK_S) == Look("router-a", PROCESS)
    routers = table()
    end = silent_twice(routers)
    assert end == EndRouter("router-a", PROCESS)
    assert routers.may_end(2 * LOOK_S, end)
    routers.gone(end)
    assert effects(routers, 2 * LOOK_S, 100.0) == []


def test_nothing_follows_before_a_look_is_reported() -> None:
    routers = table()
    look = one(routers, 0.0, 60.0)
    assert routers.silent(look) is None
    assert isinstance(one(routers, 60.0, 60.0 + LOOK_S), Look)


def watches(routers: SilentRouters, _look: RouterEffect, now: float) -> None:
    routers.watched(now, "router-a", PROCESS)


def answers(routers: SilentRouters, look: RouterEffect, now: float) -> None:
    routers.answered(now, look)


def is_unknown(routers: SilentRouters, look: RouterEffect, now: float) -> None:
    routers.unknown(look)


@pytest.mark.parametrize("sign", [watches, answers, is_unknown])
def test_a_sign_of_life_or_ignorance_starts_all_over(sign: Callable[..., None]) -> None:
    routers = table()
    assert routers.silent(one(routers, 0.0, LOOK_S)) is None
    look = one(routers, LOOK_S, 2 * LOOK_S)
    sign(routers, look, 2 * LOOK_S)
    assert routers.silent(look) is None  # too late
    assert routers.silent(one(routers, 2 * LOOK_S, 3 * LOOK_S)) is None


def test_an_end_that_a_watch_overtakes_is_not_carried_out() -> None:
    routers = table()
    end = silent_twice(routers)
    routers.watched(2 * LOOK_S, "router-a", PROCESS)
    assert not routers.may_end(2 * LOOK_S, end)
    routers.end_failed(end)
    assert effects(routers, 2 * LOOK_S, 2 * LOOK_S + SILENT_LIMIT_S) == []


def test_a_session_with_a_worker_is_a_sign_of_life() -> None:
    routers = table()
    end = silent_twice(routers)
    routers.session_seen(2 * LOOK_S - SESSION_LIMIT_S, "router-a")
    assert not routers.may_end(2 * LOOK_S, end)
    again = routers.silent(one(routers, 2 * LOOK_S, 3 * LOOK_S))  # the session has ended since
    assert again is not None and routers.may_end(3 * LOOK_S, again)


def test_what_could_not_be_ended_is_ended_again() -> None:
    routers = table()
    routers.end_failed(silent_twice(routers))
    assert isinstance(routers.silent(one(routers, 2 * LOOK_S, 3 * LOOK_S)), EndRouter)


def test_who_was_never_seen_or_has_left_is_not_suspected() -> None:
    routers = table()
    routers.session_seen(1.0, "router-b")
    routers.left("router-a")
    routers.left("router-b")
    assert effects(routers, 0.0, 100.0) == []


def test_another_process_of_the_name_does_not_answer_for_the_former() -> None:
    routers = table()
    look = one(routers, 0.0, LOOK_S)
    routers.watched(LOOK_S, "router-a", PROCESS._replace(pid=11, actor_id="another"))
    routers.gone(look)
    routers.silent(look)
    later = one(routers, LOOK_S, 2 * LOOK_S)
    assert isinstance(later, Look) and later.process.pid == 11


def test_a_coordinator_that_slept_ends_nobody() -> None:
    routers = table()
    assert effects(routers, 0.0, 1.0) == []
    assert effects(routers, 91.0, 91.0 + SILENT_LIMIT_S) == []
