"""The prefix hashes that a worker has told its routers, kept so that no single step of telling takes long.

Half a million hashes are copied, packed or rehashed in tens to hundreds of milliseconds. Here they lie in small sets,
changed in place and sent in parts, between which the event loop goes on and the sets may change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from pdray.wire.worker_news import PrefixUpdate, pack_hashes

NUM_SETS = 1024
PART = 4096  # hashes in one message, or little more


class ToldPrefixes:
    """Short hashes: uniform, so that any of their bits choose a set."""

    def __init__(self) -> None:
        self._sets: list[set[int]] = [set() for _ in range(NUM_SETS)]

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def tell(self, added: Iterable[int], removed: Iterable[int]) -> Iterator[PrefixUpdate]:
        """Changes, none of which is in both, as messages to every router that knows of this cache."""
        more, fewer = iter(added), iter(removed)
        while True:
            coming, going = list(islice(more, PART)), list(islice(fewer, PART))
            if not coming and not going:
                return
            for short in going:
                self._sets[short % NUM_SETS].discard(short)
            for short in coming:
                self._sets[short % NUM_SETS].add(short)
            yield PrefixUpdate(pack_hashes(coming), pack_hashes(going))

    def tell_all(self) -> Iterator[PrefixUpdate]:
        """All of it, to a new router, which also gets what tell() says from the first message on: whatever changes
        between two messages is then told, and a part that repeats it does no harm."""
        part: list[int] = []
        is_first = True
        for i, hashes in enumerate(self._sets):
            part += hashes
            if len(part) >= PART or (part and i == NUM_SETS - 1):
                yield PrefixUpdate(pack_hashes(part), is_all=is_first)
                part, is_first = [], False
