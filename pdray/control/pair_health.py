"""Remedies for a prefill and a decode worker that live but cannot serve a request between them. Pure.

The first time their channel is opened anew. If they fail again after that, a worker is replaced: the one of the two
that fails with every partner it was tried with; where both do, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pdray.wire.cluster_view import ClusterView

FORGOTTEN_S = 300.0  # a failure so long ago has nothing to do with this one


class Reconnect(NamedTuple):
    """Open the pair's channel in a higher epoch."""

    prefill_worker_id: str
    decode_worker_id: str


class Replace(NamedTuple):
    """End this worker; another is started."""

    worker_id: str


class BrokenPair(NamedTuple):
    """Two workers that could not serve a request; one twice if it does both.

    Attributes:
        epoch: of their channel; of one worker, how often it has failed.
        incarnation: of the decode worker.
    """

    prefill_worker_id: str
    decode_worker_id: str
    epoch: int
    incarnation: str
    reason: str


@dataclass(slots=True)
class _Failures:
    epoch: int
    at: float
    number: int = 1


@dataclass(slots=True)
class PairHealth:
    """Failures of pairs, by their workers."""

    _failures: dict[tuple[str, str], _Failures] = field(default_factory=dict, init=False)

    def reported(self, now: float, pair: BrokenPair, view: ClusterView) -> Reconnect | Replace | None:
        """Take a router's report of a pair, or of a worker that does both. None if that is replaced already."""
        if pair.incarnation not in {info.incarnation for info in view.workers}:
            return None
        if pair.prefill_worker_id == pair.decode_worker_id:
            return Replace(pair.decode_worker_id)
        epochs = {(p.prefill_worker_id, p.decode_worker_id): p.epoch for p in view.pairs}
        if epochs.get(pair[:2]) != pair.epoch:
            return None
        return self.failed(now, pair[:2], pair.epoch, epochs)

    def failed(
        self, now: float, pair: tuple[str, str], epoch: int, connected: Iterable[tuple[str, str]]
    ) -> Reconnect | Replace | None:
        """A router could not serve a request through the pair. None: it is known, and being seen to.

        Args:
            epoch: of the channel that failed. connected: all pairs that are.
        """
        self._failures = {p: f for p, f in self._failures.items() if now - f.at <= FORGOTTEN_S}
        known = self._failures.get(pair)
        if known is not None and epoch <= known.epoch:
            return None
        if known is None:
            known = self._failures[pair] = _Failures(epoch, now)
        else:
            known.epoch, known.at, known.number = epoch, now, known.number + 1
        prefill, decode = pair
        if known.number == 1:
            return Reconnect(prefill, decode)
        well = {p for p in connected if p not in self._failures}
        prefill_works = any(p == prefill for p, _ in well)
        decode_works = any(d == decode for _, d in well)
        if prefill_works != decode_works:
            return Replace(decode if prefill_works else prefill)
        return Replace((prefill, decode)[known.number % 2])
