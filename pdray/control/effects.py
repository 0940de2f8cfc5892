"""Requests of pure control code to its owner, returned in the order in which to perform them."""

from __future__ import annotations

from typing import NamedTuple

from pdray.wire.cluster_view import WorkerInfo
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage


class Send(NamedTuple):
    """Send a message to a peer by its id. A peer without a session is gone: drop it."""

    to: str
    message: AnyMessage


class StartCompute(NamedTuple):
    """Give the leg to the prefill engine."""

    key: LegKey


class FlushPuts(NamedTuple):
    """Issue the leg's puts that were held back, then call puts_flushed()."""

    key: LegKey


class StopCompute(NamedTuple):
    """Stop computing the leg, whose blocks are a decode worker's; call stopped() once no step writes to them."""

    key: LegKey


class Release(NamedTuple):
    """Stop computing the leg and unpin its blocks: no put of it is in flight."""

    key: LegKey


LedgerEffect = Send | StartCompute | FlushPuts | StopCompute | Release


class Start(NamedTuple):
    """Create the worker's actor and load it; report ready() or start_failed().

    Attributes:
        lender: the decode worker whose guest it is to be.
    """

    worker_id: str
    incarnation: str
    lender: WorkerInfo | None = None


class Kill(NamedTuple):
    """Make sure that this process is dead; report died() or kill_failed()."""

    worker_id: str
    incarnation: str


class Connect(NamedTuple):
    """Let the decode worker accept the epoch, then let the prefill worker connect; report connected() or
    connect_failed()."""

    prefill: WorkerInfo
    decode: WorkerInfo
    epoch: int


class TellGone(NamedTuple):
    """Tell this process of a worker that a peer's process was seen dead; report told() or tell_failed()."""

    worker_id: str
    incarnation: str
    gone: WorkerInfo


MembershipEffect = Start | Kill | Connect | TellGone


def describe(effect: MembershipEffect) -> str:
    """The effect in words, for logs."""
    match effect:
        case Start(worker_id):
            return f"the start of {worker_id}"
        case Kill(_, incarnation):
            return f"the end of {incarnation}"
        case Connect(prefill, decode, epoch):
            return f"connecting {prefill.worker_id} to {decode.worker_id} in epoch {epoch}"
        case TellGone(worker_id, _, gone):
            return f"telling {worker_id} of the end of {gone.incarnation}"
