"""Messages between the two ends of an nccl channel, beside the data that goes through NCCL."""

from __future__ import annotations

import msgspec


class NcclMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every message."""


class OpenCommunicator(NcclMessage, frozen=True):
    """The sender enters the init of the communicator that was offered for this epoch; so should the receiver.

    Attributes:
        piece_bytes: of the pieces that both cut puts into: the largest that fit the slots of both.
    """

    piece_bytes: int


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


ToReceiver = OpenCommunicator | Staged
ToSender = GrantTransfers | RefuseTransfer | TransferDone | ChannelFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_receiver = msgspec.msgpack.Decoder(ToReceiver).decode
decode_to_sender = msgspec.msgpack.Decoder(ToSender).decode
