"""Frames: what the two ends of a TCP connection write to each other, a 4-byte big-endian length and msgpack.

Nothing is unpickled.
"""

from __future__ import annotations

import asyncio

import msgspec

from pdray.wire.messages import AnyMessage

MAX_FRAME_BYTES = 64 * 1024 * 1024


class Data(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Attributes:
    seq: counts the messages of one direction of a session, from 1.
    ack: the last number that the sender of this frame has received.
    """

    seq: int
    ack: int
    message: AnyMessage


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=True):
    ack: int


class Close(msgspec.Struct, frozen=True, array_like=True, tag=True):
    reason: str


_encoder = msgspec.msgpack.Encoder()
decode_frame = msgspec.msgpack.Decoder(Data | Ack | Close).decode


def encode_frame(value: msgspec.Struct) -> bytes:
    body = _encoder.encode(value)
    return len(body).to_bytes(4, "big") + body


async def read_frame(reader: asyncio.StreamReader, limit: int) -> bytes:
    """The body of the next frame.

    Raises:
        ConnectionError: it is longer than ``limit`` bytes; none of it is read. EOFError: the connection has ended.
    """
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > limit:
        raise ConnectionError(f"a frame of {size} bytes is over the limit of {limit}")
    return await reader.readexactly(size)
