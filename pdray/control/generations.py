"""One generation's part in the hand-over when an application changes its configuration.

Every configuration of an application has a Coordinator and workers of its own: a generation. The one that a router
replica opened last is the one that Serve wants; it is the newest. It starts beside the older ones where there is room.
Where there is none it asks them to make room, again and again for as long as it needs it:

    SERVING ──asked for room──▶ DRAINING ──idle, or the grace is over──▶ YIELDED
       ▲                            │                                       │
       └──── the asker has withdrawn, given up, or is silent ◀──────────────┘

A generation that has yielded has no workers but remembers its configuration: should the newest one fail, it starts its
workers again. It ends once it is superseded (or has failed for good) and none of its routers is left.

Pure: time and events go in, effects come out. Single-threaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

ANNOUNCED_FOR_S = 15.0  # a successor that is silent for longer is gone
UNWATCHED_S = 20.0  # twice as long as a router's watch may be pending


class Phase(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"
    YIELDED = "yielded"


class StopWorkers(NamedTuple):
    """End the workers and free what they reserve; report workers_stopped()."""


class StartWorkers(NamedTuple):
    """Take the place back."""


class EndGeneration(NamedTuple):
    """End the workers and the Coordinator itself, for good."""

    reason: str


GenerationEffect = StopWorkers | StartWorkers | EndGeneration


@dataclass(slots=True)
class _Successor:
    opened_at: float
    seen_at: float
    needs_room: bool


@dataclass(slots=True)
class Generation:
    """Args:
    name: of the generation; decides between two that were opened at the same time.
    grace_s: for so long requests may go on after the workers were asked for.

    Attributes:
        opened_at: wall-clock time at which a router replica last opened this generation; compared between generations.
        failed: it can never start; the text says why.
    """

    name: str
    grace_s: float
    opened_at: float = 0.0
    failed: str | None = None
    phase: Phase = field(default=Phase.SERVING, init=False)
    _successors: dict[str, _Successor] = field(default_factory=dict, init=False)
    _routers: dict[str, float] = field(default_factory=dict, init=False)  # when each was last seen
    _asked_at: float = field(default=0.0, init=False)
    _stopping: bool = field(default=False, init=False)
    _ended: bool = field(default=False, init=False)

    def opened(self, wall_time: float, now: float) -> bool:
        """A new router replica joins. False: this generation is ending, and the replica must make another."""
        if self._ended:
            return False
        self.opened_at = max(self.opened_at, wall_time)
        self._routers[""] = now  # it has no name yet
        return True

    def router_seen(self, now: float, router_id: str, opened_at: float) -> None:
        """A router asks for the view.

        Args:
            opened_at: when it opened this generation, which a Coordinator that was started again does not know.
        """
        self._routers[router_id] = now
        self._routers.pop("", None)
        self.opened_at = max(self.opened_at, opened_at)

    def router_left(self, router_id: str) -> None:
        """A router has ended by itself."""
        self._routers.pop(router_id, None)

    def num_routers(self, now: float) -> int:
        """Routers that have watched lately."""
        return sum(bool(name) and now - seen <= UNWATCHED_S for name, seen in self._routers.items())

    def announced(self, now: float, name: str, opened_at: float, *, needs_room: bool) -> Phase:
        """Note another generation: when it was opened, and whether it needs this one's place. Returns the phase."""
        self._successors[name] = _Successor(opened_at, now, needs_room)
        return self.phase

    def is_newer_than(self, name: str, opened_at: float) -> bool:
        """Whether this generation was opened after another."""
        return (self.opened_at, self.name) > (opened_at, name)

    def drain_left_s(self, now: float) -> float:
        """Seconds for which requests may go on; 0 once the grace is over."""
        return max(0.0, self._asked_at + self.grace_s - now)

    def tick(self, now: float, *, idle: bool) -> list[GenerationEffect]:
        """Effects that are due now. Call it often.

        Args:
            idle: no request runs on this generation's workers.
        """
        if self._ended or self._stopping:
            return []
        newer = self._newer(now)
        reason = "a newer configuration has taken over" if newer else self.failed
        if reason and not self._watched(now):
            self._ended = True
            return [EndGeneration(reason)]
        asked = any(each.needs_room for each in newer)
        if self.phase is Phase.SERVING and asked:
            self.phase, self._asked_at = Phase.DRAINING, now
            return []
        if self.phase is Phase.DRAINING:
            if not asked:
                self.phase = Phase.SERVING
            elif idle or not self.drain_left_s(now):
                self._stopping = True
                return [StopWorkers()]
        if self.phase is Phase.YIELDED and not asked:
            self.phase = Phase.SERVING
            return [StartWorkers()]
        return []

    def workers_stopped(self) -> None:
        """They are gone, and what they had reserved is free."""
        self.phase, self._stopping = Phase.YIELDED, False

    def _newer(self, now: float) -> list[_Successor]:
        self._successors = {n: s for n, s in self._successors.items() if now - s.seen_at <= ANNOUNCED_FOR_S}
        return [each for name, each in self._successors.items() if not self.is_newer_than(name, each.opened_at)]

    def _watched(self, now: float) -> bool:
        self._routers = {n: seen for n, seen in self._routers.items() if now - seen <= UNWATCHED_S}
        return bool(self._routers)
