"""What a scheduler counts since its start."""

from __future__ import annotations

from typing import NamedTuple


class Counters(NamedTuple):
    """See EngineStats."""

    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
