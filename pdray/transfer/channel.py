"""The interface of every channel.

A channel joins one prefill worker to one decode worker for one epoch. Its sending half lives at the
prefill worker (`SendChannel`); what arrives at the decode worker goes through a `BlockSink`, which
asks the lease table before a byte is written. Sources stay pinned and destinations stay leased by
the caller until the put's future is done; a channel owns only its own staging.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from pdray.cluster.messages import ChannelReply


class Put(NamedTuple):
    """Some blocks of some layers of one leg.

    Attributes:
        key: the leg that the blocks belong to.
        layers: half-open range of layers.
        source_blocks, destination_blocks: block ids, same length, pairwise; at least one.
        ready: on CUDA, the event after which the source is final; None: it is.
    """

    key: Hashable
    layers: range
    source_blocks: list[int]
    destination_blocks: list[int]
    ready: Any = None


class PutResult(NamedTuple):
    """Attributes:
    accepted: False if the receiver no longer held the lease and wrote nothing more.
    num_bytes: payload moved. seconds: from put() until the receiver had it.
    """

    accepted: bool
    num_bytes: int
    seconds: float


class SendChannel(Protocol):
    """The prefill worker's half.

    put() may be called from the event loop's thread only and never blocks. Its future completes,
    from any thread, once the source may be overwritten and nothing of this put can reach the
    destination any more; it fails with TransferError when the channel is closed or the put failed.
    What a failed put had brought as far as the receiver is written only while its lease stands.
    """

    epoch: int
    kind: str  # as configured

    def put(self, put: Put) -> Future[PutResult]: ...

    def on_message(self, message: ChannelReply) -> None:
        """What the other half says over the pair's session. Event loop's thread only."""

    def close(self) -> None:
        """Fail what is in flight and refuse what follows. Idempotent; returns when this half does
        nothing any more. May block up to the channel's deadline; not for the event loop's thread."""


class BlockSink(Protocol):
    """The decode worker's half: what a channel may write, and that it did. Event loop's thread only."""

    def may_write(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        """Whether the leg's lease lets that worker write in that epoch (not closed, quarantined, replaced)."""
        ...

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        """One put of the leg is wholly in the pool; False if it may not be any more, and does not count."""
        ...
