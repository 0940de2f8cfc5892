"""Two lanes on a device that computes their steps in any order: no token is ever computed over a KV that is not there.

Steps of one lane are computed one after the other, at any time between being planned and being booked. A slot of the
KV holds the whole prefix that it was computed from.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Hashable
from typing import NamedTuple

from hypothesis import event, given
from hypothesis import strategies as st

from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.kv.integrity import check_integrity
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.bookkeeping import Bookkeeper
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import EVERYTHING, LaneName, SampledRow, Share, StepPlan
from pdray.engine.schedule.scheduler import Scheduler
from pdray.sampling_params import SamplingParams

BLOCK_SIZE = 4
VOCAB_SIZE = 97
EOS = 5
DECODES = Share(prompts=0)


def draw(prefix: list[int], index: int) -> int:
    """The fake model: a token that depends on every earlier one."""
    digest = hashlib.sha256(repr((prefix, index)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % VOCAB_SIZE


class Work(NamedTuple):
    """What the device was given of a chunk: the host's lists go on changing. late_row: see Chunk."""

    tokens: list[int]
    start: int
    end: int
    blocks: list[int]
    late_row: int | None
    indices: list[int]


class Step:
    """Planned, and not booked. rows: once it is computed."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.work = [
            Work(
                list(chunk.sequence.token_ids),
                chunk.start,
                chunk.end,
                list(chunk.sequence.block_table),
                chunk.late_row,
                [each.sequence.index for each in chunk.draws],
            )
            for chunk in plan.chunks
        ]
        self.rows: list[SampledRow] | None = None


class TwoLanes:
    """Scheduler and bookkeeper, and a device with a queue for each lane."""

    def __init__(self, num_blocks: int, max_num_seqs: int, budget: int, caching: bool = True) -> None:
        limits = EngineLimits(BLOCK_SIZE, num_blocks - 1, 64, max_num_seqs, budget, 4, VOCAB_SIZE, (EOS,))
        self.scheduler = Scheduler(limits, BlockPool(num_blocks, caching))
        self.bookkeeper = Bookkeeper(self.scheduler)
        self.slots: dict[tuple[int, int], list[int]] = {}
        self.lanes: dict[LaneName, deque[Step]] = {name: deque() for name in LaneName}
        self.sampled: dict[LaneName, list[int]] = {name: [] for name in LaneName}
        self.outputs: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(self.scheduler.prepare(request, reserved=False), 0.0)

    def plan(self, share: Share) -> bool:
        """Plan another step of that lane, if it may have one. Returns whether there was anything to do."""
        lane = self.lanes[share.lane]
        if len(lane) == 2:
            return False
        plan = self.scheduler.schedule(0.0, share)
        assert check_integrity(self.scheduler) == []
        assert plan.lane is share.lane and plan.num_tokens <= self.scheduler.limits.max_num_batched_tokens
        num_prompts = len(plan.chunks) - plan.num_decodes
        assert share.decodes or plan.lane is LaneName.PROMPTS
        assert share.prompts is None or num_prompts <= share.prompts
        in_flight = [c.sequence for name, steps in self.lanes.items() for s in steps for c in s.plan.chunks
                     if name is not share.lane]  # fmt: skip
        assert not {id(chunk.sequence) for chunk in plan.chunks} & {id(sequence) for sequence in in_flight}
        if plan.chunks:
            lane.append(Step(plan))
        return bool(plan.chunks)

    def compute(self, name: LaneName) -> None:
        """The lane's first step that is not computed yet, if there is one."""
        step = next((step for step in self.lanes[name] if step.rows is None), None)
        if step is None:
            return
        for copy in step.plan.copies:
            for offset in range(BLOCK_SIZE):
                self.slots[copy.destination, offset] = self.slots.get((copy.source, offset), [])
        known = [
            work.tokens if work.late_row is None else [*work.tokens, self.sampled[name][work.late_row]]
            for work in step.work
        ]
        for work, tokens in zip(step.work, known, strict=True):
            for position in range(work.start, work.end):
                slot = work.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
                self.slots[slot] = tokens[: position + 1]
        step.rows = []
        for work, tokens in zip(step.work, known, strict=True):
            for position in range(work.end):
                slot = work.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
                assert self.slots.get(slot) == tokens[: position + 1], "attention over a wrong KV"
            step.rows += [SampledRow(draw(tokens[: work.end], index)) for index in work.indices]
        self.sampled[name] = [row.token_id for row in step.rows]

    def book(self, name: LaneName) -> bool:
        """Wait for the lane's oldest step. False if it has none."""
        if not self.lanes[name]:
            return False
        if self.lanes[name][0].rows is None:
            self.compute(name)
        step = self.lanes[name].popleft()
        assert step.rows is not None
        for update in self.bookkeeper.update(step.plan, step.rows, 0.0):
            for token in update.tokens:
                self.outputs[update.key][token.index].append(token.token_id)
        assert check_integrity(self.scheduler) == []
        return True

    def finish(self) -> None:
        """Everything, in the plainest way."""
        for _ in range(3000):
            booked = [self.book(name) for name in LaneName]
            if not self.plan(EVERYTHING) and not any(booked):
                assert self.scheduler.requests == {} and self.scheduler.pool.num_free == self.scheduler.pool.capacity
                return
        raise AssertionError("the engine does not come to an end")


@st.composite
def requests(draw_: st.DrawFn, key: int, num_blocks: int, max_num_seqs: int) -> EngineRequest:
    """A request that the pool can take. Prompts come from two families, so that prefixes are shared."""
    n = draw_(st.integers(1, min(3, max_num_seqs)))
    room = (num_blocks - 1) * BLOCK_SIZE
    length = draw_(st.integers(1, max(1, min(24, room // (n + 1) - 2 * BLOCK_SIZE))))
    max_tokens = min(draw_(st.sampled_from([24, 12, 5, 1])), max(1, room - length))
    prompt = [draw_(st.integers(0, 1)), *(7 + i for i in range(length - 1))]
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=draw_(st.booleans()), stop_token_ids=(11,))
    return EngineRequest(key, prompt, params, tuple(range(n)), priority=draw_(st.integers(0, 1)))


@given(st.data())
def test_any_order_of_two_lanes_gives_everyone_the_tokens_of_one(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(9, 24), "num_blocks")
    max_num_seqs = data.draw(st.integers(1, 5), "max_num_seqs")
    budget = data.draw(st.integers(max_num_seqs, 24), "budget")
    caching = data.draw(st.booleans(), "caching")
    engine = TwoLanes(num_blocks, max_num_seqs, budget, caching)
    pieces = Share(LaneName.PROMPTS, False, data.draw(st.integers(1, 12), "piece"), data.draw(st.integers(1, 3)))
    live: dict[int, EngineRequest] = {}
    num_beside = 0
    for key in range(data.draw(st.sampled_from([8, 12, 4, 1]), "requests")):
        live[key] = data.draw(requests(key, num_blocks, max_num_seqs))
        engine.add(live[key])
        for _ in range(data.draw(st.integers(0, 6))):
            # As MuxEngine: decodes alone beside pieces; else either, as the controller likes.
            has_pieces = bool(engine.lanes[LaneName.PROMPTS])
            action = data.draw(
                st.sampled_from(["main", "main", "piece", "piece", "compute", "book", "book", "release"])
            )
            lane = data.draw(st.sampled_from(list(LaneName)))
            if action == "main":
                planned = engine.plan(DECODES if has_pieces or data.draw(st.booleans()) else EVERYTHING)
                num_beside += planned and has_pieces
            elif action == "piece":
                engine.plan(pieces)
            elif action == "compute":
                engine.compute(lane)
            elif action == "book":
                engine.book(lane)
            elif live and data.draw(st.integers(0, 3)) == 0:
                victim = data.draw(st.sampled_from(sorted(live)))
                engine.scheduler.release(victim)
                assert check_integrity(engine.scheduler) == []
                del live[victim]
    engine.finish()
    event(
        f"steps beside pieces: {min(3, num_beside)}, preemptions: {min(2, engine.scheduler.counters.num_preemptions)}"
    )
    for key, request in live.items():
        alone = TwoLanes(num_blocks, max_num_seqs, budget, caching)
        alone.add(request)
        alone.finish()
        assert engine.outputs[key] == alone.outputs[key]


def test_decodes_that_need_blocks_wait_for_pieces_in_flight_and_no_further_piece_begins() -> None:
    engine = TwoLanes(num_blocks=6, max_num_seqs=3, budget=16, caching=False)
    engine.add(EngineRequest("old", [1, 2, 3, 4], SamplingParams(max_tokens=12, ignore_eos=True)))
    assert engine.plan(EVERYTHING) and engine.book(LaneName.MAIN)
    for key, length in (("young", 8), ("youngest", 2)):
        engine.add(EngineRequest(key, [*range(1, 1 + length)], SamplingParams(max_tokens=4, ignore_eos=True)))
    pieces = Share(LaneName.PROMPTS, False, 8, 8)
    assert engine.plan(pieces)
    for _ in range(8):
        assert engine.plan(DECODES) and engine.book(LaneName.MAIN)
    assert not engine.plan(DECODES), "the last free block is taken"
    assert not engine.plan(pieces)
    assert engine.scheduler.counters.num_preemptions == 0
    assert engine.book(LaneName.PROMPTS)
    assert engine.plan(DECODES) and engine.scheduler.counters.num_preemptions == 1
    engine.finish()
    assert {key: len(tokens[0]) for key, tokens in engine.outputs.items()} == {"old": 12, "young": 4, "youngest": 4}


def test_a_prompt_changes_lanes_only_between_its_steps() -> None:
    engine = TwoLanes(num_blocks=20, max_num_seqs=3, budget=6)
    engine.add(EngineRequest("r", [*range(1, 20)], SamplingParams(max_tokens=3, ignore_eos=True)))
    pieces = Share(LaneName.PROMPTS, False, 6, 8)
    assert engine.plan(EVERYTHING) and not engine.plan(pieces)
    assert engine.book(LaneName.MAIN) and engine.plan(pieces) and not engine.plan(EVERYTHING)
    assert engine.plan(pieces), "the same lane goes on while a step is in flight"
    engine.finish()
    assert len(engine.outputs["r"][0]) == 3
