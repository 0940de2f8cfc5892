"""Asks whether workers that seem well can serve: a request of two tokens through each pair, when nothing else is asked.

A worker answers heartbeats while its engine, or the channel to its peer, does nothing any more. Real requests notice
that; a probe does so before them. It takes one block for a moment, in the last place of the batch, and is no request of
anybody's: it is not counted, and a worker that has no room for it is busy and not broken.

    idle ──start──▶ between ──next──▶ asking ──served, busy, failed or too late──▶ between … idle

Pure: time is passed in, effects are appended to `out`. Single-threaded.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from pdray.control.effects import Send
from pdray.control.pair_health import BrokenPair
from pdray.router.effects import ProbesDone, ReportBroken, RouterEffect, TickAt
from pdray.router.leg import Leg
from pdray.router.link import WorkerLink
from pdray.router.request import Request
from pdray.router.workers import Workers
from pdray.sampling_params import SamplingParams
from pdray.wire.lease_messages import CloseLease, LeaseClosed, LeaseDenied, LeaseGranted, LegTokens
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import Role
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, PrefillFailed

logger = logging.getLogger(__name__)

PROMPT = [0]
NUM_TOKENS = 2  # the first from prefill, the second from decode
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LAST = 2**31 - 1  # priority
FAILURES_OF_ONE = 2  # a worker that does both has no channel to open anew: it is asked once more


@dataclass(slots=True)
class _Probe:
    """One probe under way.

    Attributes:
        epoch: of the pair's channel; 0 for a worker that does both.
    """

    leg: Leg
    prefill_id: str | None
    decode: WorkerLink
    epoch: int
    ends_at: float
    num_tokens: int = 0

    @property
    def decode_id(self) -> str:
        return self.decode.info.worker_id


class PairProbe:
    """Probes every pair once in each round, one after the other, as long as there is nothing else to do.

    Args:
        timeout_s: a probe that takes longer has failed.
    """

    def __init__(self, router_id: str, workers: Workers, out: list[RouterEffect], timeout_s: float) -> None:
        self._router_id = router_id
        self._workers = workers
        self._out = out
        self._timeout_s = timeout_s
        self._number = 0
        self._round: deque[tuple[str | None, str]] | None = None  # who is still to be probed
        self._probe: _Probe | None = None
        self._broken_pairs: dict[tuple[str, str], BrokenPair] = {}
        self._num_failed: dict[str, int] = {}  # in a row, by incarnation of a worker that does both

    # rounds

    def start(self) -> None:
        """Begin a round; one that is under way is given up.

        What was broken before and is not mended yet is reported again: the Coordinator may have been away.
        """
        self._close()
        self._report_broken()
        both = (link.info.worker_id for link in self._workers.open_links(Role.BOTH))
        self._round = deque([*((None, worker_id) for worker_id in both), *self._workers.pairs])

    def next(self, now: float, *, idle: bool) -> None:
        """Begin the next probe of a round, or end the round, if none is under way.

        Args:
            idle: this router has no requests.
        """
        if self._round is None or self._probe is not None:
            return
        while self._round:
            prefill_id, decode_id = self._round.popleft()
            link = self._workers.links.get(decode_id)
            if not idle or link is None or not link.is_open or link.credit.running + link.credit.waiting:
                break
            if prefill_id is None or (prefill_id, decode_id) in self._workers.pairs:
                self._ask(now, prefill_id, link)
                return
        self._round = None
        self._out.append(ProbesDone())

    def _ask(self, now: float, prefill_id: str | None, decode: WorkerLink) -> None:
        self._number += 1
        request = Request(f"probe-{self._router_id}-{self._number}", None, PROMPT, PARAMS, LAST, None, now)
        decode_id = decode.info.worker_id
        epoch = 0 if prefill_id is None else self._workers.pairs[prefill_id, decode_id]
        self._probe = probe = _Probe(request.start(), prefill_id, decode, epoch, now + self._timeout_s)
        self._out += [Send(decode_id, probe.leg.lease_request(prefill_id)), TickAt(probe.ends_at)]

    # the probe under way

    def leases(self) -> list[tuple[str, LegKey]]:
        """The lease that it asks for or holds, if any, after its decode worker."""
        return [] if self._probe is None else [(self._probe.decode_id, self._probe.leg.key)]

    def is_about(self, key: LegKey) -> bool:
        """Whether a message with this key is about the probe."""
        return self._probe is not None and key == self._probe.leg.key

    def receive(self, message: AnyMessage | LegTokens) -> None:
        """A worker's message about it."""
        assert self._probe is not None
        probe = self._probe
        match message:
            case LeaseGranted(num_cached_tokens=num_cached):
                if probe.prefill_id is not None:
                    ask = probe.leg.prefill_request(probe.decode_id, probe.epoch, num_cached)
                    self._out.append(Send(probe.prefill_id, ask))
            case LeaseDenied():
                self._close()
            case LeaseClosed(reason=reason) | PrefillFailed(reason=reason):
                self._failed(probe, reason)
            case FirstTokens():
                pass  # only what the decode worker says shows that it has the blocks
            case LegTokens(tokens=tokens):
                probe.num_tokens = max([probe.num_tokens, *(token.position + 1 for token in tokens)])
                if probe.num_tokens >= NUM_TOKENS:
                    self._served(probe)

    def tick(self, now: float) -> None:
        """A probe that takes too long has failed."""
        if self._probe is not None and now >= self._probe.ends_at:
            self._failed(self._probe, f"nothing came within {self._timeout_s:g} s")

    def _served(self, probe: _Probe) -> None:
        self._num_failed.pop(probe.decode.info.incarnation, None)
        probe.decode.broken = False
        self._close()

    def _failed(self, probe: _Probe, reason: str) -> None:
        self._close()
        pair = (probe.prefill_id or "", probe.decode_id)
        if self._workers.links.get(probe.decode_id) is not probe.decode or not probe.decode.is_open:
            return  # its death is seen to by others
        if probe.prefill_id is None:
            self._one_failed(probe, reason)
        elif self._workers.pairs.get(pair) == probe.epoch:
            self._workers.mark_broken(*pair)
            self._broken(BrokenPair(*pair, probe.epoch, probe.decode.info.incarnation, reason))

    def _one_failed(self, probe: _Probe, reason: str) -> None:
        incarnation, name = probe.decode.info.incarnation, probe.decode_id
        number = self._num_failed[incarnation] = self._num_failed.get(incarnation, 0) + 1
        if number < FAILURES_OF_ONE:
            logger.warning("%s: %s did not serve a probe: %s", self._router_id, name, reason)
            return
        probe.decode.broken = True
        self._broken(BrokenPair(name, name, number, incarnation, reason))

    def _broken(self, pair: BrokenPair) -> None:
        self._broken_pairs[pair[:2]] = pair
        logger.error("%s: %s and %s do not serve: %s", self._router_id, *pair[:2], pair.reason)
        self._report_broken()

    def _report_broken(self) -> None:
        links, broken = self._workers.links, self._workers.broken
        self._broken_pairs = {
            ids: pair
            for ids, pair in self._broken_pairs.items()
            if broken.get(ids) == pair.epoch or (pair.decode_worker_id in links and links[pair.decode_worker_id].broken)
        }
        if self._broken_pairs:
            self._out.append(ReportBroken(list(self._broken_pairs.values())))

    def _close(self) -> None:
        """Whatever came of it, its workers are told that it is over."""
        probe, self._probe = self._probe, None
        if probe is None:
            return
        if probe.prefill_id is not None:
            self._out.append(Send(probe.prefill_id, CancelPrefill(*probe.leg.key)))
        self._out.append(Send(probe.decode_id, CloseLease(*probe.leg.key, "the probe is over")))
