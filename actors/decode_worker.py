"""The decode side: grants leases, receives KV blocks, runs the batch, sends tokens.

The lease table decides everything; this class carries out what it says. Colocated serving is this
same class with leases that name no prefill worker: the engine prefills them itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pdray.actors.told_late import ToldLate
from pdray.actors.worker import Worker
from pdray.config import Config
from pdray.control.credit import CreditWaiters
from pdray.control.effects import Send
from pdray.control.lease_table import LeaseTable
from pdray.control.losses import blame
from pdray.engine.request import LayerGroupReady, RequestUpdate
from pdray.errors import HandshakeError
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.registry import choose_kind
from pdray.wire.cluster_view import ChannelOffer, WorkerInfo
from pdray.wire.lease_messages import CloseLease, Credit, EndCompletion, LeaseRequest, LegTokens, RenewLeases, Tokens
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import Role
from pdray.wire.put_messages import BeginPut, ChannelMessage, PutAborted, PutDone
from pdray.wire.session import Session

if TYPE_CHECKING:
    from pdray.transfer.channel import Receiver


class DecodeWorker(Worker):
    """See the module. Everything runs on the event loop's thread but the engine's steps and the channels' copies."""

    def __init__(
        self, config: Config, worker_id: str, incarnation: str, secret: bytes, *, app_name: str = "local"
    ) -> None:
        super().__init__(config, worker_id, incarnation, secret, app_name=app_name)
        self._waiters = CreditWaiters()
        self._told_late = ToldLate()
        self._writes = PendingWrites()
        self._receivers: dict[str, Receiver] = {}  # by kind of channel
        self._failures_by_kind: dict[str, dict[str, str]] = {}  # that were seen, by prefill worker's incarnation
        self.role = Role.BOTH if config.mode == "colocated" else Role.DECODE

    async def start(self) -> WorkerInfo:
        info = await super().start()
        self.leases = LeaseTable(self.engine, self._credit, self.config.lease_timeout_s, self.engine.block_size)
        self._tasks.keep_running("expire leases", self._expire_leases)
        return info

    async def stop(self) -> None:
        if not self._stopped.is_set():
            self._send(self.leases.close_all("the worker is stopping"))
            for receiver in self._receivers.values():
                await receiver.close()
        await super().stop()

    def _credit(self) -> Credit:
        room = self.engine.room()
        grants = not room.preempted  # see Engine.reserve()
        return Credit(
            free_blocks=room.free_blocks if grants else 0,
            free_places=room.free_places if grants else 0,
            running=room.running,
            waiting=room.waiting,
            leases=len(self.leases.keys()),
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
        if prefill.lender not in ("", self.incarnation):
            raise HandshakeError(
                f"{prefill.worker_id} computes in the memory of {prefill.lender}, and this is {self.incarnation}; "
                "it must end with that one"
            )
        failures = self._failures_of(prefill)
        kind, passed_over = choose_kind(self.config.channel, prefill, self.info, failures)
        await self._close_links(prefill.worker_id)
        self._writers[prefill.incarnation] = prefill
        writer = prefill.worker_id, prefill.incarnation, epoch
        self._send(self.leases.set_writer(*writer, is_guest=bool(prefill.lender)))
        if kind not in self._receivers:
            self._receivers[kind] = self.kinds[kind].make_receiver(self, self._writes)
        return ChannelOffer(kind, await self._receivers[kind].accept(prefill.worker_id, epoch), passed_over)

    def _failures_of(self, prefill: WorkerInfo) -> dict[str, str]:
        """Kinds of channel that were tried with that process, and why they do not work."""
        failures = self._failures_by_kind.setdefault(prefill.incarnation, {})
        for kind, receiver in self._receivers.items():
            reason = receiver.take_failure(prefill.worker_id)
            if reason is not None:
                failures[kind] = reason
        return failures

    def _close_links(self, worker_id: str) -> Coroutine[Any, Any, None]:
        """End that prefill worker's channel. Its messages are ignored at once; writes on its behalf have ended when the
        coroutine returns."""
        closing = asyncio.gather(*(receiver.close_link(worker_id) for receiver in self._receivers.values()))

        async def settle() -> None:  # may be cancelled before it begins
            await closing
            await self._writes.settle()

        return settle()

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        """A prefill worker's process was seen dead: finish the writes that had arrived, then free its leases."""
        session = self.sessions.get(worker_id)
        if session is None or session.peer.incarnation == incarnation:
            await self._close_links(worker_id)
        await self._writes.settle()
        for receiver in self._receivers.values():
            receiver.take_failure(worker_id)
        self._failures_by_kind.pop(incarnation, None)
        self._writers.pop(incarnation, None)
        self._send(self.leases.worker_gone(worker_id, incarnation))
        self._announce_credit()

    def _live_keys(self) -> set[Hashable]:
        return set(self.leases.keys())

    def _epochs(self) -> dict[str, int]:
        return self.leases.epochs()

    async def describe(self) -> dict[str, Any]:
        return await super().describe() | {"leases": [info._asdict() for info in self.leases.leases(self._now())]}

    async def receive_array(
        self, kind: str, worker_id: str, epoch: int, payload: bytes, array: np.ndarray[Any, Any]
    ) -> bool:
        """Receive an array that a prefill worker's channel sends; see pdray.transfer.channel.Link.call."""
        return await self._receivers[kind].on_array(worker_id, epoch, payload, array)

    def resolve(self, key: Hashable, worker_id: str, epoch: int, layers: range, positions: range) -> list[int] | None:
        """See pdray.transfer.channel.Sink, as the next two."""
        leg = LegKey(*key)  # type: ignore[misc]
        blocks = self.leases.resolve(leg, worker_id, epoch, positions)
        if blocks is not None and self.engine.pool.layout.holds_layers(layers):
            return blocks
        if self.leases.may_write(leg, worker_id, epoch):
            what = f"blocks {positions.start} to {positions.stop} of layers {layers.start} to {layers.stop}"
            self._send(self.leases.refuse(leg, f"{worker_id} put {what}, which the lease does not hold"))
        return None

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        leg = LegKey(*key)  # type: ignore[misc]
        if not self.leases.may_write(leg, worker_id, epoch):
            return False
        self._send_later(self.leases.put_received(self._now(), leg))
        if self.leases.may_write(leg, worker_id, epoch):
            self.engine.expect(leg)
        self._announce_credit()
        return True

    def is_connected(self, worker_id: str) -> bool:
        session = self.sessions.get(worker_id)
        return session is not None and session.connected

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
                self._send(self.leases.request(now, peer, message))
                self._announce_credit()  # an older attempt may have ended
            case RenewLeases():
                self.leases.renew(now, peer, message.keys)
                self._send([self._waiters.renewed(peer, message.wanted, self._credit())])
            case CloseLease():
                self._send(self.leases.close(message.key))
                self._announce_credit()
            case EndCompletion():
                self.engine.end_completion(message.key, message.index)
            case BeginPut():
                effects = self.leases.begin_put(peer, message)
                for receiver in self._receivers.values():  # ahead of the reply
                    receiver.let_in(message.key, peer, message.epoch, self.leases.writable(message.key))
                self._send(effects)
                if self.leases.may_write(message.key, peer, message.epoch):
                    self.engine.expect(message.key)
            case PutDone():
                self._send_later(self.leases.put_done(now, peer, message))
                self._announce_credit()
            case PutAborted():
                self._put_aborted(peer, message.key)
            case ChannelMessage():
                send = partial(self._send_on_channel, session, message.kind, message.epoch)
                self._receivers[message.kind].on_message(peer, message.epoch, message.payload, send)
            case _:
                raise TypeError(f"{self.worker_id} takes no {type(message).__name__} (from {peer})")

    def _send_later(self, sends: Sequence[Send]) -> None:
        """Send what a lease's start has brought about once the engine is woken, which somebody waits for."""
        if sends:
            self._loop.call_soon(self._send, sends)

    def on_closed(self, session: Session, reason: str) -> None:
        is_current = self.sessions.get(session.peer.id) is session
        super().on_closed(session, reason)
        if is_current:
            self._tasks.spawn(self._close_links(session.peer.id))
        self._waiters.router_gone(session.peer.id)
        self._send(self.leases.router_gone(session.peer.id))
        self._announce_credit()

    # engine

    def _updates_from_engine(self, updates: list[RequestUpdate]) -> None:
        told = self._told_late.take(updates)
        if told is not None:
            super()._updates_from_engine(told)

    def _on_updates(self, updates: list[RequestUpdate]) -> None:
        """One message to each router that this step has news for."""
        by_router: dict[str, list[LegTokens]] = {}
        for update in updates:
            key = update.key
            assert isinstance(key, LegKey)
            router_id = self.leases.router_of(key)
            if router_id is not None and update.tokens:
                by_router.setdefault(router_id, []).append(self._leg_tokens(key, update))
            if update.failure is not None:
                self._send(
                    self.leases.failed(key, update.failure, "invalid" if update.param else blame(update.suspects))
                )
            elif update.finished:
                self.leases.finished(key)
        credit = self._credit()
        self._send([Send(router_id, Tokens(legs, credit)) for router_id, legs in by_router.items()])
        self._send(self._waiters.announce(credit))

    def _announce_credit(self) -> None:
        """Tell waiting routers of credit, after anything that may have freed blocks or places outside a step."""
        if self._waiters:
            self._send(self._waiters.announce(self._credit()))

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
            first_launch=update.first_launch,
            prompt_scores=update.prompt_scores,
        )

    def _on_layer_group(self, ready: LayerGroupReady) -> None:
        raise AssertionError("a decode worker runs no prefill_only request")
