"""Which rank of one worker sends which heads to which rank of another. Pure."""

from __future__ import annotations

from typing import NamedTuple

from pdray.models.shards import Span, kv_heads_of


class Route(NamedTuple):
    """Heads of keys and values that one rank sends to another.

    Attributes:
        source, target: ranks of the two workers.
        heads: of the model, from first to last.
        source_heads, target_heads: the same, of those that the one has and the other is to have.
    """

    source: int
    target: int
    heads: Span
    source_heads: Span
    target_heads: Span


def head_routes(num_kv_heads: int, num_sources: int, num_targets: int) -> list[Route]:
    """Every head that a rank of the target is to have comes to it once.

    Where several ranks hold the same heads, which are then one, each of those that want them has another sender as far
    as there are so many.

    Args:
        num_sources, num_targets: ranks of the two workers; see kv_heads_of() for what each has.
    """
    have = [kv_heads_of(num_kv_heads, rank, num_sources) for rank in range(num_sources)]
    want = [kv_heads_of(num_kv_heads, rank, num_targets) for rank in range(num_targets)]
    routes = []
    for target, wanted in enumerate(want):
        twins = [rank for rank in range(target) if want[rank] == wanted]
        for had in dict.fromkeys(have):
            shared = _shared(had, wanted)
            if shared.size > 0:
                senders = [rank for rank, span in enumerate(have) if span == had]
                source = senders[len(twins) % len(senders)]
                routes.append(Route(source, target, shared, _within(shared, had), _within(shared, wanted)))
    return routes


def _shared(one: Span, other: Span) -> Span:
    return Span(max(one.start, other.start), min(one.stop, other.stop), one.whole)


def _within(heads: Span, all_heads: Span) -> Span:
    return Span(heads.start - all_heads.start, heads.stop - all_heads.start, all_heads.size)
