"""choose() on recorded states, and what must hold for any state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.control.policy import Choice, DecodeState, Demand, PrefillState, choose
from pdray.wire.lease_messages import Credit

DEMAND = Demand(blocks=4, places=1, tokens=60)


def decode(name: str, *, blocks: int = 100, places: int = 8, running: int = 0, **fields: object) -> DecodeState:
    credit = Credit(blocks, places, running, waiting=0, leases=running)
    return DecodeState(name, **{"prefills": False, "credit": credit, "num_blocks": 200} | fields)  # type: ignore[arg-type]


def prefill(name: str, queued_tokens: int, cached_tokens: int = 0) -> PrefillState:
    return PrefillState(name, queued_tokens, batch_tokens=2048, cached_tokens=cached_tokens)


def pick(
    decodes: list[DecodeState],
    prefills: list[PrefillState],
    *,
    demand: Demand = DEMAND,
    pairs: set[tuple[str, str]] | None = None,
    local: int = 0,
) -> Choice | None:
    if pairs is None:
        pairs = {(p.worker_id, d.worker_id) for p in prefills for d in decodes}
    return choose(demand, decodes, prefills, pairs, local_prefill_max_tokens=local)


IDLE = [prefill("p0", 0)]


def test_the_least_loaded_pair() -> None:
    decodes = [decode("d0", running=3), decode("d1", running=1), decode("d2", running=2)]
    assert pick(decodes, [prefill("p0", 900), prefill("p1", 100)]) == Choice("p1", "d1")


def test_leases_that_were_asked_for_count() -> None:
    assert pick([decode("d0", asked_places=2), decode("d1", running=1)], IDLE) == Choice("p0", "d1")
    assert pick([decode("d0", places=2, asked_places=2)], IDLE) is None
    assert pick([decode("d0", blocks=10, asked_blocks=7)], IDLE) is None


def test_among_equals_the_one_with_more_free_blocks() -> None:
    assert pick([decode("d0", blocks=50), decode("d1", blocks=60)], IDLE) == Choice("p0", "d1")


@pytest.mark.parametrize("lacking", [{"blocks": 3}, {"places": 0}])
def test_a_worker_without_credit_is_passed_over(lacking: dict[str, int]) -> None:
    assert pick([decode("d0", **lacking)], IDLE) is None
    assert pick([decode("d0", **lacking), decode("d1", running=7)], IDLE) == Choice("p0", "d1")


def test_n_completions_need_n_places() -> None:
    assert pick([decode("d0", places=2)], IDLE, demand=Demand(4, 3, 60)) is None


def test_a_prefill_worker_with_more_than_two_batches_gets_nothing() -> None:
    assert pick([decode("d0")], [prefill("p0", 4097)]) is None
    assert pick([decode("d0")], [prefill("p0", 4096)]) == Choice("p0", "d0")
    assert pick([decode("d0")], [prefill("p0", 4097), prefill("p1", 4000)]) == Choice("p1", "d0")


def test_only_connected_pairs() -> None:
    decodes = [decode("d0"), decode("d1", running=5)]
    prefills = [prefill("p0", 0), prefill("p1", 10)]
    assert pick(decodes, prefills, pairs={("p1", "d1")}) == Choice("p1", "d1")
    assert pick(decodes, prefills, pairs=set()) is None


def test_local_prefill() -> None:
    assert pick([decode("b0", prefills=True)], []) == Choice(None, "b0")
    assert pick([decode("d0")], IDLE, demand=Demand(4, 1, 60), local=60) == Choice(None, "d0")
    assert pick([decode("d0")], IDLE, demand=Demand(4, 1, 61), local=60) == Choice("p0", "d0")
    assert pick([decode("b0", prefills=True, places=0)], []) is None


decode_states = st.builds(
    decode,
    st.sampled_from(["d0", "d1", "d2"]),
    blocks=st.integers(0, 10),
    places=st.integers(0, 4),
    running=st.integers(0, 4),
    prefills=st.booleans(),
    asked_blocks=st.integers(0, 4),
    asked_places=st.integers(0, 2),
)
prefill_states = st.builds(prefill, st.sampled_from(["p0", "p1"]), st.integers(0, 8000))


@given(
    decodes=st.lists(decode_states, max_size=3, unique_by=lambda d: d.worker_id),
    prefills=st.lists(prefill_states, max_size=2, unique_by=lambda p: p.worker_id),
    pairs=st.sets(st.tuples(st.sampled_from(["p0", "p1"]), st.sampled_from(["d0", "d1", "d2"]))),
    local=st.sampled_from([0, 60]),
)
def test_a_choice_is_possible_and_none_means_that_none_is(
    decodes: list[DecodeState], prefills: list[PrefillState], pairs: set[tuple[str, str]], local: int
) -> None:
    def fits(d: DecodeState) -> bool:
        return (
            d.credit.free_blocks >= DEMAND.blocks + d.asked_blocks
            and d.credit.free_places >= DEMAND.places + d.asked_places
        )

    possible = {
        Choice(p, d.worker_id)
        for d in decodes
        if fits(d)
        for p in (
            {None}
            if d.prefills or local >= DEMAND.tokens
            else {p.worker_id for p in prefills if (p.worker_id, d.worker_id) in pairs and p.queued_tokens <= 4096}
        )
    }
    choice = pick(decodes, prefills, pairs=pairs, local=local)
    assert choice in possible if possible else choice is None
    if choice is not None:
        load = {d.worker_id: d.credit.running + d.asked_places for d in decodes}
        assert load[choice.decode_worker_id] == min(load[c.decode_worker_id] for c in possible)


def test_the_prefill_worker_that_would_be_done_first() -> None:
    """A cached prefix is worth its tokens of queue, and no more."""
    decodes = [decode("d0")]
    demand = Demand(blocks=70, places=1, tokens=1100)
    cached = prefill("p0", 900, cached_tokens=1024)
    assert pick(decodes, [cached, prefill("p1", 0)], demand=demand) == Choice("p0", "d0")
    assert pick(decodes, [cached._replace(queued_tokens=1100), prefill("p1", 0)], demand=demand) == Choice("p1", "d0")


@pytest.mark.parametrize("prefills,worth", [(False, 1), (True, 4)])
def test_a_cached_prompt_is_worth_a_few_sequences(prefills: bool, worth: int) -> None:
    """Or a prefix that all requests share would send them all to one worker."""
    for lead, chosen in ((worth - 1, "d0"), (worth + 1, "d1")):
        warm = decode("d0", running=2 + lead, cached_tokens=DEMAND.tokens, prefills=prefills)
        assert pick([warm, decode("d1", running=2, prefills=prefills)], IDLE).decode_worker_id == chosen  # type: ignore[union-attr]


def test_a_prompt_that_decode_has_cached_is_prefilled_there() -> None:
    decodes = [decode("d0", cached_tokens=48)]
    assert pick(decodes, IDLE, local=12) == Choice(None, "d0")
    assert pick(decodes, IDLE, local=11) == Choice("p0", "d0")
