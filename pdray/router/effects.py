"""What a router's state machine asks of its owner. Effects are returned in the order to perform them."""

from __future__ import annotations

from typing import NamedTuple

from pdray.control.effects import Send
from pdray.control.pair_health import BrokenPair
from pdray.router.request import Request
from pdray.wire.cluster_view import WorkerInfo


class Connect(NamedTuple):
    """Open a session to the worker, after a while, and report opened(). Try until then, or until Disconnect."""

    worker: WorkerInfo
    delay_s: float


class Disconnect(NamedTuple):
    """Close the session to this worker, or stop trying to open one. Nothing is reported of it any more."""

    worker_id: str


class Granted(NamedTuple):
    """The request has its first lease, or begins without one."""

    request: Request


class Progress(NamedTuple):
    """The request has new tokens."""

    request: Request


class Ended(NamedTuple):
    """The request has ended: with an error, or complete, or given up by its consumer. Once for each request."""

    request: Request
    error: Exception | None


class TickAt(NamedTuple):
    """Call tick() at that time, besides its regular calls."""

    at: float


class BecameReady(NamedTuple):
    """Requests can be served for the first time."""


class ReportBroken(NamedTuple):
    """Tell the Coordinator of pairs that are connected and do not serve."""

    pairs: list[BrokenPair]


class ProbesDone(NamedTuple):
    """The round of probes is over."""


RouterEffect = (
    Send | Connect | Disconnect | Granted | Progress | Ended | TickAt | BecameReady | ReportBroken | ProbesDone
)
