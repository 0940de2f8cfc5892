"""The processes of the simulated application, and how long things take in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pdray.control.membership import Membership
from pdray.control.silent_routers import Look, RouterProcess, SilentRouters
from pdray.control.suspicions import Suspicions
from pdray.wire.cluster_view import WorkerInfo

STEP_S = 0.25
WORKER_TIMEOUT_S = 2.0
COORDINATOR_LIMIT_S = 5.0  # twice
ORPHANED_AFTER_S = 60.0
SESSION_TIMEOUT_S = 4.0  # silent for 2 s, and then not back for 2 s
RAY_RESTART_S = 1.5
LOAD_S = 4.0  # at most
START_TIMEOUT_S = 30.0
SETTLE_S = 150.0
ROUND_TRIP_S = 4 * STEP_S  # of a question and its answer, at most: a limit less this is what makes a part sick
WATCH_S = 2.0  # a watch is pending for so long, at most, at a Coordinator that is well
NUM_WORKERS = 2
NUM_ROUTERS = 2


@dataclass(eq=False)
class Process:
    """Attributes:
    pause: steps for which its loops do not run, after an exception.
    idle_s: since it ran last. longest_idle_s: what makes it sick.
    was_idle_s, ran_at: how long it was idle before it ran again, and when it did.
    """

    name: str
    incarnation: str
    alive: bool = True
    stopped_at: float | None = None
    wakes_at: float | None = None
    idle_s: float = 0.0
    longest_idle_s: float = 0.0
    was_idle_s: float = 0.0
    ran_at: float = 0.0
    pause: int = 0

    @property
    def runs(self) -> bool:
        return self.alive and self.stopped_at is None


@dataclass(eq=False)
class Worker(Process):
    info: WorkerInfo | None = None
    loaded_at: float = 0.0
    lender: Worker | None = None
    masters: Suspicions = field(default_factory=lambda: Suspicions(STEP_S))
    asked_by: list[Coordinator] = field(default_factory=list)  # heartbeats that wait to be answered


@dataclass(eq=False)
class Router(Process):
    """A replica of Serve.

    Attributes:
        opens_at: from then on it watches.
        leaves_at: Serve stops it; it goes on until then.
        cut: while it cannot reach its Coordinator, what becomes of a question of that one to it: "answered", "failed"
            or "lost".
        questions: that wait to be answered.
        replaced_at: when Serve ends it, or starts another in its place.
    """

    silent: Suspicions = field(default_factory=lambda: Suspicions(STEP_S))
    suspect: Coordinator | None = None
    opens_at: float = 0.0
    leaves_at: float | None = None
    cut: str = ""
    cut_until: float = 0.0
    questions: list[tuple[Coordinator, Look]] = field(default_factory=list)
    replaced_at: float | None = None

    @property
    def router_id(self) -> str:
        return f"{self.name}.{self.incarnation}"

    @property
    def process(self) -> RouterProcess:
        return RouterProcess(self.router_id, self.router_id, 1, "node")


@dataclass(eq=False)
class Coordinator(Process):
    generation: int = 0
    table: Membership = field(default_factory=lambda: Membership(0, NUM_WORKERS, 0.5))
    suspicions: Suspicions = field(default_factory=lambda: Suspicions(STEP_S))
    adopts_at: float | None = None
    identified: set[Worker] = field(default_factory=set)  # that have answered who they are
    asked: set[str] = field(default_factory=set)  # incarnations whose heartbeat is under way
    answers: list[tuple[Worker, list[str]]] = field(default_factory=list)  # and the routers that it has sessions with
    watches: dict[Router, float] = field(default_factory=dict)  # until when each is pending
    calls: list[Router] = field(default_factory=list)  # that have asked for the view
    left: list[Router] = field(default_factory=list)
    routers: SilentRouters = field(default_factory=lambda: SilentRouters(STEP_S, WORKER_TIMEOUT_S))
    looks: dict[Look, float] = field(default_factory=dict)  # deadline of each question that is under way
    found: list[Look] = field(default_factory=list)  # answers to them
    told: dict[str, float] = field(default_factory=dict)  # when a worker has told of a session with a router
    loading: dict[Worker, float] = field(default_factory=dict)  # until when each is waited for
    effects: list[tuple[float, Any]] = field(default_factory=list)
    strays: dict[str, Worker] = field(default_factory=dict)
