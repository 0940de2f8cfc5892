"""The object store channel kind.

The sender copies a put's blocks out of its pool into one array and passes it to the decode worker as an
argument of an actor call: Ray places it in the object store, owns the reference for exactly as long as
the call needs it, and shows the receiver a read-only array in shared memory, which it copies into its
pool. Copies run on a thread at either end, and on CUDA on a stream of their own: an event loop must not
wait for a device that has steps to do first. What travels has all heads, whoever of a worker's ranks holds them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.transfer.channel import Kind, Link, Put, PutResult, Receiver, Sender, Sink, Site
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.pool_blocks import PoolBlocks, WholeBlocks
from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.message import LegKey


def blocks_to_array(blocks: torch.Tensor) -> np.ndarray[Any, Any]:
    """A contiguous CPU tensor as bytes; numpy has no bfloat16."""
    return blocks.view(torch.uint8).numpy()


def array_to_blocks(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of blocks_to_array. Copies: Ray's arrays are read-only, torch knows no such tensor."""
    return torch.from_numpy(array.copy()).view(dtype)


class ArrayHeader(NamedTuple):
    """Header of an array: it holds blocks of these positions of a leg, of layers [first_layer, last_layer)."""

    request_id: str
    attempt: int
    first_layer: int
    last_layer: int
    first_position: int
    num_blocks: int


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(ArrayHeader).decode


class ObjectStoreSender(Sender):
    """A Sender through Ray's object store.

    Contract: put() returns at once; one thread copies and submits in order, so puts arrive in the
    order they were made; the future completes on a Ray thread when the receiver has answered. No
    staging beyond Ray's object store.

    Args:
        blocks: of the sender's pool.
    """

    kind = "object_store"

    def __init__(self, blocks: WholeBlocks, link: Link) -> None:
        self.epoch = link.epoch
        self._blocks = blocks
        self._call = link.call
        self._closed = False
        self._pending: set[Future[PutResult]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"channel-{link.peer}-{link.epoch}")

    def put(self, put: Put) -> Future[PutResult]:
        """See Sender."""
        future: Future[PutResult] = Future()
        if self._closed:
            future.set_exception(TransferError(f"channel of epoch {self.epoch} is closed"))
            return future
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._thread.submit(self._send, put, future, time.monotonic())
        return future

    def _send(self, put: Put, future: Future[PutResult], started: float) -> None:
        try:
            if self._closed:
                raise TransferError(f"channel of epoch {self.epoch} is closed")
            array = blocks_to_array(self._blocks.read(put.layers, put.source_blocks, put.ready))
            key = LegKey(*put.key)  # type: ignore[misc]
            where = put.layers.start, put.layers.stop, put.first_position, len(put.source_blocks)
            call = self._call(encode(ArrayHeader(*key, *where)), array)
            call.future().add_done_callback(lambda reply: self._settle(future, reply, array.nbytes, started))
        except Exception as error:
            self._resolve(future.set_exception, TransferError(f"put failed: {error}"))

    def _settle(self, future: Future[PutResult], reply: Future[bool], num_bytes: int, started: float) -> None:
        error = reply.exception()
        if error is not None:
            self._resolve(future.set_exception, TransferError(f"put failed: {error}"))
        else:
            self._resolve(future.set_result, PutResult(reply.result(), num_bytes, time.monotonic() - started))

    def _resolve(self, setter: Callable[[Any], None], value: Any) -> None:
        try:
            setter(value)
        except InvalidStateError:
            if not self._closed:  # close() fails what is pending; nothing else may settle a put twice
                raise

    def close(self) -> None:
        """See Sender. A call already submitted may still arrive: the receiver asks its lease
        table and drops it, which is why nothing can reach the destination after the lease's end."""
        self._closed = True
        for future in list(self._pending):
            self._resolve(future.set_exception, TransferError(f"channel of epoch {self.epoch} was closed"))
        self._thread.shutdown(wait=True)


class ObjectStoreReceiver(Receiver):
    """A Receiver of arrays.

    Args:
        blocks: of the pool. dtype: theirs.
        sink: asked before a put is written, and told when it is.
        writes: is told of each put that is being written.
    """

    kind = "object_store"

    def __init__(self, blocks: WholeBlocks, dtype: torch.dtype, sink: Sink, writes: PendingWrites) -> None:
        self._blocks = blocks
        self._dtype = dtype
        self._sink = sink
        self._writes = writes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="object-store-receiver")

    async def accept(self, worker_id: str, epoch: int) -> None:
        """See Receiver."""

    async def on_array(self, worker_id: str, epoch: int, payload: bytes, array: np.ndarray[Any, Any]) -> bool:
        """See Receiver.

        Args:
            payload: an ArrayHeader. array: what blocks_to_array() made of the put's blocks.

        Raises:
            msgspec.DecodeError: the payload is no header. ValueError: the array has another shape than it says.
        """
        header = decode(payload)
        key, layers = LegKey(header.request_id, header.attempt), range(header.first_layer, header.last_layer)
        positions = range(header.first_position, header.first_position + header.num_blocks)
        blocks = self._sink.resolve(key, worker_id, epoch, layers, positions)
        if blocks is None:
            return False
        self._writes.begin(key)
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._write, layers, blocks, array)
            return self._sink.put_received(key, worker_id, epoch)
        finally:
            self._writes.end(key)

    def _write(self, layers: range, blocks: list[int], array: np.ndarray[Any, Any]) -> None:
        self._blocks.write(layers, blocks, array_to_blocks(array, self._dtype))

    async def close(self) -> None:
        """See Receiver."""
        await asyncio.to_thread(self._thread.shutdown)


class ObjectStoreKind(Kind):
    """Ray's object store, between any two workers of a cluster."""

    name = "object_store"

    _dtype: torch.dtype
    _open: Callable[[], WholeBlocks]  # on CUDA with a stream of its own for each end

    def __init__(self, site: Site) -> None: ...

    @classmethod
    def obstacle(cls, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
        """See Kind."""
        return None

    def attach(self, pool: KVPool) -> None:
        """See Kind."""
        self._dtype = pool.layout.dtype
        self._open = partial(PoolBlocks, pool.tensor)

    def attach_ranks(self, blocks: WholeBlocks, dtype: torch.dtype) -> None:
        """See Kind."""
        self._dtype = dtype
        self._open = lambda: blocks

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> ObjectStoreReceiver:
        """See Kind."""
        return ObjectStoreReceiver(self._open(), self._dtype, sink, writes)

    async def open(self, link: Link, offer: Any) -> ObjectStoreSender:
        """See Kind."""
        return ObjectStoreSender(self._open(), link)
