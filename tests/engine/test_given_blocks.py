"""Two schedulers over one device: one owns the blocks, the other computes prompts in those that it is given."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import pytest
from fake_engine import BLOCK_SIZE, FakeEngine, assert_outputs, make
from hypothesis import event, given
from hypothesis import strategies as st

from pdray.engine.kv.given_blocks import GivenBlocks
from pdray.engine.request import EngineRequest, Reservation
from pdray.errors import RequestFailedError
from pdray.sampling_params import SamplingParams


class TwoEngines:
    """A lender and its guest, and what workers do between them. Leases are asked for, computed, given up, handed over.

    Attributes:
        filling: requests that the guest computes. stopping: that it was told to stop, and whose steps may be in flight.
    """

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int) -> None:
        self.lender = FakeEngine(num_blocks, max_num_seqs, budget)
        self.guest = FakeEngine(num_blocks, max_num_seqs, budget, caching=False, allocator=GivenBlocks)
        self.guest.slots = self.lender.slots
        self.filling: dict[Hashable, EngineRequest] = {}
        self.stopping: set[Hashable] = set()
        self.handed_over: dict[Hashable, EngineRequest] = {}

    def begin(self, request: EngineRequest) -> bool:
        """Lease, and compute in its blocks."""
        if self.lender.reserve(request) is None:
            return False
        given = self.lender.scheduler.lend(request.key)
        assert given == self.lender.scheduler.lend(request.key), "asked again, the answer is the same"
        self.guest.add(replace(request, prefill_only=True, given=given))
        self.filling[request.key] = request
        return True

    def give_up(self, key: Hashable) -> None:
        del self.filling[key]
        self.guest.scheduler.release(key)
        self.stopping.add(key)
        self.settle()

    def settle(self) -> None:
        """What the guest writes no more returns to the lender; what it has computed is decoded there."""
        in_flight = {key for plan in self.guest.scheduler.plans_in_flight for key in plan.keys}
        for key in self.stopping - in_flight:
            self.stopping.remove(key)
            self.lender.scheduler.release(key)
        for key in [key for key in self.filling if key in self.guest.finished]:
            assert key not in in_flight
            self.guest.scheduler.release(key)
            request = self.handed_over[key] = self.filling.pop(key)
            first = [self.guest.outputs[key][index][0] for index in request.indices]
            for token in first:
                self.lender.outputs[key][token.index].append(token)
            self.lender.scheduler.start_decode(key, first, self.lender.now)
        self.assert_apart()

    def assert_apart(self) -> None:
        """Blocks that a step of the guest's writes are one lease's of the lender, of nobody else, and not cached."""
        writers: dict[int, Hashable] = {}
        for plan in self.guest.scheduler.plans_in_flight:
            for chunk in plan.chunks:
                key = chunk.sequence.request.key
                blocks = chunk.sequence.block_table[chunk.start // BLOCK_SIZE : -(-chunk.end // BLOCK_SIZE)]
                live = self.lender.scheduler.requests[key]
                for block in blocks:
                    assert writers.setdefault(block, key) == key
                    assert block in live.lead.block_table
                    assert self.lender.scheduler.pool._hashes[block] is None
        for engine in (self.lender, self.guest):
            engine.assert_clean()

    def advance(self, engine: FakeEngine) -> None:
        engine.overlap_step()
        self.settle()

    def finish(self) -> None:
        for _ in range(2000):
            self.advance(self.guest)
            self.advance(self.lender)
            in_flight = self.guest.scheduler.plans_in_flight or self.lender.scheduler.plans_in_flight
            if not (self.filling or self.stopping or self.lender.scheduler.requests or in_flight):
                return
        raise AssertionError("the two do not come to an end")


@st.composite
def requests(draw_: st.DrawFn, key: int) -> EngineRequest:
    """Prompts of two families, so that many begin as others do, and some are cached as a whole."""
    n = draw_(st.integers(1, 2))
    length = draw_(st.sampled_from([1, 3, 4, 8, 11, 16]))
    outputs = draw_(st.integers(0, 3)) if n == 1 else 0
    params = SamplingParams(n=n, max_tokens=draw_(st.sampled_from([4, 8, 12])), ignore_eos=draw_(st.booleans()))
    prompt = [draw_(st.integers(0, 1)), *(7 + i for i in range(length - 1))]
    return EngineRequest(key, prompt, params, tuple(range(n)), tuple(range(outputs)), alone=draw_(st.booleans()))


@given(st.data())
def test_random_traffic_of_two_engines_in_one_pool(data: st.DataObject) -> None:
    """Nobody computes over a wrong KV, nothing leaks, and everyone gets the tokens of running alone."""
    max_num_seqs = data.draw(st.integers(2, 5), "max_num_seqs")
    two = TwoEngines(
        data.draw(st.integers(14, 30), "num_blocks"), max_num_seqs, data.draw(st.integers(5, 16), "budget")
    )
    for key in range(data.draw(st.integers(1, 14), "requests")):
        two.begin(data.draw(requests(key)))
        for _ in range(data.draw(st.integers(0, 5))):
            if two.filling and data.draw(st.integers(0, 4)) == 0:
                two.give_up(data.draw(st.sampled_from(sorted(two.filling, key=str))))
            two.advance(data.draw(st.sampled_from([two.lender, two.guest])))
    event(f"given up in a step: {bool(two.stopping)}")
    event(f"preemptions: {min(3, two.lender.scheduler.counters.num_preemptions)}")
    two.finish()
    for request in two.handed_over.values():
        assert_outputs(two.lender, request)
    two.lender.assert_empty()
    two.guest.assert_empty()


def test_what_is_given_up_in_a_step_stays_where_it_is_until_that_is_over() -> None:
    two = TwoEngines(16, 4, 8)
    assert two.begin(make("r", 12))
    plan = two.guest.begin()
    two.give_up("r")
    assert two.stopping == {"r"} and two.lender.scheduler.pool.num_free < 15 and two.guest.scheduler.pool.num_free == 12
    two.guest.end(plan, two.guest.compute(plan))
    two.settle()
    two.lender.assert_empty()
    two.guest.assert_empty()


WRONG = {
    "they are 2, and 12 tokens need 3": Reservation([1, 2], 0),
    "13 of 12 tokens are said to be cached": Reservation([1, 2, 3], 13),
    "12 of 12 tokens are said to be cached": Reservation([1, 2, 3], 12),
    "they are 0 to 2, of a pool of 16": Reservation([0, 1, 2], 0),
    "they are 1 to 16, of a pool of 16": Reservation([1, 2, 16], 0),
    "one is named twice": Reservation([1, 2, 2], 0),
    "7 is request 'other''s to write": Reservation([1, 2, 7], 0),
    "7 is request 'other''s": Reservation([7, 1, 2], 4),
    "5 is read by another request": Reservation([1, 2, 5], 0),
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_grant_that_cannot_be_right_is_refused(problem: str) -> None:
    """Before anything is written, and nothing is left of it."""
    guest = FakeEngine(16, caching=False, allocator=GivenBlocks)
    other = replace(make("other", 16, prefill_only=True), given=Reservation([5, 6, 7, 8], 8))
    guest.add(other)
    guest.begin()
    with pytest.raises(RequestFailedError, match=f"cannot be right: {problem}"):
        guest.add(replace(make("r", 12, prefill_only=True), given=WRONG[problem]))
    assert set(guest.scheduler.requests) == {"other"}
    guest.assert_clean()
    good = replace(make("r", 12, prefill_only=True), given=Reservation([5, 1, 2], 4))
    guest.add(good)  # what is cached, others may read too


@pytest.mark.parametrize("fields", [{}, {"prefill_only": True}])
def test_who_brings_no_blocks_is_refused(fields: dict[str, bool]) -> None:
    guest = FakeEngine(16, caching=False, allocator=GivenBlocks)
    with pytest.raises(RequestFailedError, match="brings no blocks"):
        guest.add(make("r", 12, **fields))
