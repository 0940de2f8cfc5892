"""Asks whether workers that seem well can serve: a request of two tokens through each pair, when nothing else is asked.

A worker answers heartbeats while its engine, or the channel to its peer, does nothing any more. Real requests notice
that; a probe does so before them. It takes one block for a moment, in the last place of the batch, and is no request of
anybody's: it is not counted, and a worker that has no room for it is busy and not broken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pdray.router.connections import WorkerConnections
from pdray.sampling_params import SamplingParams
from pdray.wire.lease_messages import CloseLease, LeaseClosed, LeaseDenied, LeaseGranted, LeaseRequest, LegTokens
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, PrefillFailed, PrefillRequest

logger = logging.getLogger(__name__)

PROMPT = [0]
PARAMS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)  # the first from prefill, the second from decode
LAST = 2**31 - 1  # priority
FAILURES_OF_ONE = 2  # a worker that does both has no channel to open anew: it is asked once more


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


Report = Callable[[BrokenPair], Awaitable[None]]


class _Failed(Exception):
    """The pair could not do it."""


class _Busy(Exception):
    """Somebody else's work came first."""


class PairProbe:
    """Event loop's thread only.

    Args:
        is_idle: whether this router has no requests.
        report: called with each pair that fails, and again until it is mended.
        timeout_s: a probe that takes longer has failed.
    """

    def __init__(
        self,
        router_id: str,
        connections: WorkerConnections,
        is_idle: Callable[[], bool],
        report: Report | None,
        *,
        interval_s: float,
        timeout_s: float,
    ) -> None:
        self._router_id = router_id
        self._connections = connections
        self._is_idle = is_idle
        self._report = report
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._number = 0
        self._key: LegKey | None = None
        self._decode_id = ""
        self._messages: asyncio.Queue[AnyMessage | LegTokens] = asyncio.Queue()
        self._broken_pairs: dict[tuple[str, str], BrokenPair] = {}
        self._num_failed: dict[str, int] = {}  # in a row, by incarnation of a worker that does both

    async def run(self) -> None:
        """Probe every pair, again and again. Never returns."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.round()

    async def round(self) -> None:
        """Probe every pair once, one after the other, as long as there is nothing else to do.

        What was broken before and is not mended yet is reported again: the Coordinator may have been away.
        """
        await self._report_broken()
        for prefill_id, decode_id in self._candidates():
            if not self._may_probe(decode_id):
                return
            await self._probe(prefill_id, decode_id)

    def leases(self) -> dict[str, list[LegKey]]:
        """The lease that the probe holds, by decode worker."""
        return {} if self._key is None else {self._decode_id: [self._key]}

    def takes(self, message: AnyMessage | LegTokens) -> bool:
        """Whether a worker's message is about the probe; it is then seen to."""
        if self._key is None or getattr(message, "key", None) != self._key:
            return False
        self._messages.put_nowait(message)
        return True

    def _candidates(self) -> list[tuple[str | None, str]]:
        both: list[tuple[str | None, str]] = [
            (None, link.info.worker_id) for link in self._connections.open_links("both")
        ]
        return both + list(self._connections.pairs)

    def _may_probe(self, decode_id: str) -> bool:
        link = self._connections.links.get(decode_id)
        idle = link is not None and link.is_open and not link.credit.running + link.credit.waiting
        return idle and self._is_idle()

    async def _probe(self, prefill_id: str | None, decode_id: str) -> None:
        link = self._connections.links[decode_id]
        epoch = 0 if prefill_id is None else self._connections.pairs[prefill_id, decode_id]
        self._number += 1
        self._key, self._decode_id = LegKey(f"probe-{self._router_id}-{self._number}", 0), decode_id
        self._messages = asyncio.Queue()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._ask(self._key, prefill_id, decode_id, epoch)
        except (_Failed, TimeoutError) as error:
            if self._connections.links.get(decode_id) is not link or not link.is_open:
                return  # its death is seen to by others
            if prefill_id is not None and self._connections.pairs.get((prefill_id, decode_id)) != epoch:
                return
            await self._broken(prefill_id, decode_id, epoch, str(error) or f"nothing came within {self._timeout_s:g} s")
        except _Busy:
            pass
        else:
            self._num_failed.pop(link.info.incarnation, None)
            link.broken = False
        finally:
            if prefill_id is not None:
                self._connections.send(prefill_id, CancelPrefill(*self._key))
            self._connections.send(decode_id, CloseLease(*self._key, "the probe is over"))
            self._key = None

    async def _ask(self, key: LegKey, prefill_id: str | None, decode_id: str, epoch: int) -> None:
        send = self._connections.send
        send(decode_id, LeaseRequest(*key, PROMPT, PARAMS, [0], [], prefill_id, LAST))
        num_tokens = 0
        while True:
            match await self._messages.get():
                case LeaseGranted(num_cached_tokens=num_cached):
                    if prefill_id is not None:
                        ask = PrefillRequest(*key, PROMPT, PARAMS, [0], [], decode_id, epoch, num_cached, LAST)
                        send(prefill_id, ask)
                case LeaseDenied():
                    raise _Busy
                case LeaseClosed(reason=reason) | PrefillFailed(reason=reason):
                    raise _Failed(reason)
                case FirstTokens():
                    pass
                case LegTokens(tokens=tokens):
                    num_tokens = max([num_tokens, *(token.position + 1 for token in tokens)])
                    if num_tokens >= 2:
                        return

    async def _broken(self, prefill_id: str | None, decode_id: str, epoch: int, reason: str) -> None:
        link = self._connections.links[decode_id]
        if prefill_id is None:
            epoch = self._num_failed[link.info.incarnation] = self._num_failed.get(link.info.incarnation, 0) + 1
            if epoch < FAILURES_OF_ONE:
                logger.warning("%s: %s did not serve a probe: %s", self._router_id, decode_id, reason)
                return
            link.broken = True
        else:
            self._connections.mark_broken(prefill_id, decode_id)
        pair = BrokenPair(prefill_id or decode_id, decode_id, epoch, link.info.incarnation, reason)
        self._broken_pairs[pair[:2]] = pair
        logger.error("%s: %s and %s do not serve: %s", self._router_id, *pair[:2], reason)
        await self._report_broken()

    async def _report_broken(self) -> None:
        links, broken = self._connections.links, self._connections.broken
        self._broken_pairs = {
            ids: pair
            for ids, pair in self._broken_pairs.items()
            if broken.get(ids) == pair.epoch or (pair.decode_worker_id in links and links[pair.decode_worker_id].broken)
        }
        if self._report is not None:
            for pair in self._broken_pairs.values():
                await self._report(pair)
