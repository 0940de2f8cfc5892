"""What rank 0's end of the cuda_ipc kind has the other ranks of its worker do; see Kind.begin_answer()."""

from __future__ import annotations

import msgspec

from pdray.transfer.cuda_ipc.targets import Target


class RankOrder(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every order. The answer is empty where nothing else is said."""


class DescribeGpu(RankOrder, frozen=True):
    """Answered with GpuFacts."""


class LendPool(RankOrder, frozen=True):
    """Answered with the handle of the rank's pool."""


class ReadProbe(RankOrder, frozen=True):
    """Answered with the bytes of that test write."""

    number: int
    clear: bool


class OpenLink(RankOrder, frozen=True):
    """Map what this rank is to write to.

    Attributes:
        link: numbers the channels of one worker.
    """

    link: int
    peer: str
    targets: list[Target]


class WriteProbe(RankOrder, frozen=True):
    """Answered when the rank's parts of the test write are written."""

    link: int
    epoch: int


class WriteBlocks(RankOrder, frozen=True):
    """Answered when they are written. They are final.

    Attributes:
        ids: see pack_ids().
        num_programs: see write_peer_blocks().
    """

    link: int
    first_layer: int
    last_layer: int
    ids: bytes
    num_programs: int | None


class CloseLink(RankOrder, frozen=True):
    """Answered when nothing of it is mapped any more, also if there is no such link."""

    link: int


class GpuFacts(msgspec.Struct, frozen=True, array_like=True):
    """Of a Transport."""

    gpu: str
    host: str
    peers: list[str] | None


AnyOrder = DescribeGpu | LendPool | ReadProbe | OpenLink | WriteProbe | WriteBlocks | CloseLink

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(AnyOrder).decode
decode_facts = msgspec.msgpack.Decoder(GpuFacts).decode
