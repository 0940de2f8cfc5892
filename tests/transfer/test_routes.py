"""Who sends which heads: every rank gets what it is to have, once, from one that has it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.models.shards import kv_heads_of
from pdray.transfer.routes import head_routes

RANKS = (1, 2, 3, 4, 8)


def fits(num_kv_heads: int, num_ranks: int) -> bool:
    """What check_divisible() lets through."""
    return num_kv_heads % num_ranks == 0 or num_ranks % num_kv_heads == 0


@given(st.integers(1, 48), st.sampled_from(RANKS), st.sampled_from(RANKS))
def test_every_rank_gets_its_heads_once(num_kv_heads: int, num_sources: int, num_targets: int) -> None:
    if not (fits(num_kv_heads, num_sources) and fits(num_kv_heads, num_targets)):
        return
    have = [list(range(*kv_heads_of(num_kv_heads, rank, num_sources)[:2])) for rank in range(num_sources)]
    got: list[dict[int, int]] = [{} for _ in range(num_targets)]
    for route in head_routes(num_kv_heads, num_sources, num_targets):
        sent = have[route.source][route.source_heads.start : route.source_heads.stop]
        assert sent == list(range(route.heads.start, route.heads.stop)) and sent
        assert (route.source_heads.whole, route.heads.whole) == (len(have[route.source]), num_kv_heads)
        places = range(route.target_heads.start, route.target_heads.stop)
        assert not got[route.target].keys() & set(places)
        got[route.target] |= dict(zip(places, sent, strict=True))
    for rank in range(num_targets):
        wanted = kv_heads_of(num_kv_heads, rank, num_targets)
        assert [got[rank][place] for place in range(len(got[rank]))] == list(range(wanted.start, wanted.stop))


@given(st.sampled_from(RANKS), st.sampled_from(RANKS), st.sampled_from(RANKS))
def test_ranks_that_hold_the_same_share_the_work(num_kv_heads: int, num_sources: int, num_targets: int) -> None:
    if not (fits(num_kv_heads, num_sources) and fits(num_kv_heads, num_targets)):
        return
    sent = Counter(route.source for route in head_routes(num_kv_heads, num_sources, num_targets))
    if num_targets >= num_sources:
        assert set(sent) == set(range(num_sources))
        assert max(sent.values()) - min(sent.values()) <= 1


@pytest.mark.parametrize(
    ("num_kv_heads", "num_sources", "num_targets", "expected"),
    [
        (8, 4, 2, [(0, 0, 0, 2), (1, 0, 2, 4), (2, 1, 4, 6), (3, 1, 6, 8)]),
        (8, 1, 2, [(0, 0, 0, 4), (0, 1, 4, 8)]),
        (2, 4, 1, [(0, 0, 0, 1), (2, 0, 1, 2)]),
        (2, 4, 4, [(0, 0, 0, 1), (1, 1, 0, 1), (2, 2, 1, 2), (3, 3, 1, 2)]),
        (2, 1, 4, [(0, 0, 0, 1), (0, 1, 0, 1), (0, 2, 1, 2), (0, 3, 1, 2)]),
    ],
)
def test_examples(
    num_kv_heads: int, num_sources: int, num_targets: int, expected: list[tuple[int, int, int, int]]
) -> None:
    routes = head_routes(num_kv_heads, num_sources, num_targets)
    assert [(route.source, route.target, route.heads.start, route.heads.stop) for route in routes] == expected
