"""What rank 0's end of the nccl kind has the other ranks of its worker do; see Kind.begin_answer()."""

from __future__ import annotations

import msgspec
import numpy as np

from pdray.transfer.nccl.messages import UniqueId


class RankOrder(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every order. The answer is empty where nothing else is said.

    Attributes of most:
        link: numbers the channels of one worker.
        unique_ids: of the communicators of this rank's routes, in their order.
    """


class SetUp(RankOrder, frozen=True):
    """Answered with RankFacts, once this rank has the staging of its routes.

    Attributes:
        rank, num_ranks: of this worker. num_kv_heads: of the model.
    """

    rank: int
    num_ranks: int
    num_kv_heads: int


class OpenLanes(RankOrder, frozen=True):
    """Answered when this rank is connected with those of the peer that it has heads for."""

    link: int
    peer: str
    epoch: int
    piece_bytes: int
    unique_ids: list[UniqueId]


class MoveBlocks(RankOrder, frozen=True):
    """Some blocks of some layers.

    Attributes:
        ids: see pack_ids(). No blocks: a probe.
    """

    link: int
    first_layer: int
    last_layer: int
    ids: bytes


class OpenSends(OpenLanes, frozen=True):
    """To send by."""


class SendBlocks(MoveBlocks, frozen=True):
    """Answered when they are sent. They are final, and the receiver has granted them."""


class CloseSends(RankOrder, frozen=True):
    """Answered when nothing of it is sent any more, and its staging is free; also if there is no such link."""

    link: int


class OpenReceives(OpenLanes, frozen=True):
    """To receive by."""


class ReceiveBlocks(MoveBlocks, frozen=True):
    """Answered, when nothing of it is written any more, with whether all of it has come."""


class SetPatience(RankOrder, frozen=True):
    """See ReceiveThread.others_wait and Sink.is_connected(); for what this link receives."""

    link: int
    others_wait: bool
    is_connected: bool


class GiveUp(RankOrder, frozen=True):
    """Answered when the link's communicators are aborted; also if there is no such link."""

    link: int
    reason: str


class StopReceiving(RankOrder, frozen=True):
    """All links were given up, and no other will be opened."""


class RankFacts(msgspec.Struct, frozen=True, array_like=True):
    """Attributes:
    gpu: of the rank. piece_bytes: the largest that fits a slot of each of its stagings; None: it has none.
    """

    gpu: str
    piece_bytes: int | None


AnyOrder = (
    SetUp | OpenSends | SendBlocks | CloseSends | OpenReceives | ReceiveBlocks | SetPatience | GiveUp | StopReceiving
)

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(AnyOrder).decode
decode_facts = msgspec.msgpack.Decoder(RankFacts).decode
decode_arrived = msgspec.msgpack.Decoder(bool).decode


def pack_ids(block_ids: list[int]) -> bytes:
    """As unpack_ids() takes them."""
    return np.array(block_ids, dtype=np.int32).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    block_ids: list[int] = np.frombuffer(data, dtype=np.int32).tolist()
    return block_ids
