"""The decode side: grants leases, receives KV blocks, runs the batch, sends tokens.

The lease table decides everything; this class carries out what it says. Colocated serving is this
same class with leases that name no prefill worker: the engine prefills them itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pdray.actors.worker import Worker
from pdray.cluster.effects import Send
from pdray.cluster.lease import LeaseTable
from pdray.cluster.messages import (
    AnyMessage,
    BeginPut,
    ChannelOffer,
    CloseLease,
    Credit,
    CreditUpdate,
    EndCompletion,
    LeaseDenied,
    LeaseRequest,
    LegKey,
    LegTokens,
    OpenChannel,
    PutAborted,
    PutDone,
    RenewLeases,
    Staged,
    Tokens,
    WorkerInfo,
)
from pdray.cluster.session import Session
from pdray.config import Config
from pdray.engine.request import LayerGroupReady, RequestUpdate
from pdray.errors import HandshakeError
from pdray.transfer.channel import Put
from pdray.transfer.choose import choose_channel
from pdray.transfer.communicator import RECEIVER_RANK
from pdray.transfer.pending_writes import PendingWrites

if TYPE_CHECKING:
    from pdray.transfer.nccl_receiver import NcclReceiver
    from pdray.transfer.object_store import ObjectStoreReceiver


class DecodeWorker(Worker):
    """See the module. Everything runs on the event loop's thread but the engine's steps and the channels' copies."""

    def __init__(self, config: Config, worker_id: str, incarnation: str, secret: bytes) -> None:
        super().__init__(config, worker_id, incarnation, secret)
        self._waiting_routers: set[str] = set()  # were denied, and hear of credit that comes back
        self._writes = PendingWrites()
        self._receiver: NcclReceiver | None = None
        self._object_store: ObjectStoreReceiver
        self._offered: dict[str, tuple[int, Any]] = {}  # epoch and communicator's id, by prefill worker
        self.role: Literal["decode", "both"] = "both" if config.mode == "colocated" else "decode"

    async def start(self) -> WorkerInfo:
        from pdray.transfer.object_store import ObjectStoreReceiver

        info = await super().start()
        self.leases = LeaseTable(self.engine, self._credit, self.config.lease_timeout_s)
        self._object_store = ObjectStoreReceiver(self.engine.kv, self, self._writes)
        if self.transport is not None and self._stagings:
            from pdray.transfer.nccl_receiver import NcclReceiver
            from pdray.transfer.staging import Staging

            self._receiver = NcclReceiver(
                Staging(self.engine.kv, self._stagings[0]),
                self.transport.new_stream,
                self,
                self._writes,
                name=self.worker_id,
                timeout_s=self.config.worker_timeout_s,
                on_fatal=self._fail,
            )
        self._tasks.keep_running("expire leases", self._expire_leases)
        return info

    async def stop(self) -> None:
        if not self._stopped.is_set():
            self._send(self.leases.close_all("the worker is stopping"))
            if self._receiver is not None:
                await self._receiver.close()
            await asyncio.to_thread(self._object_store.close)
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
            self._send(self.leases.expire(self._now()))
            self._announce_credit()

    # channels

    async def accept(self, prefill: WorkerInfo, epoch: int) -> ChannelOffer:
        """A prefill worker will push in this epoch from now on.

        Raises:
            HandshakeError: it holds other weights, or lays its blocks out differently.
            ConfigError: the channel that is configured cannot join the two.
        """
        if prefill.fingerprint != self.info.fingerprint:
            raise HandshakeError(
                f"{prefill.worker_id} ({prefill.fingerprint}) and {self.worker_id} ({self.info.fingerprint}) differ in "
                "weights, dtype, block size or KV layout; start both from one configuration"
            )
        kind = choose_channel(self.config, prefill, self.info)
        if self._receiver is not None:
            await self._receiver.close_link(prefill.worker_id)
        await self._writes.settle()
        self._writers[prefill.incarnation] = prefill
        self._send(self.leases.set_writer(prefill.worker_id, prefill.incarnation, epoch))
        if kind == "object_store":
            return ChannelOffer(kind)
        assert self.transport is not None and self._receiver is not None
        unique_id = await asyncio.to_thread(self.transport.make_unique_id)
        self._offered[prefill.worker_id] = (epoch, unique_id)
        return ChannelOffer(kind, unique_id, self._receiver.piece_bytes)

    def _open_channel(self, session: Session, epoch: int) -> None:
        """The prefill worker enters the communicator that accept() has offered; so does this one."""
        transport, peer = self.transport, session.peer.id
        offered, unique_id = self._offered.pop(peer, (None, None))
        if offered == epoch and transport is not None and self._receiver is not None:
            connect = partial(transport.connect, unique_id, RECEIVER_RANK)
            self._tasks.spawn(self._receiver.join(peer, epoch, connect, session.send))

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        """That process was seen dead: nothing can write on its behalf any more, once what had arrived is written."""
        if self._receiver is not None:
            session = self.sessions.get(worker_id)
            if session is None or session.peer.incarnation == incarnation:
                await self._receiver.close_link(worker_id)
        await self._writes.settle()
        self._writers.pop(incarnation, None)
        self._send(self.leases.worker_gone(worker_id, incarnation))

    def _num_stagings(self) -> int:
        return 1

    def _live_keys(self) -> set[Hashable]:
        return set(self.leases.keys())

    def _epochs(self) -> dict[str, int]:
        return self.leases.epochs()

    async def describe(self) -> dict[str, Any]:
        return await super().describe() | {"leases": [info._asdict() for info in self.leases.leases(self._now())]}

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
        return await self._object_store.receive(worker_id, epoch, put, array)

    def may_write(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        """See pdray.transfer.channel.BlockSink, as the next one."""
        return self.leases.may_write(LegKey(*key), worker_id, epoch)  # type: ignore[misc]

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        if not self.may_write(key, worker_id, epoch):
            return False
        self._send(self.leases.put_received(self._now(), LegKey(*key)))  # type: ignore[misc]
        return True

    def _put_aborted(self, peer: str, key: LegKey) -> None:
        """The writer has stopped; a piece that it had brought may still be on its way into the pool."""

        def free() -> None:
            self._send(self.leases.put_aborted(peer, key))
            self._announce_credit()

        self._writes.when_done(key, free)

    # sessions

    def on_open(self, session: Session) -> None:
        super().on_open(session)
        self._send(self.leases.link_restored(session.peer.id))

    def on_message(self, session: Session, message: AnyMessage) -> None:
        now, peer = self._now(), session.peer.id
        match message:
            case LeaseRequest():
                effects = self.leases.request(now, peer, message)
                self._send(effects)
                if any(isinstance(e.message, LeaseDenied) and e.message.retriable for e in effects):
                    self._waiting_routers.add(peer)
            case RenewLeases():
                self.leases.renew(now, peer, message.keys)
                session.send(CreditUpdate(self._credit()))
            case CloseLease():
                self._send(self.leases.close(message.key))
                self._announce_credit()
            case EndCompletion():
                self.engine.end_completion(message.key, message.index)
            case BeginPut():
                self._send(self.leases.begin_put(peer, message))
            case PutDone():
                self._send(self.leases.put_done(now, peer, message))
            case PutAborted():
                self._put_aborted(peer, message.key)
            case OpenChannel():
                self._open_channel(session, message.epoch)
            case Staged():
                if self._receiver is not None:
                    self._receiver.on_staged(peer, message)
            case _:
                raise TypeError(f"{self.worker_id} takes no {type(message).__name__} (from {peer})")

    def on_closed(self, session: Session, reason: str) -> None:
        is_current = self.sessions.get(session.peer.id) is session
        super().on_closed(session, reason)
        if self._receiver is not None and is_current:
            self._tasks.spawn(self._receiver.close_link(session.peer.id))
        self._send(self.leases.router_gone(session.peer.id))
        self._waiting_routers.discard(session.peer.id)

    # engine

    def _on_updates(self, updates: list[RequestUpdate]) -> None:
        """One message to each router that this step has news for."""
        by_router: dict[str, list[LegTokens]] = {}
        for update in updates:
            key = LegKey(*update.key)  # type: ignore[misc]
            router_id = self.leases.router_of(key)
            if router_id is not None and update.tokens:
                by_router.setdefault(router_id, []).append(self._leg_tokens(key, update))
            if update.finished:
                self.leases.finished(key)
        credit = self._credit()
        self._send([Send(router_id, Tokens(legs, credit)) for router_id, legs in by_router.items()])
        self._waiting_routers -= by_router.keys()
        self._announce_credit()

    def _announce_credit(self) -> None:
        """Routers that were denied try again when there may be something for them."""
        if self._waiting_routers and (credit := self._credit()).free_places > 0:
            self._send([Send(router_id, CreditUpdate(credit)) for router_id in self._waiting_routers])
            self._waiting_routers.clear()

    def _leg_tokens(self, key: LegKey, update: RequestUpdate) -> LegTokens:
        if update.prefill is None and update.join_wait is None:  # nearly always, and for each sequence of each step
            return LegTokens(*key, update.tokens)
        transfer_wait = None
        if update.join_wait is not None:
            transfer_wait = update.join_wait + (self.leases.transfer_wait(key) or 0.0)
        return LegTokens(
            *key,
            update.tokens,
            num_cached_tokens=update.num_cached_tokens,
            prefill_queue=update.prefill_queue,
            prefill=update.prefill,
            transfer_wait=transfer_wait,
            first_decode_step=update.first_decode_step,
        )

    def _on_layer_group(self, ready: LayerGroupReady) -> None:
        raise AssertionError("a decode worker runs no prefill_only request")
