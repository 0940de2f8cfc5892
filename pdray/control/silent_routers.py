"""Which router replicas hang, and when the process of one is ended.

Serve replaces a replica that has died within seconds. One that hangs it first waits for, as long as its requests may go
on. So whoever knows the routers ends such a process, and leaves the rest to Serve:

    watches ──silent──▶ looked at: is it there, is it Serve's, does it answer? ──twice in a row it does not──▶ ended

A router that was never seen is never suspected: it may be starting, and a Coordinator that was started again knows
nobody. Another watch, or an answer, starts all over; and none is ended with which a worker holds a session.

Pure: time, signs of life and findings go in, effects come out. Single-threaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pdray.control.suspicions import Suspicions

SILENT_LIMIT_S = 4.0  # between looks, too; a router that is well watches every 2 s


class RouterProcess(NamedTuple):
    """Where a router replica runs.

    Attributes:
        replica_id: Serve's name of it.
        actor_id: Ray's; a replica's actor is never started again.
    """

    replica_id: str
    actor_id: str
    pid: int
    node_id: str


class Look(NamedTuple):
    """Find out whether the process is there and answers; report answered(), silent(), gone() or unknown()."""

    router_id: str
    process: RouterProcess


class EndRouter(NamedTuple):
    """End the process, if it is there and may_end() says so just before; report gone() or end_failed()."""

    router_id: str
    process: RouterProcess


RouterEffect = Look | EndRouter


@dataclass(slots=True)
class _Router:
    process: RouterProcess
    was_silent: bool = False  # when it was looked at last
    pending: RouterEffect | None = None
    session_at: float = float("-inf")


class SilentRouters:
    """Args:
    interval_s: tick() is called at least so often while the owner is awake.
    session_limit_s: what a worker has told of its sessions holds for so long.
    """

    def __init__(self, interval_s: float, session_limit_s: float) -> None:
        self.suspicions = Suspicions(interval_s)
        self._session_limit_s = session_limit_s
        self._routers: dict[str, _Router] = {}

    def watched(self, now: float, router_id: str, process: RouterProcess) -> None:
        """A router has asked for the view."""
        router = self._routers.get(router_id)
        if router is not None and router.process == process:
            self._alive(now, router_id, router)
            return
        self._routers[router_id] = _Router(process)
        self.suspicions.expect(
            now,
            router_id,
            process.replica_id,
            SILENT_LIMIT_S,
            sign="no watch",
            next="it is asked, and ended",
        )

    def session_seen(self, now: float, router_id: str) -> None:
        """A worker has told that it holds a session with that router."""
        if (router := self._routers.get(router_id)) is not None:
            router.session_at = now

    def left(self, router_id: str) -> None:
        """It has ended by itself."""
        if (router := self._routers.pop(router_id, None)) is not None:
            self.suspicions.forget(router_id, router.process.replica_id)

    def tick(self, now: float) -> list[Look]:
        """What is due now."""
        looks = []
        for suspicion in self.suspicions.due(now):
            router = self._routers[suspicion.who]
            if router.pending is None:  # else its report is still to come
                look = router.pending = Look(suspicion.who, router.process)
                looks.append(look)
        return looks

    # reports; one that was overtaken by a sign of life, or by another process of that name, is ignored

    def answered(self, now: float, look: Look) -> None:
        """Its event loop lives, though it does not watch: perhaps it cannot reach its Coordinator."""
        if (router := self._reported(look)) is not None:
            self._alive(now, look.router_id, router)

    def silent(self, look: Look) -> EndRouter | None:
        """It is there, Serve has it, and it does not answer. At the second time, what follows at once."""
        if (router := self._reported(look)) is None:
            return None
        if not router.was_silent:
            router.was_silent = True
            return None
        end = router.pending = EndRouter(*look)
        return end

    def unknown(self, look: Look) -> None:
        """Who was asked about it has not answered, or Serve does not know it: that says nothing about the router."""
        if (router := self._reported(look)) is not None:
            router.was_silent = False

    def gone(self, effect: RouterEffect) -> None:
        """Its process has ended."""
        if self._reported(effect) is not None:
            self.left(effect.router_id)

    def may_end(self, now: float, end: EndRouter) -> bool:
        """Whether nothing was heard of it since, and no worker holds a session with it."""
        router = self._routers.get(end.router_id)
        if router is None or router.pending is not end:
            return False
        if now - router.session_at <= self._session_limit_s:
            router.pending = None
            return False
        return True

    def end_failed(self, end: EndRouter) -> None:
        """Its process was not seen dead: it is ended again after another look, if it is still silent."""
        self._reported(end)

    def _reported(self, effect: RouterEffect) -> _Router | None:
        router = self._routers.get(effect.router_id)
        if router is None or router.pending is not effect:
            return None
        router.pending = None
        return router

    def _alive(self, now: float, router_id: str, router: _Router) -> None:
        router.was_silent, router.pending = False, None
        self.suspicions.heard(now, router_id, router.process.replica_id)
