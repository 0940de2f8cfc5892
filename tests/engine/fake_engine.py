"""The scheduler on a device that remembers what was written where: no token is ever computed over a wrong KV."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable

from pdray.engine.kv.allocator import KVAllocator
from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.kv.integrity import check_integrity
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.bookkeeping import Bookkeeper
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.plan import Chunk, SampledRow, StepPlan
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.token_budget import TokenBudget
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
        allocator: type[KVAllocator] = KVAllocator,
    ):
        self.limits = EngineLimits(BLOCK_SIZE, num_blocks - 1, 64, max_num_seqs, budget, headroom, VOCAB_SIZE, (EOS,))
        pool = BlockPool(num_blocks, caching)
        self.scheduler = Scheduler(self.limits, pool, adaptive, allocator(self.limits, pool))
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
