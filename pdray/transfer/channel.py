"""The interface of a channel kind: one object with both ends.

A channel joins one prefill worker to one decode worker for one epoch. Each worker process makes one ``Kind`` object
for every kind that its configuration allows. On a prefill worker it opens a ``Sender`` for each decode worker; on a
decode worker it makes one ``Receiver`` for all prefill workers. Actors carry the messages between the two ends as
opaque bytes.

A put names a leg and positions in its lease, never blocks of the pool that it is written to: the ``Sink`` turns
positions into blocks where they land, and refuses what the lease does not hold. Sources stay pinned and destinations
stay leased by the caller until the put's future is done; a channel owns only its own staging.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pdray.config import Config
from pdray.wire.cluster_view import WorkerInfo

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pdray.engine.kv.pool import KVPool
    from pdray.transfer.pending_writes import PendingWrites
    from pdray.transfer.pool_blocks import WholeBlocks


class Put(NamedTuple):
    """Some blocks of some layers of one leg.

    Attributes:
        key: the leg that the blocks belong to.
        layers: half-open range of layers.
        source_blocks: ids in the sender's pool, at least one.
        first_position: where source_blocks[0] goes: its place among the leg's blocks, from 0. The others follow.
        ready: on CUDA, the event after which the source is final; None: it is.
    """

    key: Hashable
    layers: range
    source_blocks: list[int]
    first_position: int
    ready: Any = None

    @property
    def positions(self) -> range:
        """Half-open range of places among the leg's blocks, one for each source block."""
        return range(self.first_position, self.first_position + len(self.source_blocks))


class PutResult(NamedTuple):
    """Attributes:
    accepted: False if the receiver no longer held the lease and wrote nothing more.
    num_bytes: payload moved. seconds: from put() until the receiver had it.
    """

    accepted: bool
    num_bytes: int
    seconds: float


class Site(NamedTuple):
    """The worker process that a kind works for.

    Attributes:
        num_peers: decode workers that a prefill worker sends to; 1 on a decode worker.
        on_fatal: called on the event loop's thread if the device cannot be relied on any more.
        address: at which the worker's peers reach it; "" on one machine alone.
    """

    config: Config
    worker_id: str
    device: torch.device
    num_peers: int
    on_fatal: Callable[[BaseException], None]
    address: str = ""


class Link(NamedTuple):
    """A sender's way to its decode worker.

    Attributes:
        send: hands the receiver's on_message() these bytes, over the pair's session; event loop's thread only.
        call: hands the receiver's on_array() these bytes and this array, through a Ray actor call; from any thread.
            Returns the call's object reference.
        on_failed: the channel has failed by itself, and why: its owner closes it; event loop's thread only.
    """

    peer: str
    epoch: int
    send: Callable[[bytes], None]
    call: Callable[[bytes, np.ndarray[Any, Any]], Any]
    on_failed: Callable[[str], None]


class Sender(ABC):
    """A prefill worker's end of one channel, of one epoch."""

    kind: ClassVar[str]
    epoch: int

    async def check(self) -> None:
        """Show that the channel works, once what the receiver says reaches on_message().

        Raises:
            TransferError: it does not.
        """
        return

    @abstractmethod
    def put(self, put: Put) -> Future[PutResult]:
        """Send blocks. Event loop's thread only; never blocks.

        The future completes, from any thread, once the source may be overwritten and nothing of this put can reach the
        destination any more; it fails with TransferError when the channel is closed or the put failed. What a failed
        put had brought as far as the receiver is written only while its lease stands.
        """

    def on_message(self, epoch: int, payload: bytes) -> None:
        """Take a message of the receiver, which came over the pair's session. Event loop's thread only."""
        raise TypeError(f"a channel of kind {self.kind} takes no messages")

    def step_ended(self) -> None:
        """The engine has seen a step end: a put that waited for it may be done. A hint; event loop's thread only."""
        return

    def end_leg(self, key: Hashable) -> None:
        """No put of this leg will follow, and none is in flight. Event loop's thread only."""
        return

    @abstractmethod
    def close(self) -> None:
        """Fail what is in flight and refuse what follows. Idempotent; returns when this end does nothing any more.

        May block up to the channel's deadline; not for the event loop's thread.
        """


class Receiver(ABC):
    """A decode worker's end of all its channels of one kind. Event loop's thread only."""

    kind: ClassVar[str]

    @abstractmethod
    async def accept(self, worker_id: str, epoch: int) -> Any:
        """A prefill worker will open this epoch, after its older one was closed. Returns what Kind.open() needs."""

    def on_message(self, worker_id: str, epoch: int, payload: bytes, send: Callable[[bytes], None]) -> None:
        """Take a sender's message, which came over the pair's session; ``send`` answers while the session lives."""
        raise TypeError(f"a channel of kind {self.kind} takes no messages")

    async def on_array(self, worker_id: str, epoch: int, payload: bytes, array: np.ndarray[Any, Any]) -> bool:
        """Take an array that a sender passed to Link.call(). Returns whether it counts."""
        raise TypeError(f"a channel of kind {self.kind} takes no arrays")

    def let_in(self, key: Hashable, worker_id: str, epoch: int, positions: range) -> None:
        """From now on that worker may write into these places of the leg: a kind may say where they are before it is
        asked. The leg's blocks are held until the worker has said that it has stopped, or was seen dead."""
        return

    def take_failure(self, worker_id: str) -> str | None:
        """Why this kind does not join that worker, as its last connection has shown; told once. None: it has not."""
        return None

    def senders(self) -> list[str]:
        """Prefill workers whose channels are open here, of kinds that keep something open."""
        return []

    def close_link(self, worker_id: str) -> Coroutine[Any, Any, None]:
        """End a sender's channel, if there is one. Its messages are ignored at once; writes on its behalf have ended
        when the coroutine returns."""
        return _nothing()

    @abstractmethod
    async def close(self) -> None:
        """End all channels; returns when nothing is written any more."""


class Sink(Protocol):
    """The lease table as a receiver sees it: what may be written where, and that it was. Event loop's thread only."""

    def resolve(self, key: Hashable, worker_id: str, epoch: int, layers: range, positions: range) -> list[int] | None:
        """Blocks of the pool for these positions of the leg.

        None if that worker may not write them in that epoch: the lease is closed, quarantined or another's, or does
        not hold all of these layers and positions.
        """
        ...

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        """One put of the leg is wholly in the pool; False if it may not be any more, and does not count."""
        ...


class Kind(ABC):
    """One way for blocks to travel, at one worker.

    The constructor takes what memory the kind needs of the device, before the pool is sized; attach() follows when the
    pool is there. Both may wait for the device and run before any channel is open.
    """

    name: ClassVar[str]

    @abstractmethod
    def __init__(self, site: Site) -> None: ...

    @property
    def spare_bytes(self) -> int:
        """Memory behind the blocks of a decode worker's pool, of a kind that lends that pool to prefill workers."""
        return 0

    @property
    def facts(self) -> dict[str, str]:
        """Facts about this worker for obstacle(); travel in WorkerInfo.channels."""
        return {}

    @classmethod
    @abstractmethod
    def obstacle(cls, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
        """The reason why this kind cannot join the two; None if it can."""

    @abstractmethod
    def attach(self, pool: KVPool) -> None:
        """Take the worker's pool; warm up."""

    def attach_ranks(self, blocks: WholeBlocks, dtype: torch.dtype) -> None:
        """Take the pools of a worker of several ranks, of which each has some of the heads, in place of attach()."""
        raise TypeError(f"a channel of kind {self.name} joins no workers of several ranks")

    @abstractmethod
    def make_receiver(self, sink: Sink, writes: PendingWrites) -> Receiver:
        """The decode worker's end. Event loop's thread; once.

        Args:
            sink: asked before anything is written. writes: is told of each write while it lasts.
        """

    @abstractmethod
    async def open(self, link: Link, offer: Any) -> Sender:
        """A prefill worker's end of one channel; Sender.check() follows.

        Args:
            offer: what the receiver's accept() returned.

        Raises:
            TransferError: it did not come about. HandshakeError: the two ends do not fit.
        """


async def _nothing() -> None: ...
