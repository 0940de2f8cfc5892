"""The integrity check finds what is wrong with the books, in one go or in slices, and nothing else."""

from __future__ import annotations

import random

import pytest
from fake_engine import FakeEngine, make

from pdray.engine.kv import block_pool, integrity
from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.kv.integrity import check_in_slices, check_integrity
from pdray.engine.schedule.sequence import LiveRequest


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
