"""One rank's part in writing: its pool, a stream, and the pools of a peer that are mapped here."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.kernels.kv.peer_write import PeerBlocks, write_peer_blocks
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.messages import probe_pattern
from pdray.transfer.cuda_ipc.targets import Target
from pdray.transfer.cuda_ipc.transport import Mapping, Transport
from pdray.transfer.ring import Region
from pdray.transfer.streams import Event, drain


def write_probe(pattern: torch.Tensor, device: torch.device, place: PeerBlocks) -> None:
    """Write these bytes on the current stream, with the kernel that writes blocks."""
    block = pattern.to(device).view(1, 1, 1, 1, 1, len(pattern))
    write_peer_blocks(block, range(1), torch.zeros(2, 1, dtype=torch.int32, device=device), place)


class Enqueued(NamedTuple):
    """A write that was enqueued.

    Attributes:
        region: of its block ids, to be freed once ``done`` has passed.
    """

    region: Region
    done: Event


class PoolWriter:
    """Writes blocks of a pool into one peer's. One thread at a time; no method but close() waits for the device.

    Args:
        ids: this writer's alone until close() has returned.
        targets: that it writes to.

    Raises:
        Exception: whatever the driver says of memory that cannot be mapped here; then nothing is.
    """

    def __init__(self, pool: KVPool, transport: Transport, ids: BlockIds, targets: list[Target]) -> None:
        self.ids = ids
        self._pool = pool
        self._targets = targets
        self._mappings: list[Mapping] = []
        self._closed = False
        self.stream = transport.new_stream()
        self._load_kernels()
        try:
            for target in targets:
                self._mappings.append(transport.borrow(target.handle))
        except BaseException:
            self._unmap()
            raise
        self._peers = [
            PeerBlocks(mapping.address, target.num_blocks, target.heads)
            for mapping, target in zip(self._mappings, targets, strict=True)
        ]

    def write(
        self, layers: range, source: list[int], target: list[int], ready: Any, num_programs: int | None
    ) -> Enqueued | None:
        """Enqueue a write of these blocks, at most MAX_BLOCKS, behind the event after which they are final; None if
        there is no room for their ids before an older write's are freed.

        Args:
            target: of the peer's blocks, the same in each of its ranks' pools.
            num_programs: see write_peer_blocks().

        Raises:
            TransferError: closed: nothing is mapped any more.
        """
        if self._closed:
            raise TransferError("a write that had no room before its channel was closed")
        region = self.ids.allocate(source, target)
        if region is None:
            return None

        def write() -> None:
            ids = self.ids.upload(region, len(source))
            for peer in self._peers:
                write_peer_blocks(self._pool.tensor, layers, ids, peer, num_programs=num_programs)

        if ready is not None:
            self.stream.wait(ready)
        self.stream.run(write)
        return Enqueued(region, self.stream.record())

    def write_probe(self, epoch: int) -> Event:
        """Enqueue this rank's parts of the epoch's pattern."""
        pattern = probe_pattern(epoch)
        for mapping, target in zip(self._mappings, self._targets, strict=True):
            place = PeerBlocks(mapping.address + target.probe_offset, 1)
            part = pattern[target.probe_start : target.probe_stop]
            self.stream.run(partial(write_probe, part, self._pool.device, place))
        return self.stream.record()

    def close(self, name: str) -> None:
        """Wait for what was enqueued; afterwards the peer's memory is not mapped any more. Idempotent.

        Raises:
            TransferError: what was enqueued does not end: the device cannot be trusted with another channel.
        """
        if not self._closed:
            drain([self.stream], name)
            self._unmap()
            self._closed = True

    def _unmap(self) -> None:
        while self._mappings:
            self._mappings.pop().close()

    def _load_kernels(self) -> None:
        """Compile and load what no pool of equal heads needs, over memory of this process: not between two polls."""
        for target in self._targets:
            heads, num_sources = target.heads, self._pool.layout.num_kv_heads
            if self._pool.tensor.is_cuda and heads.num_heads < max(num_sources, heads.num_targets):
                self.stream.run(partial(self._rehearse, target))
        drain([self.stream], "of its own")

    def _rehearse(self, target: Target) -> None:
        """All of it on the current stream, which waits for no other."""
        pool = self._pool
        shape = dataclasses.replace(pool.layout, num_layers=1, num_kv_heads=target.heads.num_targets).shape(1)
        block = torch.empty(shape, dtype=pool.layout.dtype, device=pool.device)
        ids = torch.zeros(2, 1, dtype=torch.int32, device=pool.device)
        write_peer_blocks(pool.tensor, range(1), ids, PeerBlocks(block.data_ptr(), 1, target.heads))
        part = probe_pattern(0)[target.probe_start : target.probe_stop]
        place = torch.empty(len(part), dtype=torch.uint8, device=pool.device)
        write_probe(part, pool.device, PeerBlocks(place.data_ptr(), 1))


def pack_ids(source: list[int], target: list[int]) -> bytes:
    """Both lists, as unpack_ids() takes them."""
    return np.array([source, target], dtype=np.int32).tobytes()


def unpack_ids(data: bytes) -> tuple[list[int], list[int]]:
    source, target = np.frombuffer(data, dtype=np.int32).reshape(2, -1).tolist()
    return source, target
