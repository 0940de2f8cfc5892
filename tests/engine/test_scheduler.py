"""Which tokens a step computes: whose turn it is, how prompts are cut, who is preempted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_engine import BLOCK_SIZE, FakeEngine, assert_outputs, expected_tokens, make, receive_and_start

from pdray.engine.request import EngineRequest
from pdray.engine.schedule.sequence import ALONE_STEPS
from pdray.engine.schedule.token_budget import AdaptiveBudget
from pdray.errors import InvalidRequestError
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams


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
