"""Messages between a prefill and a decode worker: permission to write, and the hand-over."""

from __future__ import annotations

from pdray.outputs import SampledToken
from pdray.wire.message import LegMessage, Message


class BeginPut(LegMessage, frozen=True):
    """Ask to start writing into the lease; sent as soon as the leg is queued at the prefill worker. A guest computes
    nothing before it is told where. No byte is written before BeginPutReply says yes. May be repeated."""

    epoch: int


class BeginPutReply(LegMessage, frozen=True):
    """Attributes:
    block_ids, num_cached_tokens: for a guest, the blocks to compute the prompt in, and how much of them is there.
    """

    granted: bool
    block_ids: list[int] = []
    num_cached_tokens: int = 0


class PutDone(LegMessage, frozen=True):
    """Every put of the leg was issued; decoding may start once ``num_puts`` of them have arrived.

    Attributes:
        tokens: the first token of each index, which decode continues from.
        put_tail: seconds from the first token's sampling until this message.
    """

    num_puts: int
    tokens: list[SampledToken]
    put_tail: float


class AbortPut(LegMessage, frozen=True):
    """The lease was closed; stop writing and answer PutAborted. May be repeated."""


class PutAborted(LegMessage, frozen=True):
    """No put of this leg is in flight and none will start: a quarantine may end."""


class ChannelMessage(Message, frozen=True):
    """A message between the two ends of a channel.

    Attributes:
        kind: of channel. payload: opaque to everyone but that kind.
    """

    kind: str
    epoch: int
    payload: bytes
