"""The prefill side: computes prompts, pushes their KV, and hands over one token.

The ledger decides what happens to each leg; this class carries it out. Layer groups come from the
engine's thread in order, and leave through the leg's channel once the decode worker has confirmed the lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Coroutine, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pdray.actors.sent import Sent
from pdray.actors.worker import Worker
from pdray.config import Config
from pdray.control.effects import FlushPuts, LedgerEffect, Release, Send, StartCompute, StopCompute
from pdray.control.losses import blame
from pdray.control.prefill_ledger import PrefillLedger
from pdray.engine.request import EngineRequest, LayerGroupReady, RequestUpdate, Reservation
from pdray.errors import InvalidRequestError, RequestFailedError, TransferError
from pdray.transfer.channel import Link, Put, PutResult
from pdray.wire.cluster_view import ChannelOffer, WorkerInfo
from pdray.wire.dial import connect
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, LeaseConfirmed, Ping, Pong, PrefillRequest
from pdray.wire.put_messages import AbortPut, BeginPutReply, ChannelMessage
from pdray.wire.session import Session

if TYPE_CHECKING:
    from pdray.transfer.channel import Sender

logger = logging.getLogger(__name__)

STOPPED_POLL_S = 0.05


class PrefillWorker(Worker):
    """See the module. Everything runs on the event loop's thread but the engine's steps and the channels' copies."""

    role = Role.PREFILL

    def __init__(
        self,
        config: Config,
        worker_id: str,
        incarnation: str,
        secret: bytes,
        *,
        app_name: str = "local",
        lender: WorkerInfo | None = None,
    ) -> None:
        super().__init__(config, worker_id, incarnation, secret, app_name=app_name)
        self.lender = lender
        self.ledger = PrefillLedger()
        self._stopping: set[LegKey] = set()  # a guest's legs that steps in flight may still write
        self._look_again: asyncio.TimerHandle | None = None
        self._channels: dict[str, Sender] = {}
        self._passed_over: dict[str, dict[str, str]] = {}  # by decode worker: faster kinds of channel, and why not
        # By decode worker: what is opened or closed there is so one after the other.
        self._links: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._held: dict[LegKey, list[LayerGroupReady]] = {}
        self._sent: defaultdict[str, Sent] = defaultdict(Sent)  # by decode worker, over all epochs

    async def _start(self) -> None:
        await super()._start()
        self.ledger = PrefillLedger(is_guest=self.engine.pool.borrowed)

    async def stop(self) -> None:
        await super().stop()
        for decode_worker_id in list(self._channels):
            await self.disconnect(decode_worker_id)

    # channels

    async def connect(self, decode: WorkerInfo, epoch: int, offer: ChannelOffer, decode_actor: Any) -> None:
        """Open a session and a channel to a decode worker that has accepted this epoch.

        Args:
            offer: what it accepted with.
            decode_actor: its handle; what a channel passes through actor calls goes to its receive_array().

        Raises:
            HandshakeError: it refused the session. OSError: it cannot be reached.
            TransferError: the channel did not come about, or not even a probe went through.
        """
        await self.disconnect(decode.worker_id)
        try:
            async with self._links[decode.worker_id]:
                await self._connect(decode, epoch, offer, decode_actor)
        except BaseException:
            await self.disconnect(decode.worker_id)
            raise

    async def _connect(self, decode: WorkerInfo, epoch: int, offer: ChannelOffer, decode_actor: Any) -> None:
        peer = decode.worker_id
        self.sessions[peer] = session = await connect(
            decode.host,
            decode.port,
            me=PeerName(self.worker_id, self.incarnation, self.role),
            expect=PeerName(peer, decode.incarnation, decode.role),
            secret=self.secret,
            handler=self,
            timeout_s=self.config.worker_timeout_s,
        )
        link = Link(
            peer,
            epoch,
            send=partial(self._send_on_channel, session, offer.kind, epoch),
            call=partial(decode_actor.receive_array.remote, offer.kind, self.worker_id, epoch),
            on_failed=partial(self._channel_failed, peer, epoch),
        )
        self._channels[peer] = channel = await self.kinds[offer.kind].open(link, offer.data)
        self._passed_over[peer] = offer.passed_over
        await channel.check()

    def _channel_failed(self, decode_worker_id: str, epoch: int, reason: str) -> None:
        """The Coordinator sees that the channel is gone, and connects the two in a higher epoch."""
        channel = self._channels.get(decode_worker_id)
        if channel is not None and channel.epoch == epoch:
            logger.warning("%s: the channel to %s failed: %s", self.worker_id, decode_worker_id, reason)
            self._tasks.spawn(self.disconnect(decode_worker_id))

    def disconnect(self, decode_worker_id: str) -> Coroutine[Any, Any, None]:
        """Give up the channel and the session to a decode worker, and the legs that use them, now; with the coroutine's
        end they are closed, and nothing of those legs is written any more. Idempotent."""
        channel, session = self._channels.pop(decode_worker_id, None), self.sessions.pop(decode_worker_id, None)
        self._perform(self.ledger.decode_worker_gone(decode_worker_id))  # else what they compute would still be put
        return self._close(decode_worker_id, channel, session)

    async def _close(self, decode_worker_id: str, channel: Sender | None, session: Session | None) -> None:
        async with self._links[decode_worker_id]:
            try:
                if channel is not None:
                    await asyncio.to_thread(channel.close)
            except TransferError as error:  # its staging buffer stays in use
                self._fail(error)
                raise
            if session is not None:
                await session.close()

    async def describe(self) -> dict[str, Any]:
        return await super().describe() | {
            "channels": {peer: channel.kind for peer, channel in self._channels.items()},
            "passed_over": {peer: self._passed_over[peer] for peer in self._channels},
            "sent": {peer: asdict(sent) for peer, sent in self._sent.items()},
        }

    async def worker_gone(self, worker_id: str, incarnation: str) -> None:
        """A decode worker's process was seen dead: close its channel and session."""
        session = self.sessions.get(worker_id)
        if session is None or session.peer.incarnation == incarnation:
            await self.disconnect(worker_id)

    def _live_keys(self) -> set[Hashable]:
        return set(self.ledger.keys())

    def _epochs(self) -> dict[str, int]:
        return {decode_worker_id: channel.epoch for decode_worker_id, channel in self._channels.items()}

    # sessions

    def on_message(self, session: Session, message: AnyMessage) -> None:
        peer = session.peer.id
        match message:
            case PrefillRequest():
                channel = self._channels.get(message.decode_worker_id or "")
                self._perform(self.ledger.request(peer, message, None if channel is None else channel.epoch))
            case LeaseConfirmed():
                self._perform(self.ledger.lease_confirmed(message.key, message.num_cached_tokens))
            case CancelPrefill():
                self._perform(self.ledger.cancel(message.key))
            case Ping():
                session.send(Pong(self.engine.stats().queued_tokens))
            case BeginPutReply():
                given = Reservation(message.block_ids, message.num_cached_tokens)
                self._perform(self.ledger.begin_put_reply(message.key, message.granted, given))
            case AbortPut():
                self._perform(self.ledger.abort_put(peer, message.key))
            case ChannelMessage():
                self._on_channel_message(peer, message)
            case _:
                raise TypeError(f"{self.worker_id} takes no {type(message).__name__} (from {peer})")

    def _on_channel_message(self, peer: str, message: ChannelMessage) -> None:
        channel = self._channels.get(peer)
        if channel is not None:
            channel.on_message(message.epoch, message.payload)
        else:  # it was closed, or does not open: connect() sees that by itself
            logger.info("%s: %s has a message for a channel of epoch %d", self.worker_id, peer, message.epoch)

    def on_closed(self, session: Session, reason: str) -> None:
        peer = session.peer.id
        is_current = self.sessions.get(peer) is session
        super().on_closed(session, reason)
        if peer in self._channels and is_current:
            logger.warning("%s: session to %s closed: %s", self.worker_id, peer, reason)
            self._tasks.spawn(self.disconnect(peer))
        else:
            self._perform(self.ledger.router_gone(peer))

    # engine

    def _on_layer_group(self, ready: LayerGroupReady) -> None:
        key = LegKey(*ready.key)  # type: ignore[misc]
        if self.ledger.may_put(key):
            self._put(key, ready)
        elif self.ledger.may_hold(key):
            self._held.setdefault(key, []).append(ready)

    def _on_updates(self, updates: list[RequestUpdate]) -> None:
        now = self._now()
        for channel in self._channels.values():
            channel.step_ended()
        self._settle_stopped()
        for update in updates:
            key = LegKey(*update.key)  # type: ignore[misc]
            if update.failure is not None:
                verdict = "invalid" if update.param else blame(update.suspects)
                self._perform(self.ledger.fail(key, update.failure, verdict, param=update.param))
            elif update.tokens:
                assert update.prefill_queue is not None and update.prefill is not None, update
                message = FirstTokens(
                    *key,
                    update.tokens,
                    update.num_cached_tokens or 0,
                    update.prefill_queue,
                    update.prefill,
                    update.prompt_scores,
                )
                self._perform(self.ledger.computed(now, message))

    # effects

    def _perform(self, effects: Sequence[LedgerEffect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send([effect])
                case StartCompute(key):
                    self._start_compute(key)
                case FlushPuts(key):
                    for ready in self._held.pop(key, []):
                        self._put(key, ready)
                    self._perform(self.ledger.puts_flushed(self._now(), key))
                case StopCompute(key):
                    self.engine.release(key)
                    self._stopping.add(key)
                    self._loop.call_soon(self._settle_stopped)
                case Release(key):
                    # In the loop's next turn: what was sent in this one leaves at its end, and is waited for.
                    self._loop.call_soon(self._release, key)

    def _release(self, key: LegKey) -> None:
        """Forget a leg that the ledger has forgotten."""
        self._held.pop(key, None)
        for channel in self._channels.values():
            channel.end_leg(key)
        self.engine.release(key)

    def _settle_stopped(self) -> None:
        """Tell of legs whose last step is over. A step that fails while it is launched says nothing: look again."""
        if self._look_again is not None:
            self._look_again.cancel()
        for key in [key for key in self._stopping if not self.engine.is_writing(key)]:
            self._stopping.discard(key)
            self._perform(self.ledger.stopped(key))
        self._look_again = self._loop.call_later(STOPPED_POLL_S, self._settle_stopped) if self._stopping else None

    def _start_compute(self, key: LegKey) -> None:
        leg = self.ledger.leg(key)
        assert leg is not None, key
        try:
            self.engine.add(
                EngineRequest(
                    key=key,
                    prompt_token_ids=leg.prompt_token_ids,
                    params=leg.params,
                    indices=tuple(leg.indices),
                    output_token_ids=tuple(leg.output_token_ids),
                    priority=leg.priority,
                    prefill_only=True,
                    alone=leg.alone,
                    given=self.ledger.given(key),
                )
            )
        except InvalidRequestError as error:
            self._perform(self.ledger.fail(key, str(error), "invalid", param=error.param))
        except RequestFailedError as error:
            self._perform(self.ledger.fail(key, str(error), "failed"))

    def _put(self, key: LegKey, ready: LayerGroupReady) -> None:
        """Push the blocks that the decode worker does not have yet."""
        leg = self.ledger.leg(key)
        assert leg is not None and leg.decode_worker_id is not None, key
        first = max(ready.first_block, leg.num_cached_tokens // self.engine.block_size)
        source = ready.block_ids[first - ready.first_block :]
        if not source:
            return
        put = Put(key, ready.layers, source, first, ready.ready)
        self.ledger.put_issued(key)
        peer = leg.decode_worker_id
        future = self._channels[peer].put(put)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._on_put_done, key, peer, done))

    def _on_put_done(self, key: LegKey, peer: str, done: Future[PutResult]) -> None:
        error = done.exception()
        if error is None:
            result = done.result()
            self._sent[peer].add(result.num_bytes, result.seconds)
            if self.metrics is not None:
                self.metrics.on_transfer(result.num_bytes, result.seconds)
        self._perform(self.ledger.put_completed(key, None if error is None else str(error)))
