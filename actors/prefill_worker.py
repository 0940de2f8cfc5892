"""The prefill side: computes prompts, pushes their KV through channels while it computes, and hands
over one token.

The ledger decides what happens to each leg; this class carries it out. Layer groups come from the
engine's thread in order, and leave through the leg's channel as soon as the ledger has the decode
worker's word that the lease stands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

from pdray.actors.worker import Worker
from pdray.cluster.messages import (
    AbortPut,
    AnyMessage,
    BeginPutReply,
    CancelPrefill,
    LegKey,
    Ping,
    Pong,
    PrefillRequest,
    WorkerInfo,
)
from pdray.cluster.prefill_ledger import FlushPuts, LedgerEffect, PrefillLedger, ReleaseBlocks, StartCompute
from pdray.cluster.effects import Send
from pdray.cluster.session import PeerName, Session, connect
from pdray.config import Config
from pdray.engine.request import EngineRequest, LayerGroupReady, RequestUpdate
from pdray.errors import InvalidRequestError
from pdray.transfer.channel import Put, PutResult, SendChannel
from pdray.transfer.object_store import ObjectStoreChannel

logger = logging.getLogger(__name__)


class PrefillWorker(Worker):
    """See the module. Everything runs on the event loop's thread but the engine's steps and the channels'."""

    role: Literal["prefill", "decode", "both"] = "prefill"

    def __init__(self, config: Config, worker_id: str, incarnation: str, secret: bytes, node_id: str, host: str) -> None:
        super().__init__(config, worker_id, incarnation, secret, node_id, host)
        self.ledger = PrefillLedger()
        self._channels: dict[str, SendChannel] = {}
        self._held_puts: dict[LegKey, list[LayerGroupReady]] = {}

    async def stop(self) -> None:
        await super().stop()
        for channel in self._channels.values():
            await asyncio.to_thread(channel.close)

    # channels

    async def connect(self, decode: WorkerInfo, epoch: int, decode_actor: Any) -> None:
        """Open a session and a channel to a decode worker that has accepted this epoch.

        Raises:
            HandshakeError: it refused the session. OSError: it cannot be reached.
        """
        await self.disconnect(decode.worker_id)
        session = await connect(
            decode.host,
            decode.port,
            me=PeerName(self.worker_id, self.incarnation),
            expect=PeerName(decode.worker_id, decode.incarnation),
            secret=self.secret,
            handler=self,
            timeout_s=self.config.worker_timeout_s,
        )
        self.sessions[decode.worker_id] = session
        self._channels[decode.worker_id] = ObjectStoreChannel(
            self.engine.kv, self.worker_id, epoch, decode_actor.receive_blocks
        )

    async def disconnect(self, decode_worker_id: str) -> None:
        """Close the channel and the session to a decode worker, if there are any."""
        channel = self._channels.pop(decode_worker_id, None)
        if channel is not None:
            await asyncio.to_thread(channel.close)
        session = self.sessions.pop(decode_worker_id, None)
        if session is not None:
            await session.close()
