"""A table of suspicions: silent processes, the sign that is missing, for how long, and what follows.

Every process that waits for another keeps one: the Coordinator about its workers, a router about its Coordinator,
a worker about its Coordinator and routers. It measures silence in time during which its owner was awake itself. An
owner that was stopped, or whose event loop stood still, could not hear anything: such a gap between two looks counts
as one interval, and is followed by a grace in which the answers that have arrived can be read.

Pure: time and signs of life go in, suspicions come out. Single-threaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Suspicion(NamedTuple):
    """Attributes:
    who: the part that is silent, e.g. "decode-0".
    incarnation: of its process, as far as known.
    silent_s: for how long, as measured by an owner that was awake.
    sign: by what it is suspected: "no heartbeat".
    next: what follows: "killed and replaced".
    """

    who: str
    incarnation: str
    silent_s: float
    sign: str
    next: str

    def __str__(self) -> str:
        return f"{self.who}: {self.sign} for {self.silent_s:.1f} s; {self.next}"


@dataclass(slots=True)
class _Watched:
    incarnation: str
    limit_s: float
    sign: str
    next: str
    heard_at: float  # of the table's own time
    grace_until: float = 0.0


@dataclass(slots=True)
class Suspicions:
    """Args:
    interval_s: due() is called at least so often while the owner is awake.
    """

    interval_s: float
    _watched: dict[str, _Watched] = field(default_factory=dict, init=False)
    _awake_s: float = field(default=0.0, init=False)
    _looked_at: float | None = field(default=None, init=False)

    def expect(self, now: float, who: str, incarnation: str, limit_s: float, *, sign: str, next: str) -> None:
        """Expect signs of life at most limit_s apart from now on. Replaces another incarnation."""
        self._look(now)
        self._watched[who] = _Watched(incarnation, limit_s, sign, next, self._awake_s)

    def heard(self, now: float, who: str, incarnation: str) -> None:
        """Note a sign of life. Ignored if it is of another incarnation, or was not expected."""
        self._look(now)
        watched = self._watched.get(who)
        if watched is not None and watched.incarnation == incarnation:
            watched.heard_at, watched.grace_until = self._awake_s, 0.0

    def forget(self, who: str, incarnation: str) -> None:
        """Stop expecting signs of life: it ended, or is being ended."""
        if (watched := self._watched.get(who)) is not None and watched.incarnation == incarnation:
            del self._watched[who]

    def due(self, now: float) -> list[Suspicion]:
        """Suspicions whose limit has passed. Each is returned once; if it is still expected, its limit starts again."""
        self._look(now)
        found = []
        for who, watched in self._watched.items():
            if self._silence(watched) >= watched.limit_s and self._awake_s >= watched.grace_until:
                found.append(self._suspicion(who, watched))
                watched.heard_at, watched.grace_until = self._awake_s, 0.0
        return found

    def growing(self, now: float) -> list[Suspicion]:
        """Suspicions past half of their limit, for `pdray status`."""
        self._look(now)
        return [
            self._suspicion(who, watched)
            for who, watched in self._watched.items()
            if self._silence(watched) > watched.limit_s / 2
        ]

    def _look(self, now: float) -> None:
        """Advance the table's own time. A grace ends at twice the limit, or an owner that always lags would never have
        a suspicion."""
        gap = 0.0 if self._looked_at is None else max(0.0, now - self._looked_at)
        self._looked_at = now
        self._awake_s += min(gap, self.interval_s)
        if gap > 2 * self.interval_s:
            for watched in self._watched.values():
                grace = min(gap, watched.limit_s)
                watched.grace_until = min(self._awake_s + grace, watched.heard_at + 2 * watched.limit_s)

    def _silence(self, watched: _Watched) -> float:
        return self._awake_s - watched.heard_at

    def _suspicion(self, who: str, watched: _Watched) -> Suspicion:
        return Suspicion(who, watched.incarnation, self._silence(watched), watched.sign, watched.next)
