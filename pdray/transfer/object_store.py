"""Blocks through Ray's object store: for CPU workers, and wherever nothing faster works.

The sender copies a put's blocks out of its pool into one array and passes it to the decode worker as an
argument of an actor call: Ray places it in the object store, owns the reference for exactly as long as
the call needs it, and shows the receiver a read-only array in shared memory, which it copies into its
pool. Copies run on a thread at either end, and on CUDA on a stream of their own: an event loop must not
wait for a device that has steps to do first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pdray.cluster.messages import ChannelReply
from pdray.errors import TransferError
from pdray.kernels.kv_store import gather_blocks, scatter_blocks
from pdray.transfer.channel import BlockSink, Put, PutResult
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.streams import CudaStream


def blocks_to_array(blocks: torch.Tensor) -> np.ndarray[Any, Any]:
    """A contiguous CPU tensor as bytes; numpy has no bfloat16."""
    return blocks.view(torch.uint8).numpy()


def array_to_blocks(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of blocks_to_array. Copies: Ray's arrays are read-only, torch knows no such tensor."""
    return torch.from_numpy(array.copy()).view(dtype)


class ObjectStoreChannel:
    """SendChannel over Ray's object store.

    Contract: put() returns at once; one thread copies and submits in order, so puts arrive in the
    order they were made; the future completes on a Ray thread when the receiver has answered. Copies
    from a GPU have a stream of their own. No staging beyond Ray's object store.

    Args:
        kv: the sender's pool [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim].
        receive_blocks: the decode actor's method; called as
            (worker_id, epoch, key, layers, destination_blocks, array) and returns whether it wrote.
    """

    kind = "object_store"

    def __init__(self, kv: torch.Tensor, worker_id: str, epoch: int, receive_blocks: Any) -> None:
        self.epoch = epoch
        self._kv = kv
        self._worker_id = worker_id
        self._receive_blocks = receive_blocks
        self._stream = CudaStream(kv.device) if kv.is_cuda else None
        self._closed = False
        self._pending: set[Future[PutResult]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"channel-{worker_id}-{epoch}")

    def put(self, put: Put) -> Future[PutResult]:
        future: Future[PutResult] = Future()
        if self._closed:
            future.set_exception(TransferError(f"channel of epoch {self.epoch} is closed"))
            return future
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._thread.submit(self._send, put, future, time.monotonic())
        return future

    def on_message(self, message: ChannelReply) -> None:
        raise TypeError(f"an object store channel takes no {type(message).__name__}")

    def _send(self, put: Put, future: Future[PutResult], started: float) -> None:
        try:
            if self._closed:
                raise TransferError(f"channel of epoch {self.epoch} is closed")
            array = blocks_to_array(self._read(put))
            call = self._receive_blocks.remote(
                self._worker_id,
                self.epoch,
                put.key,
                (put.layers.start, put.layers.stop),
                put.destination_blocks,
                array,
            )
            call.future().add_done_callback(lambda reply: self._settle(future, reply, array.nbytes, started))
        except Exception as error:
            self._resolve(future.set_exception, TransferError(f"put failed: {error}"))

    def _read(self, put: Put) -> torch.Tensor:
        """The put's blocks on the host."""
        if self._stream is None:
            return gather_blocks(self._kv, put.layers, put.source_blocks)
        if put.ready is not None:
            self._stream.wait(put.ready)
        blocks: list[torch.Tensor] = []
        self._stream.run(lambda: blocks.append(gather_blocks(self._kv, put.layers, put.source_blocks).cpu()))
        return blocks[0]

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
        """See SendChannel. A call already submitted may still arrive: the receiver asks its lease
        table and drops it, which is why nothing can reach the destination after the lease's end."""
        self._closed = True
        for future in list(self._pending):
            self._resolve(future.set_exception, TransferError(f"channel of epoch {self.epoch} was closed"))
        self._thread.shutdown(wait=True)


class ObjectStoreReceiver:
    """What a decode worker's object store channels bring, into its pool.

    Args:
        kv: the pool.
        sink: asked before a put is written, and told when it is.
        writes: is told of each put that is being written.
    """

    def __init__(self, kv: torch.Tensor, sink: BlockSink, writes: PendingWrites) -> None:
        self._kv = kv
        self._sink = sink
        self._writes = writes
        self._stream = torch.cuda.Stream(kv.device) if kv.is_cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="object-store-receiver")

    async def receive(self, worker_id: str, epoch: int, put: Put, array: np.ndarray[Any, Any]) -> bool:
        """Write what blocks_to_array() made of the put's blocks, if that may be; returns whether it counts."""
        if not self._sink.may_write(put.key, worker_id, epoch):
            return False
        self._writes.begin(put.key)
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._write, put, array)
            return self._sink.put_received(put.key, worker_id, epoch)
        finally:
            self._writes.end(put.key)

    def _write(self, put: Put, array: np.ndarray[Any, Any]) -> None:
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            scatter_blocks(self._kv, put.layers, put.destination_blocks, array_to_blocks(array, self._kv.dtype))
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Returns when nothing is being written any more; not for the event loop's thread."""
        self._thread.shutdown()
