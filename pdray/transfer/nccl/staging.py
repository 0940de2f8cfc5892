"""A channel's staging memory: a ring of bytes through which the pieces of puts go, and what is copied into it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import ConfigError
from pdray.kernels.kv.pack import pack_blocks, unpack_blocks

ALIGNMENT = 512
RING_PIECES = 4  # that fit at once, so that packing, sending and unpacking overlap
MAX_PIECE_BLOCKS = 4096  # their ids are 32 KiB: CUDA takes up to 64 KiB of pageable memory without waiting
INDEX_BYTES = 8
PROBE_BYTES = 4096


class Piece(NamedTuple):
    """Part of a put that goes through staging at once: some layers of blocks [start, stop) of its lists."""

    layers: range
    start: int
    stop: int


def split_put(layers: range, num_blocks: int, bytes_per_block: int, piece_bytes: int) -> list[Piece]:
    """The pieces of a put, in the order in which both sides handle them: whole layers while they fit.

    Args:
        bytes_per_block: of one layer. piece_bytes: a piece's limit; must hold one such block.
    """
    blocks = min(num_blocks, piece_bytes // bytes_per_block, MAX_PIECE_BLOCKS)
    per_piece = max(1, piece_bytes // (num_blocks * bytes_per_block)) if blocks == num_blocks else 1
    return [
        Piece(range(layer, min(layer + per_piece, layers.stop)), start, min(start + blocks, num_blocks))
        for layer in range(layers.start, layers.stop, per_piece)
        for start in range(0, num_blocks, blocks)
    ]


@dataclass(eq=False, slots=True)
class Region:
    """Bytes of a ring in use."""

    offset: int
    num_bytes: int
    freed: bool = False


class StagingRing:
    """Hands out regions of [0, capacity) around and around; they may come back in any order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._regions: deque[Region] = deque()  # by age
        self._head = 0

    def __len__(self) -> int:
        """Regions in use."""
        return sum(not region.freed for region in self._regions)

    def allocate(self, num_bytes: int) -> Region | None:
        """None while there is no room."""
        num_bytes = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        assert 0 < num_bytes <= self.capacity, num_bytes
        if not self._regions:
            self._head = 0
        tail = self._regions[0].offset if self._regions else self.capacity
        wrapped = bool(self._regions) and self._head <= tail
        if wrapped and tail - self._head < num_bytes:
            return None
        if not wrapped and self.capacity - self._head < num_bytes:
            if tail < num_bytes:
                return None
            self._head = 0
        region = Region(self._head, num_bytes)
        self._head += num_bytes
        self._regions.append(region)
        return region

    def free(self, region: Region) -> None:
        assert not region.freed
        region.freed = True
        while self._regions and self._regions[0].freed:
            self._regions.popleft()


class Staging:
    """Staging for blocks of one pool. Each region holds a piece's data, and behind them its block ids.

    Args:
        pool: see KVPool.
        buffer: [num_bytes] uint8 on the pool's device.

    Raises:
        ConfigError: the buffer is too small for this pool's blocks.
    """

    def __init__(self, pool: KVPool, buffer: torch.Tensor) -> None:
        self.layout = pool.layout
        self.kv = pool.tensor
        self.buffer = buffer
        self.ring = StagingRing(len(buffer) // ALIGNMENT * ALIGNMENT)
        self.bytes_per_block = pool.layout.layer_block_bytes
        self.piece_bytes = len(buffer) // RING_PIECES - MAX_PIECE_BLOCKS * INDEX_BYTES - 2 * ALIGNMENT
        if self.piece_bytes < max(self.bytes_per_block, PROBE_BYTES):
            least = RING_PIECES * (self.bytes_per_block + MAX_PIECE_BLOCKS * INDEX_BYTES + PROBE_BYTES)
            raise ConfigError(
                f"transfer_staging_bytes is {len(buffer)}, too little for blocks of {self.bytes_per_block} bytes a "
                f"layer; it must be at least {least}"
            )

    def split(self, layers: range, num_blocks: int, piece_bytes: int) -> list[Piece]:
        """See split_put()."""
        return split_put(layers, num_blocks, self.bytes_per_block, piece_bytes)

    def num_bytes(self, piece: Piece) -> int:
        """Of its data."""
        return len(piece.layers) * (piece.stop - piece.start) * self.bytes_per_block

    def allocate(self, piece: Piece) -> Region | None:
        index_at = -(-self.num_bytes(piece) // ALIGNMENT) * ALIGNMENT
        return self.ring.allocate(index_at + (piece.stop - piece.start) * INDEX_BYTES)

    def allocate_probe(self) -> Region | None:
        return self.ring.allocate(PROBE_BYTES)

    def pointer(self, region: Region) -> int:
        return self.buffer.data_ptr() + region.offset

    def pack(self, region: Region, piece: Piece, block_ids: list[int]) -> None:
        """Copy the piece out of the pool's ``block_ids`` (the whole put's), on the current stream."""
        pack_blocks(self.kv, piece.layers, self._index(region, piece, block_ids), self._data(region, piece))

    def unpack(self, region: Region, piece: Piece, block_ids: list[int]) -> None:
        """Copy the piece into the pool's ``block_ids`` (the whole put's), on the current stream."""
        unpack_blocks(self.kv, piece.layers, self._index(region, piece, block_ids), self._data(region, piece))

    def write_probe(self, region: Region, epoch: int) -> None:
        self._bytes(region.offset, PROBE_BYTES).copy_(_probe(epoch), non_blocking=True)

    def is_probe(self, region: Region, epoch: int) -> bool:
        """Whether the region holds the epoch's probe. Waits for the current stream."""
        return torch.equal(self._bytes(region.offset, PROBE_BYTES).cpu(), _probe(epoch))

    def warm_up(self) -> None:
        """Compile and load the kernels; leaves the pool as it was, but for its dummy block. Waits for the device."""
        piece = Piece(range(0, self.layout.num_layers), 0, 1)
        for each in self.split(piece.layers, 1, self.piece_bytes):
            region = self.allocate(each)
            assert region is not None
            self.pack(region, each, [0])
            self.unpack(region, each, [0])
            self.ring.free(region)
        if self.kv.is_cuda:
            torch.cuda.synchronize(self.kv.device)

    def _data(self, region: Region, piece: Piece) -> torch.Tensor:
        shape = (len(piece.layers), piece.stop - piece.start, *self.layout.block_shape)
        return self._bytes(region.offset, self.num_bytes(piece)).view(self.layout.dtype).view(shape)

    def _index(self, region: Region, piece: Piece, block_ids: list[int]) -> torch.Tensor:
        """The piece's block ids on the device. The host's copy is read before copy_() returns: it is pageable."""
        ids = torch.tensor(block_ids[piece.start : piece.stop], dtype=torch.int64)
        size = -(-self.num_bytes(piece) // ALIGNMENT) * ALIGNMENT
        index = self._bytes(region.offset + size, len(ids) * INDEX_BYTES).view(torch.int64)
        return index.copy_(ids, non_blocking=True)

    def _bytes(self, start: int, num_bytes: int) -> torch.Tensor:
        return self.buffer[start : start + num_bytes]


def _probe(epoch: int) -> torch.Tensor:
    return (torch.arange(PROBE_BYTES) * (2 * epoch + 1) + epoch).to(torch.uint8)
