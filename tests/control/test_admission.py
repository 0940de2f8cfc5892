"""The admission queue against a sorted list, and the drain rate against arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdray.control.admission import FIRST_GUESS_S, AdmissionQueue, DrainRate, Waiting
from pdray.errors import QueueFullError

MAX_SIZE, MAX_WAIT_S = 5, 10.0


class QueueMachine(RuleBasedStateMachine):
    """Whatever is done, in whatever order: bounded, by priority, first come first served within one."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: AdmissionQueue[int] = AdmissionQueue(MAX_SIZE, MAX_WAIT_S)
        self.now = 0.0
        self.waiting: list[Waiting[int]] = []  # in order
        self.let_out: list[Waiting[int]] = []

    def sort(self) -> None:
        self.waiting.sort(key=lambda entry: (entry.priority, entry.order))

    @rule(priority=st.integers(-1, 1))
    def push(self, priority: int) -> None:
        entry = self.queue.ticket(self.now, priority)
        if len(self.waiting) >= MAX_SIZE:
            with pytest.raises(QueueFullError, match="max_queue_size is 5") as caught:
                self.queue.push(self.now, entry, entry.order)
            assert 1.0 <= caught.value.retry_after_s <= MAX_WAIT_S
            return
        wait = self.queue.expected_wait_s(self.now)
        if wait is not None and wait > MAX_WAIT_S:
            with pytest.raises(QueueFullError, match="max_queue_wait_s"):
                self.queue.push(self.now, entry, entry.order)
        else:
            self.queue.push(self.now, entry, entry.order)
            self.waiting.append(entry)
            self.sort()

    @precondition(lambda self: self.waiting)
    @rule()
    def let_first_out(self) -> None:
        entry = self.waiting.pop(0)
        assert self.queue.peek() == entry.order
        self.queue.remove(entry)
        self.queue.admitted(self.now)
        self.let_out.append(entry)

    @precondition(lambda self: self.let_out)
    @rule(data=st.data())
    def push_back(self, data: st.DataObject) -> None:
        """A denied request stands where it stood before, even in a full queue."""
        entry = self.let_out.pop(data.draw(st.integers(0, len(self.let_out) - 1)))
        self.queue.push_back(entry, entry.order)
        self.waiting.append(entry)
        self.sort()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), twice=st.booleans())
    def remove(self, data: st.DataObject, twice: bool) -> None:
        entry = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        for _ in range(1 + twice):
            self.queue.remove(entry)

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        late = [entry for entry in self.waiting if self.now - entry.since >= MAX_WAIT_S]
        assert sorted(self.queue.expired(self.now)) == sorted(entry.order for entry in late)
        self.waiting = [entry for entry in self.waiting if entry not in late]

    @invariant()
    def agrees(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.peek() == (self.waiting[0].order if self.waiting else None)


TestQueue = QueueMachine.TestCase


def test_a_bound_of_zero_lets_nobody_wait() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue(0, 60.0)
    with pytest.raises(QueueFullError) as caught:
        queue.push(0.0, queue.ticket(0.0, 0), "a")
    assert caught.value.retry_after_s == FIRST_GUESS_S and len(queue) == 0


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_who_could_not_be_served_in_time_is_refused_at_once(rate: float) -> None:
    """After 20 s of congestion with 60 s of patience: as many may wait as the rate seen lets through in that time."""
    queue: AdmissionQueue[int] = AdmissionQueue(1000, 60.0)
    entries = [queue.ticket(0.0, 0) for _ in range(30)]
    for number, entry in enumerate(entries):
        queue.push(0.0, entry, number)  # a burst: nothing is known of the rate yet
    for number in range(int(20 * rate)):
        queue.admitted(number / rate)
        queue.remove(entries[number])
    count = 0
    with pytest.raises(QueueFullError, match="max_queue_wait_s") as caught:
        for count in range(1000):  # noqa: B007
            queue.push(20.0, queue.ticket(20.0, 0), count)
    assert len(queue) == max(30 - int(20 * rate), int(60 * rate) + 1)
    assert 1.0 <= caught.value.retry_after_s <= 60.0


@pytest.mark.parametrize("rate", [0.5, 2.0, 50.0])
def test_a_steady_rate_is_measured(rate: float) -> None:
    meter = DrainRate()
    assert meter.per_second(0.0) is None
    for number in range(int(rate * 120)):
        meter.admitted(number / rate)
    measured = meter.per_second(120.0)
    assert measured is not None and measured == pytest.approx(rate, rel=0.15)


def test_an_old_rate_fades() -> None:
    meter = DrainRate()
    for number in range(100):
        meter.admitted(number / 10)
    rates = [meter.per_second(10.0 + wait) or 0.0 for wait in (0.0, 10.0, 60.0)]
    assert rates[0] > rates[1] > rates[2] and rates[2] < 0.3


def test_retry_after_is_the_time_to_drain() -> None:
    queue: AdmissionQueue[int] = AdmissionQueue(100, 60.0)
    for number in range(400):
        queue.drain_rate.admitted(number / 4)  # 4 a second
    for number in range(39):
        queue.push(100.0, queue.ticket(100.0, 0), number)
    assert queue.retry_after_s(100.0) == pytest.approx(10.0, rel=0.1)


@given(gaps=st.lists(st.floats(0, 1e4), min_size=1, max_size=30), waiting=st.integers(0, 50), later=st.floats(0, 1e6))
def test_retry_after_is_always_sensible(gaps: list[float], waiting: int, later: float) -> None:
    queue: AdmissionQueue[int] = AdmissionQueue(50, 60.0)
    now = 0.0
    for gap in gaps:
        now += gap
        queue.drain_rate.admitted(now)
    for number in range(waiting):
        queue.push(now, queue.ticket(now, 0), number)
    assert 1.0 <= queue.retry_after_s(now + later) <= 60.0


def test_a_full_queue_tells_who_waits_beyond_its_bound() -> None:
    """Who was let out and came back takes no newcomer's place, and is never refused."""
    queue: AdmissionQueue[int] = AdmissionQueue(max_size=2, max_wait_s=60.0)
    for item in range(2):
        queue.push(0.0, queue.ticket(0.0, 0), item)
    with pytest.raises(QueueFullError, match=r"max_queue_size is 2, and 2 requests are waiting; try again"):
        queue.push(0.0, queue.ticket(0.0, 0), 2)
    for item in (3, 4):
        queue.push_back(queue.ticket(0.0, 0), item)
    with pytest.raises(QueueFullError, match=r"is 2, and 4 requests are waiting, 2 of them back from a worker; try"):
        queue.push(0.0, queue.ticket(0.0, 0), 5)


@pytest.mark.parametrize("leaves", [0, 1, 2])
def test_of_several_in_one_place_the_one_that_is_meant_leaves(leaves: int) -> None:
    """The legs that take over a lost one all stand where it stood."""
    queue: AdmissionQueue[int] = AdmissionQueue(max_size=10, max_wait_s=60.0)
    first = queue.ticket(0.0, 0)
    entries = [queue.ticket(0.0, 0, order=first.order) for _ in range(3)]
    for item, entry in enumerate(entries):
        queue.push_back(entry, item)
    queue.remove(entries[leaves])
    stay = [item for item in range(3) if item != leaves]
    assert [queue.peek(position) for position in range(3)] == [*stay, None]
    for item in stay:
        queue.remove(entries[item])
    assert not len(queue)
