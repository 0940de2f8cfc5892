"""Who waits for credit is told once, as soon as there is enough, and never before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdray.control.credit import CreditWaiters, covers
from pdray.wire.lease_messages import Credit, CreditUpdate, CreditWanted

events = st.one_of(
    st.tuples(st.just("renew"), st.sampled_from("abc"), st.none() | st.tuples(st.integers(0, 9), st.integers(0, 3))),
    st.tuples(st.just("credit"), st.integers(0, 9), st.integers(0, 3)),
    st.tuples(st.just("gone"), st.sampled_from("abc"), st.none()),
)


@given(st.lists(events, max_size=40))
def test_no_wait_is_forgotten_and_none_ends_early(happening: list[tuple[object, object, object]]) -> None:
    waiters, credit = CreditWaiters(), Credit(0, 0, 0, 0, 0)
    waiting: dict[str, tuple[int, int]] = {}
    for kind, first, second in happening:
        if kind == "renew":
            name, wanted = str(first), second
            answer = waiters.renewed(name, None if wanted is None else CreditWanted(*wanted), credit)  # type: ignore[misc]
            assert (answer.to, answer.message) == (name, CreditUpdate(credit))
            waiting.pop(name, None)
            if wanted is not None and not covers(credit, *wanted):  # type: ignore[misc]
                waiting[name] = wanted  # type: ignore[assignment]
        elif kind == "gone":
            waiters.router_gone(str(first))
            waiting.pop(str(first), None)
        else:
            credit = Credit(first, second, 0, 0, 0)  # type: ignore[arg-type]
            told = {send.to for send in waiters.announce(credit)}
            assert told == {name for name, wanted in waiting.items() if covers(credit, *wanted)}
            waiting = {name: wanted for name, wanted in waiting.items() if name not in told}
        assert bool(waiters) == bool(waiting)
