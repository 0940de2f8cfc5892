"""What the two ends of a cuda_ipc channel say to each other, beside the blocks that are written."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch

PROBE_BYTES = 1024
NUM_PROBES = 64  # senders that may be connecting at once
PROBE_ALIGNMENT = 16  # of a part of a test write, where several ranks write it
SPARE_BYTES = NUM_PROBES * PROBE_BYTES  # of a pool that is lent


def probe_pattern(epoch: int) -> torch.Tensor:
    """[PROBE_BYTES] uint8: what a sender writes to show that it can."""
    return (torch.arange(PROBE_BYTES) * (2 * epoch + 1) + epoch).to(torch.uint8)


class Offer(NamedTuple):
    """What a sender needs to open a channel.

    Attributes:
        handles: of the memory of each rank's pool, as CUDA exports it.
        num_blocks: of each pool, the dummy block included.
        probe_offset: where the sender's test write goes, in bytes from each pool's beginning.
    """

    handles: tuple[bytes, ...]
    num_blocks: int
    probe_offset: int


class CudaIpcMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every message."""


class Places(CudaIpcMessage, frozen=True):
    """Some blocks of some layers of one leg, as a put names them."""

    request_id: str
    attempt: int
    first_layer: int
    last_layer: int
    first_position: int
    num_blocks: int


class CannotMap(CudaIpcMessage, frozen=True):
    """The pool that was offered cannot be mapped here."""

    reason: str


class Probe(CudaIpcMessage, frozen=True):
    """The sender has written its pattern where it was told to."""


class Ask(CudaIpcMessage, frozen=True):
    """Where does this go? For a put whose blocks the receiver has not lent by itself (Lend).

    Attributes:
        seq: numbers the questions of one channel.
    """

    seq: int
    places: Places


class Written(CudaIpcMessage, frozen=True):
    """These puts are in the pool."""

    puts: list[Places]


class Proven(CudaIpcMessage, frozen=True):
    """The sender's pattern is there."""


class Unfit(CudaIpcMessage, frozen=True):
    """It is not, or cannot be: the two need another kind of channel."""

    reason: str


class Lend(CudaIpcMessage, frozen=True):
    """The leg's blocks from this position on; the sender's to write until it has said that it has stopped.

    Attributes:
        seq: of the question that this answers; None: nobody asked.
    """

    seq: int | None
    request_id: str
    attempt: int
    first_position: int
    block_ids: list[int]


class Refuse(CudaIpcMessage, frozen=True):
    """The lease does not stand, or does not hold what was asked for."""

    seq: int


ToReceiver = CannotMap | Probe | Ask | Written
ToSender = Proven | Unfit | Lend | Refuse

encode = msgspec.msgpack.Encoder().encode
decode_to_receiver = msgspec.msgpack.Decoder(ToReceiver).decode
decode_to_sender = msgspec.msgpack.Decoder(ToSender).decode
