"""A channel's staging memory: slots through which the pieces of puts go in turn, and block ids beside them.

Who may use a slot next is decided by the device, not by the host: a slot carries the event after which its bytes are
free, and the stream that fills it next waits for that. So a put of any size can be enqueued at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pdray.engine.kv.pool import KVPool
from pdray.errors import ConfigError
from pdray.kernels.kv.pack import HeadRange, PackedBlocks, pack_blocks, unpack_blocks
from pdray.transfer.ring import ALIGNMENT, Region, Ring
from pdray.transfer.streams import Event

NUM_SLOTS = 4  # so that packing, sending and unpacking overlap
MAX_SPAN_BLOCKS = 4096  # their ids are 32 KiB: CUDA takes up to 64 KiB of pageable memory without waiting
ID_BYTES = 8
ID_AREA_BYTES = 4 * MAX_SPAN_BLOCKS * ID_BYTES
MIN_STAGING_BYTES, MAX_STAGING_BYTES = 128 << 20, 512 << 20  # by default
STAGING_SHARE = 64  # of the device's memory, by default, and for all channels of a worker together
PROBE_BYTES = 4096
PROBE_ROWS = 16  # on the host: one grant at a time brings one or two


def default_staging_bytes(device_bytes: int, num_channels: int) -> int:
    """Staging of each of a worker's channels where transfer_staging_bytes is not set.

    Each piece costs the host about 0.1 ms at either end, in which the link carries 32 MiB: pieces of 128 MiB (a quarter
    of the staging) hide that, and larger ones would gain nothing.

    Args:
        device_bytes: the whole memory of the device.
    """
    share = device_bytes // STAGING_SHARE // max(1, num_channels)
    return min(max(share, MIN_STAGING_BYTES), MAX_STAGING_BYTES)


class Piece(NamedTuple):
    """Part of a put that goes through a slot at once: some layers of blocks [start, stop) of its lists."""

    layers: range
    start: int
    stop: int


class Span(NamedTuple):
    """Blocks [start, stop) of a put's lists, whose ids are uploaded together; its pieces cover them in all layers."""

    start: int
    stop: int
    pieces: list[Piece]


def split_put(layers: range, num_blocks: int, bytes_per_block: int, piece_bytes: int) -> list[Span]:
    """The spans of a put, in the order in which both sides handle them; pieces of whole layers while those fit.

    Args:
        bytes_per_block: of one layer. piece_bytes: a piece's limit; must hold one such block.
    """
    spans = []
    for first in range(0, num_blocks, MAX_SPAN_BLOCKS):
        last = min(first + MAX_SPAN_BLOCKS, num_blocks)
        per_piece = max(1, piece_bytes // ((last - first) * bytes_per_block))
        blocks = min(last - first, piece_bytes // bytes_per_block)
        pieces = [
            Piece(range(layer, min(layer + per_piece, layers.stop)), start, min(start + blocks, last))
            for layer in range(layers.start, layers.stop, per_piece)
            for start in range(first, last, blocks)
        ]
        spans.append(Span(first, last, pieces))
    return spans


@dataclass(eq=False, slots=True)
class Slot:
    """Attributes:
    offset: of its bytes in the staging. free_after: the event after which they may be overwritten; None: now.
    """

    offset: int
    free_after: Event | None = None


class Staging:
    """Staging for blocks of one pool: NUM_SLOTS slots, and an area for block ids. One thread at a time.

    Args:
        pool: see KVPool.
        buffer: [num_bytes] uint8 on the pool's device: ID_AREA_BYTES, and the slots.
        heads: of the pool's blocks, that pass here; None: all.
        num_stagings: among which transfer_staging_bytes are shared. given_bytes: how many; None: the buffer's.

    Raises:
        ConfigError: the buffer is too small for this pool's blocks.
    """

    def __init__(
        self,
        pool: KVPool,
        buffer: torch.Tensor,
        heads: HeadRange | None = None,
        *,
        num_stagings: int = 1,
        given_bytes: int | None = None,
    ) -> None:
        self.layout = pool.layout
        self.kv = pool.tensor
        self.buffer = buffer
        self._elements = buffer[: len(buffer) // ALIGNMENT * ALIGNMENT].view(pool.layout.dtype)
        self._block_ids = buffer[:ID_AREA_BYTES].view(torch.int64)
        self._heads = heads
        whole = HeadRange(0, pool.layout.num_kv_heads)
        self.bytes_per_block = pool.layout.layer_block_bytes * (heads or whole).num_heads // whole.num_heads
        self.piece_bytes = (len(buffer) - ID_AREA_BYTES) // NUM_SLOTS // ALIGNMENT * ALIGNMENT
        if self.piece_bytes < max(self.bytes_per_block, PROBE_BYTES):
            least = NUM_SLOTS * (max(self.bytes_per_block, PROBE_BYTES) + ALIGNMENT)
            given = max(0, len(buffer) - ID_AREA_BYTES) if given_bytes is None else given_bytes
            among = f" among {num_stagings} pairs of ranks" if num_stagings > 1 else ""
            raise ConfigError(
                f"transfer_staging_bytes is {given}{among}, too little for blocks of {self.bytes_per_block} bytes a "
                f"layer; it must be at least {num_stagings * least}"
            )
        self._probes = torch.zeros(PROBE_ROWS, PROBE_BYTES, dtype=torch.uint8, pin_memory=buffer.is_cuda)
        self._num_probes = 0
        self.reset()

    def reset(self) -> None:
        """Everything is free. Nothing that was enqueued may use it any more."""
        self.ids = Ring(ID_AREA_BYTES)
        self._slots = [Slot(ID_AREA_BYTES + number * self.piece_bytes) for number in range(NUM_SLOTS)]
        self._next = 0

    def split(self, layers: range, num_blocks: int, piece_bytes: int) -> list[Span]:
        """See split_put()."""
        return split_put(layers, num_blocks, self.bytes_per_block, piece_bytes)

    def num_bytes(self, piece: Piece) -> int:
        """Bytes of a piece's data."""
        return len(piece.layers) * (piece.stop - piece.start) * self.bytes_per_block

    def next_slot(self) -> Slot:
        """Slots in turn. Whoever fills it waits for ``free_after``, and sets it anew."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % NUM_SLOTS
        return slot

    def pointer(self, slot: Slot) -> int:
        return self.buffer.data_ptr() + slot.offset

    def allocate_ids(self, span: Span) -> Region | None:
        """Room for the span's block ids; None until other ids are freed."""
        return self.ids.allocate((span.stop - span.start) * ID_BYTES)

    def load_ids(self, ids: Region, span: Span, block_ids: list[int]) -> None:
        """Upload the span's part of the whole put's ``block_ids``, on the current stream.

        The host's copy is read before copy_() returns: it is pageable.
        """
        host = torch.tensor(block_ids[span.start : span.stop], dtype=torch.int64)
        first = ids.offset // ID_BYTES
        self._block_ids[first : first + len(host)].copy_(host, non_blocking=True)

    def pack(self, slot: Slot, piece: Piece, span: Span, ids: Region) -> None:
        """Copy the piece out of the pool, on the current stream."""
        pack_blocks(self.kv, piece.layers, self._packed(slot, piece, span, ids))

    def unpack(self, slot: Slot, piece: Piece, span: Span, ids: Region) -> None:
        """Copy the piece into the pool, on the current stream."""
        unpack_blocks(self.kv, piece.layers, self._packed(slot, piece, span, ids))

    def write_probe(self, slot: Slot, epoch: int) -> None:
        self._bytes(slot.offset, PROBE_BYTES).copy_(_probe(epoch), non_blocking=True)

    def next_probe(self) -> int:
        """Where on the host a probe that is received may lie, until PROBE_ROWS more have come."""
        self._num_probes += 1
        return self._num_probes % PROBE_ROWS

    def read_probe(self, slot: Slot, row: int) -> None:
        """Copy what the slot holds to the host, on the current stream."""
        self._probes[row].copy_(self._bytes(slot.offset, PROBE_BYTES), non_blocking=True)

    def is_probe(self, row: int, epoch: int) -> bool:
        """Whether what was read is the epoch's probe; once the stream has passed read_probe()."""
        return torch.equal(self._probes[row], _probe(epoch))

    def warm_up(self) -> None:
        """Compile and load the kernels; leaves the pool as it was, but for its dummy block. Waits for the device."""
        for span in self.split(range(0, self.layout.num_layers), 1, self.piece_bytes):
            ids = self.allocate_ids(span)
            assert ids is not None
            self.load_ids(ids, span, [0])
            for piece in span.pieces:
                slot = self.next_slot()
                self.pack(slot, piece, span, ids)
                self.unpack(slot, piece, span, ids)
        if self.kv.is_cuda:
            torch.cuda.synchronize(self.kv.device)
        self.reset()

    def _packed(self, slot: Slot, piece: Piece, span: Span, ids: Region) -> PackedBlocks:
        offset, first_id = slot.offset // self._elements.itemsize, ids.offset // ID_BYTES + piece.start - span.start
        return PackedBlocks(self._elements, offset, self._block_ids, first_id, piece.stop - piece.start, self._heads)

    def _bytes(self, start: int, num_bytes: int) -> torch.Tensor:
        return self.buffer[start : start + num_bytes]


def share_buffer(pool: KVPool, buffer: torch.Tensor, num_bytes: int, heads: list[HeadRange]) -> list[Staging]:
    """A staging for each of these heads, over equal parts of the buffer.

    Args:
        buffer: see Staging, with ID_AREA_BYTES for each of them. num_bytes: the rest.

    Raises:
        ConfigError: they are too small for this pool's blocks.
    """
    number = len(heads)
    if number < 2:
        return [Staging(pool, buffer[: ID_AREA_BYTES + num_bytes], each) for each in heads]
    size = ID_AREA_BYTES + num_bytes // number // ALIGNMENT * ALIGNMENT
    return [
        Staging(pool, buffer[i * size : (i + 1) * size], each, num_stagings=number, given_bytes=num_bytes)
        for i, each in enumerate(heads)
    ]


def _probe(epoch: int) -> torch.Tensor:
    return (torch.arange(PROBE_BYTES) * (2 * epoch + 1) + epoch).to(torch.uint8)
