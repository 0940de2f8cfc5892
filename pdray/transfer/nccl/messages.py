"""Messages between the two ends of an nccl channel, beside the data that goes through NCCL."""

from __future__ import annotations

import msgspec

UniqueId = bytes | tuple[int, ...]  # of a communicator, as cupy has it


class NcclMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every message."""


class OpenCommunicators(NcclMessage, frozen=True):
    """The sender's ranks enter the inits of these communicators; so should the receiver's.

    Attributes:
        piece_bytes: of the pieces that all cut puts into: the largest that fit the slots of all of them.
        num_ranks: of the sender.
        unique_ids: of the communicator of each route (head_routes()), in their order.
    """

    piece_bytes: int
    num_ranks: int
    unique_ids: list[UniqueId]


class Staged(NcclMessage, frozen=True):
    """The beginning of a put lies in the sender's staging: asks for a grant.

    Attributes:
        seq: numbers the puts of one channel.
        request_id, attempt: the leg.
        first_layer, last_layer: half-open range.
        first_position, num_blocks: places among the leg's blocks. No blocks: a probe of the channel, of no leg.
    """

    seq: int
    request_id: str
    attempt: int
    first_layer: int
    last_layer: int
    first_position: int
    num_blocks: int


class GrantTransfers(NcclMessage, frozen=True):
    """The receiver receives these puts now, in this order, and nothing else from anyone until it has them."""

    seqs: list[int]


class RefuseTransfer(NcclMessage, frozen=True):
    """The lease does not stand: the put is dropped where it is staged."""

    seq: int


class TransferDone(NcclMessage, frozen=True):
    """Attributes:
    written: False if the lease ended before all of it was in the pool.
    """

    seq: int
    written: bool


class ChannelFailed(NcclMessage, frozen=True):
    """The receiver has given this epoch's channel up."""

    reason: str


ToReceiver = OpenCommunicators | Staged
ToSender = GrantTransfers | RefuseTransfer | TransferDone | ChannelFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_receiver = msgspec.msgpack.Decoder(ToReceiver).decode
decode_to_sender = msgspec.msgpack.Decoder(ToSender).decode
