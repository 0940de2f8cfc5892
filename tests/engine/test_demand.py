"""A router's formula is the worker's: a lease is granted exactly where the credit covers the demand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pdray.control.credit import covers
from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.demand import lease_demand
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.scheduler import Scheduler
from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams
from pdray.wire.lease_messages import Credit

BLOCK_SIZE = 4
MAX_MODEL_LEN = 60

requests = st.tuples(
    st.integers(1, 50),  # prompt
    st.integers(1, 40),  # max_tokens
    st.integers(1, 4),  # n
    st.integers(0, 6),  # outputs so far, of a single completion
    st.integers(0, 2),  # which prompt: those that begin alike share blocks
)


@settings(max_examples=400, deadline=None)
@given(
    num_blocks=st.integers(5, 60),
    headroom=st.integers(0, 20),
    caching=st.booleans(),
    wanted=st.lists(requests, min_size=1, max_size=12),
    frees=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_granted_where_the_credit_covers_the_demand(
    num_blocks: int, headroom: int, caching: bool, wanted: list[tuple[int, ...]], frees: list[bool]
) -> None:
    limits = EngineLimits(BLOCK_SIZE, num_blocks - 1, MAX_MODEL_LEN, 6, 16, headroom, 97, ())
    scheduler = Scheduler(limits, BlockPool(num_blocks, caching))
    granted: list[int] = []
    for number, (length, max_tokens, n, num_outputs, start) in enumerate(wanted):
        num_outputs = min(num_outputs, max_tokens - 1) if n == 1 else 0
        request = EngineRequest(
            number,
            [start + i % 90 for i in range(length)],
            SamplingParams(max_tokens=max_tokens, n=n, temperature=0),
            tuple(range(n)),
            (7,) * num_outputs,
        )
        demand = lease_demand(
            length + num_outputs, length + max_tokens, n, block_size=BLOCK_SIZE, headroom_tokens=headroom
        )
        fits = (
            demand.blocks < num_blocks and n <= 6 and length + max_tokens <= min(MAX_MODEL_LEN, limits.num_blocks * 4)
        )
        try:
            live = scheduler.prepare(request, reserved=True)
        except InvalidRequestError:
            assert not fits
            continue
        if not fits:  # no router asks for it
            continue
        free = scheduler.pool.num_free
        credit = Credit(free, limits.max_num_seqs - scheduler.num_places, 0, 0, 0)
        reservation = scheduler.reserve(live)
        if covers(credit, demand.blocks, demand.places):
            assert reservation is not None, "a router would be denied what the credit covers"
        elif not caching:
            assert reservation is None, "a router would wait for more than is needed"
        if reservation is not None:
            if not caching:
                assert free - scheduler.pool.num_free == demand.blocks
            granted.append(number)
            scheduler.allocator.cache_computed(live.lead, len(live.lead.token_ids))
        if frees[number] and granted:
            scheduler.release(granted.pop(0))
