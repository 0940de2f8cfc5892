"""The shared channel kind: prefill computes where decode will read.

The lease's blocks come with the answer to BeginPut, and the first tokens with PutDone: what is left for a channel is to
say whether the two belong together, and to have an epoch. Weights and pool were mapped when the prefill worker started;
that they are its lender's, handles and fingerprint have shown.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from pdray.control.guests import why_no_guest
from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.transfer.channel import Kind, Link, Put, PutResult, Receiver, Sender, Sink, Site
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.cluster_view import WorkerInfo


class SharedSender(Sender):
    """A guest's end. Every block is where it belongs before anybody could put it."""

    kind = "shared"

    def __init__(self, link: Link) -> None:
        self.epoch = link.epoch
        self._peer = link.peer

    def put(self, put: Put) -> Future[PutResult]:
        """See Sender. Always fails: a guest has no blocks that its lender does not."""
        future: Future[PutResult] = Future()
        future.set_exception(TransferError(f"blocks were put to {self._peer}, in whose pool they lie"))
        return future

    def close(self) -> None:
        """See Sender. Steps in flight end by themselves; the lease table waits for them."""


class SharedReceiver(Receiver):
    """A lender's end of all its guests' channels."""

    kind = "shared"

    async def accept(self, worker_id: str, epoch: int) -> None:
        """See Receiver."""

    async def close(self) -> None:
        """See Receiver."""


class SharedKind(Kind):
    """Between a lender and its guests."""

    name = "shared"

    def __init__(self, site: Site) -> None:
        self._why_own = why_no_guest(site.config, site.worker_id)

    @property
    def facts(self) -> dict[str, str]:
        """See Kind. Of a guest nobody asks for the reason."""
        return {"own": self._why_own}

    @classmethod
    def obstacle(cls, prefill: WorkerInfo, decode: WorkerInfo) -> str | None:
        """See Kind."""
        if not prefill.lender:
            why = prefill.channels.get(cls.name, {}).get("own", "it is no guest")
            return f"{prefill.worker_id} has memory of its own ({why})"
        if prefill.lender != decode.incarnation:
            return f"{prefill.worker_id} computes in the memory of {prefill.lender}, and this is {decode.incarnation}"
        return None

    def attach(self, pool: KVPool) -> None:
        """See Kind."""

    def make_receiver(self, sink: Sink, writes: PendingWrites) -> SharedReceiver:
        """See Kind."""
        return SharedReceiver()

    async def open(self, link: Link, offer: Any) -> SharedSender:
        """See Kind."""
        return SharedSender(link)
