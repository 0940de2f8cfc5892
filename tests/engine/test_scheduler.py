"""The scheduler on a device that remembers what was written where: no token is ever computed over a wrong KV."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from pdray.engine.kv import block_pool, integrity
from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.kv.integrity import check_in_slices, check_integrity
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.bookkeeping import Bookkeeper
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import Chunk, SampledRow, StepPlan
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.sequence import ALONE_STEPS, LiveRequest
from pdray.engine.schedule.token_budget import AdaptiveBudget, TokenBudget
from pdray.errors import InvalidRequestError
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams

BLOCK_SIZE = 4
VOCAB_SIZE = 97
EOS = 5


def draw(prefix: list[int], index: int) -> int:
    """The fake model: a token that depends on every earlier one."""
    digest = hashlib.sha256(repr((prefix, index)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % VOCAB_SIZE


class FakeEngine:
    """Scheduler and bookkeeper around a device whose KV slots hold the whole prefix that they were computed from."""

    def __init__(
        self,
        num_blocks: int,
        max_num_seqs: int = 4,
        budget: int = 16,
        headroom: int = 4,
        caching: bool = True,
        adaptive: TokenBudget | None = None,
    ):
        self.limits = EngineLimits(BLOCK_SIZE, num_blocks - 1, 64, max_num_seqs, budget, headroom, VOCAB_SIZE, (EOS,))
        self.scheduler = Scheduler(self.limits, BlockPool(num_blocks, caching), adaptive)
        self.bookkeeper = Bookkeeper(self.scheduler)
        self.slots: dict[tuple[int, int], list[int]] = {}
        self.in_flight: list[tuple[StepPlan, list[SampledRow]]] = []
        self.sampled: list[int] = []  # by the last step that was computed
        self.outputs: dict[Hashable, dict[int, list[SampledToken]]] = defaultdict(lambda: defaultdict(list))
        self.finished: set[Hashable] = set()
        self.now = 0.0

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(self.scheduler.prepare(request, reserved=False), self.now)

    def reserve(self, request: EngineRequest):  # noqa: ANN201
        return self.scheduler.reserve(self.scheduler.prepare(request, reserved=True))

    def begin(self) -> StepPlan:
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self.assert_clean()
        assert plan.num_tokens == sum(chunk.num_tokens for chunk in plan.chunks) <= self.limits.max_num_batched_tokens
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks) <= self.limits.max_num_seqs
        assert sum(len(chunk.draws) for chunk in plan.chunks) <= self.limits.max_num_seqs
        self.assert_apart(plan)
        return plan

    def assert_apart(self, plan: StepPlan) -> None:
        """Steps of a request that is to be alone hold nothing else, and overlap with nothing else."""
        in_flight = self.scheduler.plans_in_flight
        assert len({id(other.alone) for other in in_flight}) <= 1
        if plan.alone is not None:
            assert plan.keys in ([plan.alone.key], [])
            assert {key for other in in_flight for key in other.keys} <= {plan.alone.key}
        assert all(c.sequence.request is plan.alone or not c.sequence.request.num_alone_steps for c in plan.chunks)

    def fail(self, plan: StepPlan) -> None:
        """As the engine gives up a plan that could not be launched."""
        for key in plan.keys:
            self.scheduler.release(key)
        self.scheduler.discard(plan)
        self.assert_clean()

    def compute(self, plan: StepPlan) -> list[SampledRow]:
        for copy in plan.copies:
            for offset in range(BLOCK_SIZE):
                self.slots[copy.destination, offset] = self.slots.get((copy.source, offset), [])
        inputs = [self.tokens(chunk) for chunk in plan.chunks]
        for chunk, tokens in zip(plan.chunks, inputs, strict=True):
            for position in range(chunk.start, chunk.end):
                block = chunk.sequence.block_table[position // BLOCK_SIZE]
                self.slots[block, position % BLOCK_SIZE] = tokens[: position + 1]
        rows = []
        for chunk, tokens in zip(plan.chunks, inputs, strict=True):
            for position in range(chunk.end):
                block = chunk.sequence.block_table[position // BLOCK_SIZE]
                assert self.slots[block, position % BLOCK_SIZE] == tokens[: position + 1], "attention over a wrong KV"
            rows += [SampledRow(draw(tokens, each.sequence.index)) for each in chunk.draws]
        self.sampled = [row.token_id for row in rows]
        return rows

    def tokens(self, chunk: Chunk) -> list[int]:
        """What the device knows of the chunk's sequence, the token that the step before drew included."""
        if chunk.late_row is None:
            return chunk.sequence.token_ids
        assert chunk.start == len(chunk.sequence.token_ids) and chunk.num_tokens == 1
        return [*chunk.sequence.token_ids, self.sampled[chunk.late_row]]

    def end(self, plan: StepPlan, rows: list[SampledRow]) -> None:
        for chunk in plan.chunks:
            assert len(chunk.sequence.block_table) * BLOCK_SIZE >= chunk.end, "blocks went before their step"
        if not plan.chunks:
            updates, self.scheduler.updates = self.scheduler.updates, []
        else:
            updates = self.bookkeeper.update(plan, rows, self.now)
            self.scheduler.budget.note(plan, self.seconds(plan))
        for update in updates:
            for token in update.tokens:
                self.outputs[update.key][token.index].append(token)
            if update.finished:
                self.finished.add(update.key)
        self.assert_clean()

    @staticmethod
    def seconds(plan: StepPlan) -> float:
        """What the device takes for it."""
        return 0.010 + 0.001 * plan.num_tokens

    def step(self) -> StepPlan:
        plan = self.begin()
        self.end(plan, self.compute(plan))
        return plan

    def overlap_step(self) -> bool:
        """Compute the next step, then book the one before it. False once there is nothing to do."""
        plan = self.begin()
        had_work = bool(plan.chunks or self.in_flight)
        if plan.chunks:
            self.in_flight.append((plan, self.compute(plan)))
        if len(self.in_flight) == 2 or not plan.chunks:
            self.end(*(self.in_flight.pop(0) if self.in_flight else (plan, [])))
        return had_work

    def run(self, overlap: bool = False) -> None:
        for _ in range(2000):
            if not (self.overlap_step() if overlap else self.step().chunks):
                return
        raise AssertionError("the engine does not come to an end")

    def assert_clean(self) -> None:
        assert check_integrity(self.scheduler) == []

    def assert_empty(self) -> None:
        assert self.scheduler.requests == {} and self.scheduler.num_places == 0
        assert self.scheduler.pool.num_free == self.scheduler.pool.capacity


def expected_tokens(request: EngineRequest, index: int, max_model_len: int = 64) -> list[int]:
    """What the fake model produces when it runs alone."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    outputs: list[int] = []
    while True:
        token = draw(tokens, index)
        tokens.append(token)
        outputs.append(token)
        params = request.params
        num_outputs = len(request.output_token_ids) + len(outputs)
        if token == EOS and not params.ignore_eos or token in params.stop_token_ids:
            return outputs
        if num_outputs == params.max_tokens or len(tokens) == max_model_len:
            return outputs


def assert_outputs(engine: FakeEngine, request: EngineRequest) -> None:
    outputs = engine.outputs[request.key]
    for index in request.indices:
        tokens = outputs[index]
        expected = expected_tokens(request, index)
        if request.prefill_only:
            assert [token.token_id for token in tokens] == expected[:1]
            assert (tokens[0].finish_reason is not None) == (len(expected) == 1)
            continue
        assert [token.token_id for token in tokens] == expected
        assert [token.position for token in tokens] == [len(request.output_token_ids) + i for i in range(len(tokens))]
        assert [token.finish_reason is not None for token in tokens] == [False] * (len(tokens) - 1) + [True]


@st.composite
def requests(draw_: st.DrawFn, key: int, num_blocks: int, max_num_seqs: int) -> EngineRequest:
    """A request that the pool can take. Prompts come from two families, so that prefixes are shared."""
    n = draw_(st.integers(1, min(3, max_num_seqs)))
    room = (num_blocks - 1) * BLOCK_SIZE
    length = draw_(st.integers(1, max(1, min(24, room // (n + 1) - 2 * BLOCK_SIZE))))
    max_tokens = min(draw_(st.sampled_from([24, 12, 5, 1])), max(1, room - length))
    outputs = draw_(st.integers(0, max_tokens - 1)) if n == 1 and length < 8 else 0
    return EngineRequest(
        key,
        [draw_(st.integers(0, 1)), *(7 + i for i in range(length - 1))],
        SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=draw_(st.booleans()), stop_token_ids=(11,)),
        indices=tuple(range(n)),
        output_token_ids=tuple(i % 3 for i in range(outputs)),
        priority=draw_(st.integers(0, 1)),
        alone=draw_(st.sampled_from([False, False, True])),
    )


@given(st.data())
def test_random_traffic_leaks_nothing_and_gives_everyone_the_tokens_of_running_alone(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(9, 24), "num_blocks")
    max_num_seqs = data.draw(st.integers(1, 5), "max_num_seqs")
    budget = data.draw(st.integers(max_num_seqs, 24), "budget")
    adaptive = AdaptiveBudget(budget, (8, 12, 16)) if data.draw(st.booleans(), "adaptive") else None
    engine = FakeEngine(
        num_blocks, max_num_seqs, budget, caching=data.draw(st.booleans(), "caching"), adaptive=adaptive
    )
    overlap = data.draw(st.booleans(), "overlap")
    decoder_side = {}
    live: dict[int, EngineRequest] = {}
    released: set[int] = set()
    for key in range(data.draw(st.sampled_from([8, 12, 4, 1]), "requests")):
        request = data.draw(requests(key, num_blocks, max_num_seqs))
        way = data.draw(st.sampled_from(["add", "add", "prefill only", "reserve and prefill", "reserve and decode"]))
        if way == "prefill only":
            request = replace(request, prefill_only=True)
        if way in ("add", "prefill only"):
            engine.add(request)
        else:
            reservation = engine.reserve(request)
            if reservation is None:
                continue
            if way == "reserve and prefill":
                engine.scheduler.start_prefill(key, engine.now)
            else:
                decoder_side[key] = reservation
        live[key] = request
        for _ in range(data.draw(st.integers(0, 4))):
            plan = engine.begin()
            if plan.chunks and data.draw(st.integers(0, 9)) == 0:
                engine.fail(plan)
                for key in live.keys() & set(plan.keys):
                    released.add(key)
                    del live[key]
                if engine.in_flight:
                    engine.end(*engine.in_flight.pop(0))
                continue
            rows = engine.compute(plan)
            if overlap and plan.chunks:
                engine.in_flight.append((plan, rows))
            if live and data.draw(st.integers(0, 5)) == 0:
                victim = data.draw(st.sampled_from(sorted(live)))
                engine.scheduler.release(victim)  # while its step is in flight
                engine.assert_clean()
                released.add(victim)
                del live[victim]
                decoder_side.pop(victim, None)
            if decoder_side and data.draw(st.booleans()):
                arrived = data.draw(st.sampled_from(sorted(decoder_side)))
                receive_and_start(engine, live[arrived], decoder_side.pop(arrived))
                engine.assert_clean()
            if not engine.in_flight:
                engine.end(plan, rows)
            elif len(engine.in_flight) == 2 or not plan.chunks:
                engine.end(*engine.in_flight.pop(0))
    for key, reservation in decoder_side.items():
        receive_and_start(engine, live[key], reservation)
    for _ in range(len(live) + 1):  # what holds its blocks after the prefill may keep others waiting
        engine.run(overlap)
        held = [key for key in engine.scheduler.requests if key in engine.finished]
        if not held:
            break
        engine.scheduler.release(held[0])
    event(f"preemptions: {min(3, engine.scheduler.counters.num_preemptions)}")
    for key, request in live.items():
        assert key in engine.finished
        assert_outputs(engine, request)
    engine.assert_empty()


def receive_and_start(engine: FakeEngine, request: EngineRequest, reservation) -> None:  # noqa: ANN001
    """Another engine's KV arrives in the reserved blocks, and its first tokens."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    for position in range(reservation.num_cached_tokens, len(tokens)):
        block = reservation.block_ids[position // BLOCK_SIZE]
        engine.slots[block, position % BLOCK_SIZE] = tokens[: position + 1]
    first = []
    for index in request.indices:
        expected = expected_tokens(request, index)
        reason = ("stop" if expected[0] in (EOS, 11) else "length") if len(expected) == 1 else None
        first.append(SampledToken(index, len(request.output_token_ids), expected[0], None, reason))
    for token in first:
        engine.outputs[request.key][token.index].append(token)
    engine.scheduler.start_decode(request.key, first, engine.now)


def make(key: str, length: int, max_tokens: int | None = 8, n: int = 1, **fields) -> EngineRequest:  # noqa: ANN003
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True)
    start = sum(map(ord, key)) % 50
    return EngineRequest(key, [start + i % 40 for i in range(length)], params, tuple(range(n)), **fields)


def test_a_request_under_suspicion_has_every_other_step_until_it_is_cleared() -> None:
    engine = FakeEngine(40, max_num_seqs=4, budget=8)
    for key, alone in (("a", False), ("b", False), ("suspect", True), ("c", False)):
        engine.add(make(key, 3, 12, alone=alone))
    steps = [set(engine.step().keys) for _ in range(10)]
    others, everyone = {"a", "b", "c"}, {"a", "b", "c", "suspect"}
    assert steps[0::2][:ALONE_STEPS] == [{"suspect"}] * ALONE_STEPS
    assert set().union(*steps[1::2][:2]) == others, "the budget takes two of them at once"
    assert steps[2 * ALONE_STEPS - 3] == others and steps[2 * ALONE_STEPS - 1] == everyone
    engine.run()
    for key in everyone:
        assert_outputs(engine, make(key, 3, 12))
    engine.assert_empty()


def test_suspects_go_one_after_the_other() -> None:
    """The first needs to share with nobody; the later ones share with those that are cleared already."""
    engine = FakeEngine(40, max_num_seqs=4)
    for key in "abc":
        engine.add(make(key, 3, 30, n=1 + (key == "b"), alone=True))
    steps = [engine.step().keys for _ in range(6 * ALONE_STEPS)]
    assert steps[:ALONE_STEPS] == [["a"]] * ALONE_STEPS
    assert [keys for keys in steps if "b" in keys][:ALONE_STEPS] == [["b"]] * ALONE_STEPS
    assert [keys for keys in steps if "c" in keys][:ALONE_STEPS] == [["c"]] * ALONE_STEPS
    assert set(steps[-1]) == set("abc")


def test_a_suspect_that_waits_for_room_is_not_overtaken() -> None:
    engine = FakeEngine(9, max_num_seqs=4, caching=False)
    engine.add(make("running", 8, 12))
    engine.step()
    engine.add(make("suspect", 24, 2, alone=True))
    for number in range(3):
        engine.add(make(f"late-{number}", 4, 4))
    order: list[str] = []
    while not order or order[-1] != "suspect":
        order += engine.step().keys
        assert len(order) < 100
    assert set(order[:-1]) == {"running"}
    engine.run()
    engine.assert_empty()


def test_decodes_go_first_and_prompts_fill_the_budget_in_chunks() -> None:
    engine = FakeEngine(40, max_num_seqs=4, budget=8)
    engine.add(make("a", 3))
    assert [chunk.num_tokens for chunk in engine.step().chunks] == [3]
    engine.add(make("b", 18))
    sizes = [[(c.sequence.request.key, c.num_tokens) for c in engine.step().chunks] for _ in range(4)]
    assert sizes == [[("a", 1), ("b", 7)], [("a", 1), ("b", 7)], [("a", 1), ("b", 4)], [("b", 1), ("a", 1)]]


def test_the_longest_decode_first() -> None:
    engine = FakeEngine(64, budget=40)
    for key, length in enumerate((3, 17, 9)):
        engine.add(make(str(key), length, 5))
    engine.step()
    plan = engine.begin()
    assert [chunk.sequence.request.key for chunk in plan.chunks] == ["1", "2", "0"]


def test_lower_priority_numbers_go_first_then_arrival() -> None:
    engine = FakeEngine(40, max_num_seqs=1)
    for key, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0)):
        engine.add(make(key, 3, 1, priority=priority))
    assert [engine.step().chunks[0].sequence.request.key for _ in range(4)] == ["b", "d", "a", "c"]


def test_the_youngest_of_the_lowest_priority_is_preempted_and_comes_back_first() -> None:
    engine = FakeEngine(9, max_num_seqs=3, caching=False)
    for key, priority in (("a", 1), ("b", 1), ("c", 0)):
        engine.add(make(key, 5, 8, priority=priority))
    num_steps = 0
    while not engine.scheduler.counters.num_preemptions:
        num_steps += len(engine.step().chunks)
        assert num_steps < 100
    assert [s.request.key for s in engine.scheduler.waiting] == ["b"]
    engine.add(make("d", 5, 8, priority=1))
    assert engine.reserve(make("e", 2)) is None, "no new leases while a preempted sequence waits"
    assert [s.request.key for s in engine.scheduler.waiting] == ["b", "d"]
    engine.run()
    for key, priority in (("a", 1), ("b", 1), ("c", 0), ("d", 1)):
        assert_outputs(engine, make(key, 5, 8, priority=priority))
    engine.assert_empty()


def test_a_preemption_that_leaves_the_batch_empty_lets_the_next_in_at_once() -> None:
    """Otherwise the engine would see nothing to do, and sleep."""
    engine = FakeEngine(13, max_num_seqs=3, caching=False)
    first, second = make("first", 5, 30), make("second", 20, 28)
    engine.add(first)
    engine.step()
    reservation = engine.reserve(second)
    assert engine.reserve(make("lease", 4)) is not None
    engine.run()
    assert [s.request.key for s in engine.scheduler.waiting] == ["first"], "leases hold the blocks that it needs"
    receive_and_start(engine, second, reservation)
    engine.run()
    assert engine.scheduler.counters.num_preemptions == 2
    assert engine.finished == {"first"}, "it had room as soon as the second one gave its blocks back"
    engine.scheduler.release("lease")
    engine.run()
    assert_outputs(engine, first)
    assert_outputs(engine, second)
    engine.assert_empty()


def test_completions_share_the_prompts_full_blocks_and_nothing_else() -> None:
    engine = FakeEngine(40, max_num_seqs=4)
    engine.add(make("a", 10, 8, n=3))
    engine.step()
    tables = [s.block_table for s in engine.scheduler.requests["a"].sequences]
    assert [len(table) for table in tables] == [3, 3, 3]
    assert len({tuple(table[:2]) for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    assert len(engine.step().copies) == 2
    engine.run()
    assert_outputs(engine, make("a", 10, 8, n=3))
    engine.assert_empty()


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    engine = FakeEngine(40)
    for key in ("a", "b"):
        engine.add(EngineRequest(key, list(range(8)), SamplingParams(max_tokens=1)))
        last = engine.step()
    assert [(chunk.start, chunk.num_tokens) for chunk in last.chunks] == [(4, 4)]
    assert engine.scheduler.counters.prefix_cache_hits == 4


@pytest.mark.parametrize("max_tokens", [1, 9])
def test_a_reservation_of_a_wholly_cached_prompt_can_be_decoded_or_prefilled(max_tokens: int) -> None:
    engine = FakeEngine(40)
    prompt = list(range(8))
    engine.add(EngineRequest("first", prompt, SamplingParams(max_tokens=1)))
    engine.run()
    requests = [
        EngineRequest(key, prompt, SamplingParams(n=2, max_tokens=max_tokens), (0, 1)) for key in ("prefill", "decode")
    ]
    reservations = [engine.reserve(request) for request in requests]
    # With one output token there is no head-room, and the last block stays private so that it can be computed.
    assert [r.num_cached_tokens for r in reservations] == [8 if max_tokens > 1 else 4] * 2
    engine.scheduler.start_prefill("prefill", engine.now)
    receive_and_start(engine, requests[1], reservations[1])
    engine.run()
    for request in requests:
        assert_outputs(engine, request)
    engine.assert_empty()


def test_a_reservation_holds_head_room_and_places_for_every_completion() -> None:
    engine = FakeEngine(40, max_num_seqs=4, headroom=6)
    reservation = engine.reserve(make("a", 10, 20, n=3))
    assert reservation is not None and len(reservation.block_ids) == 3 and reservation.num_cached_tokens == 0
    assert engine.scheduler.pool.num_free == 39 - (2 + 3 * 2)  # 16 tokens: two shared blocks, two for each
    assert engine.scheduler.num_places == 3
    assert engine.reserve(make("b", 4, 8, n=2)) is None
    engine.scheduler.release("a")
    assert engine.reserve(make("b", 4, 8, n=2)) is not None
    engine.scheduler.release("b")
    engine.assert_empty()


def test_first_tokens_that_end_their_completions_finish_the_request() -> None:
    engine = FakeEngine(40)
    engine.reserve(make("a", 10, 1, n=2))
    tokens = [SampledToken(index, 0, 3, None, "length") for index in (0, 1)]
    engine.scheduler.start_decode("a", tokens, 0.0)
    engine.step()
    assert engine.finished == {"a"} and engine.outputs == {}
    engine.assert_empty()


def test_a_prefill_only_request_keeps_its_blocks_until_it_is_released() -> None:
    engine = FakeEngine(40, budget=8)
    engine.add(make("a", 10, 8, n=3, prefill_only=True))
    engine.run()
    assert [len(engine.outputs["a"][index]) for index in range(3)] == [1, 1, 1]
    assert engine.finished == {"a"} and engine.scheduler.num_places == 0
    assert engine.scheduler.pool.num_free == 39 - 3
    engine.scheduler.release("a")
    engine.scheduler.release("a")
    engine.assert_empty()


def test_a_release_in_flight_returns_the_blocks_only_with_the_step() -> None:
    engine = FakeEngine(40)
    engine.add(make("a", 10, n=2))
    plan = engine.begin()
    rows = engine.compute(plan)
    engine.scheduler.release("a")
    assert engine.scheduler.pool.num_free == 39 - 3, "nothing is written to the other completion's own block"
    engine.add(make("a", 3, 1))  # the key is free again
    engine.end(plan, rows)
    assert engine.scheduler.pool.num_free == 39 and engine.outputs == {}
    engine.run()
    assert_outputs(engine, make("a", 3, 1))


def test_timings_are_reported_once() -> None:
    engine = FakeEngine(40, budget=8)
    engine.add(make("a", 20, 3))
    engine.now = 5.0
    updates = []
    for _ in range(5):
        plan = engine.begin()
        rows = engine.compute(plan)
        engine.now += 0.25
        updates += engine.bookkeeper.update(plan, rows, engine.now)
    reported = [(u.prefill_queue, u.prefill, u.num_cached_tokens) for u in updates]
    assert reported == [(6.0, 2.75, 0), (None,) * 3, (None,) * 3]
    engine.now = 100.0
    receive_and_start(engine, make("b", 4, 3), engine.reserve(make("b", 4, 3)))
    plan = engine.begin()
    (update,) = engine.bookkeeper.update(plan, engine.compute(plan), 103.0)
    assert (update.join_wait, update.first_decode_step, update.prefill) == (1.0, 2.0, None)


@pytest.mark.parametrize("release", [False, True])
def test_an_over_run_token_is_never_delivered_and_returns_its_block(release: bool) -> None:
    """A stop token is seen one step late: the step after it has begun, in a block of its own."""
    tokens = expected_tokens(make("a", 7), 0)
    stop = next(i for i, token in enumerate(tokens) if (7 + i) % BLOCK_SIZE == 0 and token not in tokens[:i])
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=() if release else (tokens[stop],))
    request = replace(make("a", 7), params=params)
    engine = FakeEngine(40)
    engine.add(request)
    while len(engine.outputs["a"][0]) <= stop:
        engine.overlap_step()
    if release:
        engine.scheduler.release("a")
    ((over_run, _),) = engine.in_flight
    (chunk,) = over_run.chunks
    assert chunk.start == 7 + stop and chunk.start % BLOCK_SIZE == 0, "its KV is the first of a block"
    assert engine.scheduler.leaving == [chunk.sequence] and engine.scheduler.pool.num_free < 39
    assert engine.scheduler.num_places == 0
    engine.run(overlap=True)
    assert [token.token_id for token in engine.outputs["a"][0]] == tokens[: stop + 1]
    assert engine.scheduler.leaving == []
    engine.assert_empty()


def test_a_sequence_that_must_end_with_a_pending_token_is_not_computed_further() -> None:
    engine = FakeEngine(40)
    engine.add(make("a", 5, 3))
    engine.add(make("b", 5, 3, prefill_only=True))
    sizes = []
    while engine.overlap_step():
        sizes += [plan.num_tokens for plan, _ in engine.in_flight[-1:]]
    assert engine.finished == {"a", "b"} and sizes == [10, 1, 1]
    engine.scheduler.release("b")
    engine.assert_empty()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make("a", 0), "the prompt is empty"),
        (make("a", 64), r"64 tokens.*max_model_len \(64\)"),
        (make("a", 4, n=5), "n is 5, but max_num_seqs is 4; lower n or raise it"),
        (make("a", 30, None), "needs KV cache for 64 tokens.*max_tokens None.*holds 44; lower max_tokens$"),
        (make("a", 39, 2, n=3), "the start of 3 completions needs KV cache for 48 tokens"),
        (EngineRequest("a", [1, 97], SamplingParams()), "token id 97 is outside the vocabulary"),
        (EngineRequest("a", [1], SamplingParams(), output_token_ids=(-1,)), "token id -1 is outside"),
        (EngineRequest("a", [1], SamplingParams(max_tokens=2), output_token_ids=(1, 2)), "max_tokens is 2"),
        (EngineRequest("a", [1], SamplingParams(n=2), (0, 1), (4,)), "2 completions cannot go on"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: EngineRequest, message: str) -> None:
    engine = FakeEngine(12, max_num_seqs=4)
    for enter in (engine.add, engine.reserve):
        with pytest.raises(InvalidRequestError, match=message):
            enter(request_)
    engine.assert_empty()


def test_misuse_is_an_error() -> None:
    engine = FakeEngine(12)
    engine.add(make("a", 4))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        engine.add(make("a", 4))
    for key in ("a", "unknown"):
        with pytest.raises(KeyError, match="not reserved"):
            engine.scheduler.start_prefill(key, 0.0)
    engine.reserve(make("b", 4, n=2))
    with pytest.raises(ValueError, match=r"indices \[0\], not \[0, 1\]"):
        engine.scheduler.start_decode("b", [SampledToken(0, 0, 1)], 0.0)


def test_integrity_sees_what_is_wrong() -> None:
    engine = FakeEngine(20, caching=False)
    engine.add(make("a", 10))
    engine.step()
    live: LiveRequest = engine.scheduler.requests["a"]
    stolen = engine.scheduler.pool.allocate(1)
    assert "1 references, but 0 users" in check_integrity(engine.scheduler)[0]
    engine.scheduler.pool.free(stolen or [])
    engine.add(make("b", 10))
    engine.step()
    other = engine.scheduler.requests["b"].lead
    engine.scheduler.pool.free([other.replace_block(0, live.lead.block_table[0])])
    engine.scheduler.pool.share([live.lead.block_table[0]])
    assert any("stands for 2 different prefixes" in problem for problem in check_integrity(engine.scheduler))
    engine.scheduler.num_places += 1
    assert any("places counted" in problem for problem in check_integrity(engine.scheduler))


@pytest.mark.parametrize("seed", range(20))
def test_a_check_in_slices_finds_nothing_in_a_state_that_changes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are taken, shared, cached and freed between any two slices."""
    for module in (integrity, block_pool):
        monkeypatch.setattr(module, "CHECK_SLICE", 3)
    rng, engine = random.Random(seed), FakeEngine(30)
    slices = check_in_slices(engine.scheduler)
    num_checks = 0
    for number in range(120):
        if rng.random() < 0.4:
            engine.add(make(f"r{number}", rng.choice([9, 14, 17]), rng.randrange(1, 9), n=rng.randrange(1, 3)))
        if rng.random() < 0.2 and engine.scheduler.requests:
            engine.scheduler.release(rng.choice(list(engine.scheduler.requests)))
        engine.step()
        for _ in range(rng.randrange(1, 6)):
            found = next(slices, None)
            if found is None:
                num_checks, slices = num_checks + 1, check_in_slices(engine.scheduler)
            else:
                assert found == []
    assert num_checks > 3


def test_a_check_in_slices_finds_what_is_wrong_while_the_prefix_cache_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_pool, "CHECK_SLICE", 3)
    pool = BlockPool(60)
    blocks = pool.allocate(40) or []
    for block in blocks[:20]:
        pool.cache(block, bytes([block]))
    pool._hashes[blocks[19]] = None
    found: list[str] = []
    for number, part in enumerate(pool.check_cache()):
        found += part
        if number < 15:
            pool.cache(blocks[20 + number], bytes([blocks[20 + number]]))
    assert set(found) == {f"the prefix cache names block {blocks[19]}, which holds something else"}


def test_prompts_get_all_that_fits_alone_and_little_beside_streams() -> None:
    """0.010 s of a plain step let a prompt take 5 ms, and so 5 tokens of its own; each step gives it 4 at least."""
    engine = FakeEngine(200, max_num_seqs=4, budget=60, adaptive=AdaptiveBudget(60, (18, 24, 40)))
    engine.add(make("stream", 50, 14))
    assert engine.step().num_tokens == 50
    for _ in range(5):
        assert engine.step().num_tokens == 1
    engine.add(make("late", 58, 4))
    steps = [engine.step() for _ in range(4)]
    assert [plan.num_tokens for plan in steps] == [18, 18, 18, 8]
    assert all("stream" in plan.keys for plan in steps), "no stream stands still for a prompt"
    engine.run()
    for request in (make("stream", 50, 14), make("late", 58, 4)):
        assert_outputs(engine, request)


def test_prompts_that_others_decode_take_all_that_fits() -> None:
    engine = FakeEngine(200, max_num_seqs=8, budget=60, adaptive=AdaptiveBudget(60, (18, 24, 40)))
    for key, length in (("a", 30), ("b", 31), ("c", 40)):
        engine.add(make(key, length, 4, prefill_only=True))
    assert [engine.step().num_tokens for _ in range(2)] == [60, 41]


def test_first_come_first_served_whatever_the_budget() -> None:
    engine = FakeEngine(200, max_num_seqs=4, budget=60, adaptive=AdaptiveBudget(60, (18, 24, 40)))
    engine.add(make("stream", 4, 50))
    for _ in range(8):
        engine.step()
    engine.add(make("first", 40, 4))
    engine.add(make("second", 5, 4))
    seen = [key for plan in (engine.step() for _ in range(6)) for key in plan.keys if key != "stream"]
    assert seen.index("second") > max(i for i, key in enumerate(seen[:4]) if key == "first") - 2
    assert seen[0] == "first"
