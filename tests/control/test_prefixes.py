"""What routers know of a prefix cache is what it holds, whenever they come and however much changes."""

from __future__ import annotations

import random

from pdray.control import prefixes
from pdray.control.prefixes import NUM_SETS, PART, ToldPrefixes
from pdray.wire.worker_news import PrefixUpdate, unpack_hashes


class KnowingRouter:
    """As WorkerLink does it."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def take(self, update: PrefixUpdate) -> None:
        if update.is_all:
            self.known.clear()
        self.known -= set(unpack_hashes(update.removed))
        self.known |= set(unpack_hashes(update.added))
        assert len(update.added) + len(update.removed) <= 8 * (2 * PART + 200), "a message without bounds"


def test_routers_that_come_in_the_midst_of_changes_know_all() -> None:
    rng = random.Random(5)
    told, there, held = ToldPrefixes(), KnowingRouter(), set[int]()
    late: list[tuple[KnowingRouter, object]] = []
    done: list[KnowingRouter] = []
    for round_number in range(30):
        removed = set(rng.sample(sorted(held), len(held) // 3))
        added = {rng.getrandbits(64) for _ in range(rng.choice([0, 3, 2 * PART + 5]))} - held
        held = (held - removed) | added
        for update in told.tell(added, removed):
            for router in (there, *(router for router, _ in late), *done):
                router.take(update)
            for router, parts in list(late):  # in parts, with changes in between
                if (part := next(parts, None)) is not None:  # type: ignore[call-overload]
                    router.take(part)
                else:
                    late.remove((router, parts))
                    done.append(router)
            if round_number % 5 == 2:
                router, parts = KnowingRouter(), told.tell_all()
                if (part := next(parts, None)) is not None:
                    router.take(part)
                late.append((router, parts))
        assert there.known == held and len(told) == len(held)
        assert all(router.known == held for router in done)
    for router, parts in late:
        for part in parts:  # type: ignore[attr-defined]
            router.take(part)
        assert router.known == held
    assert len(done) > 5


def test_a_few_hashes_are_one_message_and_none_are_none() -> None:
    told = ToldPrefixes()
    assert list(told.tell(set(), set())) == [] and list(told.tell_all()) == []
    (update,) = told.tell({1, 2}, {3})
    assert (update.is_all, set(unpack_hashes(update.added)), unpack_hashes(update.removed)) == (False, {1, 2}, [3])
    (whole,) = told.tell_all()
    assert whole.is_all and set(unpack_hashes(whole.added)) == {1, 2}


def test_no_set_is_large() -> None:
    """Changing one copies or rehashes no more than its share."""
    told = ToldPrefixes()
    rng = random.Random(1)
    list(told.tell({rng.getrandbits(64) for _ in range(20 * NUM_SETS)}, set()))
    assert max(map(len, told._sets)) < 60 and len(told._sets) == prefixes.NUM_SETS
