"""A third channel kind, to show what one costs: this file, and a line in the registry. Blocks go over the session.

tests/actors runs every check of a pair of workers over it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.transfer.channel import Kind, Link, Put, PutResult, Receiver, Sender, Sink, Site
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.message import LegKey


class ToySender(Sender):
    kind = "toy"

    def __init__(self, kv: torch.Tensor, link: Link) -> None:
        self.kv, self.link, self.epoch = kv, link, link.epoch
        self.pending: list[Future[PutResult]] = []

    def put(self, put: Put) -> Future[PutResult]:
        blocks = self.kv[put.layers.start : put.layers.stop, put.source_blocks].numpy().tobytes()
        key, places = LegKey(*put.key), (put.layers.start, put.layers.stop, put.first_position)  # type: ignore[misc]
        self.link.send(msgspec.msgpack.encode((*key, *places, len(put.source_blocks), blocks)))
        self.pending.append(Future())
        return self.pending[-1]

    def on_message(self, epoch: int, payload: bytes) -> None:
        num_bytes = msgspec.msgpack.decode(payload)
        if epoch == self.epoch and self.pending:
            self.pending.pop(0).set_result(PutResult(num_bytes > 0, num_bytes, 0.0))

    def close(self) -> None:
        pending, self.pending = self.pending, []
        for future in pending:
            future.set_exception(TransferError("channel closed"))


class ToyReceiver(Receiver):
    kind = "toy"

    def __init__(self, kv: torch.Tensor, sink: Sink) -> None:
        self.kv, self.sink = kv, sink

    async def accept(self, worker_id: str, epoch: int) -> None: ...

    def on_message(self, worker_id: str, epoch: int, payload: bytes, send: Callable[[bytes], None]) -> None:
        name, attempt, first, last, start, count, data = msgspec.msgpack.decode(payload)
        key = LegKey(name, attempt)
        blocks = self.sink.resolve(key, worker_id, epoch, range(first, last), range(start, start + count))
        if blocks is not None:
            source = torch.frombuffer(bytearray(data), dtype=self.kv.dtype)
            self.kv[first:last, blocks] = source.view(last - first, count, *self.kv.shape[2:])
        counts = blocks is not None and self.sink.put_received(key, worker_id, epoch)
        send(msgspec.msgpack.encode(len(data) if counts else 0))

    async def close(self) -> None: ...


class ToyKind(Kind):
    name = "toy"

    def __init__(self, site: Site) -> None: ...

    @classmethod
    def obstacle(cls, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
        return None

    def attach(self, pool: KVPool) -> None:
        self.kv = pool.tensor

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> ToyReceiver:
        return ToyReceiver(self.kv, sink)

    async def open(self, link: Link, offer: Any) -> ToySender:
        return ToySender(self.kv, link)
