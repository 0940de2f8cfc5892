"""The decode side: grants leases, receives KV blocks, runs the batch, sends tokens.

The lease table decides everything; this class carries out what it says. Colocated serving is this
same class with leases that name no prefill worker: the engine prefills them itself.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import numpy as np

from pdray.actors.worker import Worker
from pdray.cluster.lease import LeaseTable
from pdray.cluster.messages import (
    AnyMessage,
    BeginPut,
    CloseLease,
    Credit,
    CreditUpdate,
    LeaseRequest,
    LegKey,
    LegTokens,
    PutAborted,
    PutDone,
    RenewLeases,
    Tokens,
    WorkerInfo,
)
from pdray.cluster.session import Session
from pdray.config import Config
from pdray.engine.request import LayerGroupReady, RequestUpdate
from pdray.errors import HandshakeError
from pdray.kernels.kv_store import scatter_blocks
from pdray.transfer.channel import Put
from pdray.transfer.object_store import array_to_blocks


class DecodeWorker(Worker):
    """See the module. Everything runs on the event loop's thread but the engine's steps."""

    def __init__(
        self, config: Config, worker_id: str, incarnation: str, secret: bytes, node_id: str, host: str
    ) -> None:
        super().__init__(config, worker_id, incarnation, secret, node_id, host)
        self.role: Literal["decode", "both"] = "both" if config.mode == "colocated" else "decode"
        self._put_tails: dict[LegKey, float] = {}

    async def start(self) -> WorkerInfo:
        info = await super().start()
        self.leases = LeaseTable(self.engine, self._credit, self.config.lease_timeout_s)
        self._expiry = asyncio.create_task(self._expire_leases(), name="expire-leases")
        return info

    async def stop(self) -> None:
        if not self._stopped.is_set():
            self._expiry.cancel()
            self._send(self.leases.close_all(self._now(), "the worker is stopping"))
        await super().stop()

    def _credit(self) -> Credit:
        stats = self.engine.stats()
        return Credit(
            free_blocks=stats.free_blocks,
            free_places=stats.free_places,
            running=stats.running,
            waiting=stats.waiting,
            leases=stats.running + stats.waiting + stats.reserved,
        )

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(self.config.lease_timeout_s / 8)
            self._act(self.leases.expire(self._now()))

    # channels

    async def accept(self, prefill: WorkerInfo, epoch: int) -> None:
        """A prefill worker will push in this epoch from now on.

        Raises:
            HandshakeError: it holds other weights, or lays its blocks out differently.
        """
        if prefill.fingerprint != self.info.fingerprint:
            raise HandshakeError(
                f"{prefill.worker_id} ({prefill.fingerprint}) and {self.worker_id} ({self.info.fingerprint}) differ in "
                "weights, dtype, block size or KV layout; start both from one configuration"
            )
        self._act(self.leases.set_epoch(self._now(), prefill.worker_id, prefill.incarnation, epoch))

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        """That process was seen dead: nothing can write on its behalf any more."""
        self._act(self.leases.worker_gone(self._now(), worker_id, incarnation))

    async def receive_blocks(
        self,
        worker_id: str,
        epoch: int,
        key: tuple[str, int],
        layers: tuple[int, int],
        destination_blocks: list[int],
        array: np.ndarray[Any, Any],
    ) -> bool:
        """The object store channel's receiving end: the array holds the blocks of these layers."""
        put = Put(LegKey(*key), range(*layers), [], destination_blocks)
        return self.receive(worker_id, epoch, put, array_to_blocks(array, self.engine.kv.dtype))

    def receive(self, worker_id: str, epoch: int, put: Put, blocks: Any) -> bool:
        """See pdray.transfer.channel.BlockSink."""
        key = LegKey(*put.key)  # type: ignore[misc]
        if not self.leases.may_write(key, worker_id, epoch):
            return False
        scatter_blocks(self.engine.kv, put.layers, put.destination_blocks, blocks)
        self._act(self.leases.put_received(self._now(), key))
        return True

    # sessions

    def on_open(self, session: Session) -> None:
        super().on_open(session)
        self._send(self.leases.worker_link_restored(self._now(), session.peer.id))

    def on_message(self, session: Session, message: AnyMessage) -> None:
        now, peer = self._now(), session.peer.id
        match message:
            case LeaseRequest():
                self._act(self.leases.request(now, peer, message))
            case RenewLeases():
                self.leases.renew(now, peer, message.keys)
                session.send(CreditUpdate(self._credit()))
            case CloseLease():
                self._act(self.leases.close(now, message.key, message.reason))
            case BeginPut():
                self._act(self.leases.begin_put(now, peer, message))
            case PutDone():
                self._put_tails[message.key] = message.put_tail
                self._act(self.leases.put_done(now, peer, message))
            case PutAborted():
                self._act(self.leases.put_aborted(now, peer, message.key))
            case _:
                raise TypeError(f"{self.worker_id} takes no {type(message).__name__} (from {peer})")

    def on_closed(self, session: Session, reason: str) -> None:
        super().on_closed(session, reason)
        if session.peer.id.startswith("router"):
            self._act(self.leases.router_gone(self._now(), session.peer.id))
