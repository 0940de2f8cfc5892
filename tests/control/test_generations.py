"""Who serves while a configuration changes: one generation's table, and several of them with a simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pdray.control.generations import (
    ANNOUNCED_FOR_S,
    UNWATCHED_S,
    EndGeneration,
    Generation,
    GenerationEffect,
    Phase,
    StartWorkers,
    StopWorkers,
)

GRACE_S = 10.0


def served(opened_at: float = 100.0) -> Generation:
    """A generation with a router that watches at time 0."""
    generation = Generation("me", GRACE_S)
    assert generation.opened(opened_at, 0.0)
    generation.router_seen(0.0, "router-a", opened_at)
    return generation


def watched(generation: Generation, now: float, *, idle: bool = False) -> list[GenerationEffect]:
    generation.router_seen(now, "router-a", 0.0)
    return generation.tick(now, idle=idle)


def test_a_newer_one_that_has_room_disturbs_nobody() -> None:
    old = served()
    old.announced(1.0, "new", 200.0, needs_room=False)
    assert watched(old, 1.0, idle=True) == [] and old.phase is Phase.SERVING
    old.router_left("router-a")
    (end,) = old.tick(1.5, idle=True)
    assert isinstance(end, EndGeneration) and not old.opened(300.0, 2.0)


def test_room_is_made_once_requests_have_ended() -> None:
    old = served()
    old.announced(1.0, "new", 200.0, needs_room=True)
    assert watched(old, 1.0, idle=True) == [] and old.phase is Phase.DRAINING  # routers must hear of it first
    assert watched(old, 2.0) == [] and old.drain_left_s(2.0) == GRACE_S - 1.0
    assert watched(old, 3.0, idle=True) == [StopWorkers()]
    assert watched(old, 3.5, idle=True) == []  # it is being done
    old.workers_stopped()
    assert old.phase is Phase.YIELDED and watched(old, 4.0, idle=True) == []


def test_the_grace_ends_what_does_not_end() -> None:
    old = served()
    old.announced(1.0, "new", 200.0, needs_room=True)
    assert watched(old, 1.0) == []
    old.announced(10.9, "new", 200.0, needs_room=True)
    assert watched(old, 10.9) == []
    assert watched(old, 11.0) == [StopWorkers()]


def test_an_older_one_is_not_heard() -> None:
    new = served(200.0)
    assert new.announced(1.0, "old", 100.0, needs_room=True) is Phase.SERVING
    assert watched(new, 1.0, idle=True) == [] and new.phase is Phase.SERVING


def test_the_place_is_taken_back_from_one_that_fails_or_falls_silent() -> None:
    old = served()
    old.announced(1.0, "new", 200.0, needs_room=True)
    watched(old, 1.0)
    old.announced(2.0, "new", 200.0, needs_room=False)  # it has found room elsewhere, or failed
    assert watched(old, 2.0) == [] and old.phase is Phase.SERVING
    old.announced(3.0, "new", 200.0, needs_room=True)
    watched(old, 3.0)
    assert watched(old, 4.0, idle=True) == [StopWorkers()]
    old.workers_stopped()
    assert watched(old, 3.0 + ANNOUNCED_FOR_S) == []
    assert watched(old, 3.1 + ANNOUNCED_FOR_S) == [StartWorkers()] and old.phase is Phase.SERVING


def test_a_configuration_that_comes_back_is_the_newest_again() -> None:
    old, new = served(100.0), served(200.0)
    old.announced(1.0, "new", 200.0, needs_room=True)
    watched(old, 1.0)
    assert old.opened(300.0, 2.0)
    assert watched(old, 2.0) == [] and old.phase is Phase.SERVING
    new.announced(2.0, "old", old.opened_at, needs_room=True)
    watched(new, 2.0)
    assert new.phase is Phase.DRAINING


def test_only_what_is_superseded_or_has_failed_ends_when_nobody_watches() -> None:
    alone = served()
    assert alone.tick(10 * UNWATCHED_S, idle=True) == []
    alone.failed = "no such model"
    assert alone.tick(10 * UNWATCHED_S, idle=True) == [EndGeneration("no such model")]
    failed = served()
    failed.failed = "no such model"
    assert watched(failed, 10 * UNWATCHED_S) == []


@dataclass
class World:
    """Generations of one application on a cluster with room for one, and the newest one's wish for it."""

    generations: list[Generation] = field(default_factory=list)
    holds: list[bool] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    now: float = 0.0

    def open(self, index: int | None) -> None:
        """A replica of a new configuration, or of one that was there before."""
        if index is None or index in self.ended:
            self.generations.append(Generation(str(len(self.generations)), GRACE_S))
            self.holds.append(False)
            index = len(self.generations) - 1
        assert self.generations[index].opened(1000.0 + self.now, self.now)

    def step(self, routers: set[int], busy: bool) -> None:
        self.now += 1.0
        alive = [i for i in range(len(self.generations)) if i not in self.ended]
        for i in alive:
            if i in routers:
                self.generations[i].router_seen(self.now, f"router-{i}", 0.0)
        for i in alive:
            me = self.generations[i]
            for j in alive:
                if j != i:
                    wants = me.phase is Phase.SERVING and (self.holds[i] or any(self.holds))
                    self.generations[j].announced(self.now, str(i), me.opened_at, needs_room=wants)
            for effect in me.tick(self.now, idle=not busy):
                match effect:
                    case StopWorkers():
                        self.holds[i] = False
                        me.workers_stopped()
                    case EndGeneration():
                        self.holds[i] = False
                        self.ended.add(i)
            if i not in self.ended and me.phase is Phase.SERVING and not any(self.holds):
                self.holds[i] = True
        assert sum(self.holds) <= 1


@given(st.lists(st.tuples(st.sampled_from(["open", "back", "quiet"]), st.booleans(), st.integers(1, 20)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_whatever_is_deployed_the_newest_has_the_room_in_the_end(script: list[tuple[str, bool, int]]) -> None:
    """Never two at once; in the end the one opened last, with the older ones gone."""
    world = World()
    world.open(None)
    for what, busy, steps in script:
        if what == "open":
            world.open(None)
        elif what == "back":
            world.open(0)
        everyone = set(range(len(world.generations)))
        for _ in range(steps):
            world.step(everyone, busy)
    newest = max(
        range(len(world.generations)), key=lambda i: (i not in world.ended, world.generations[i].opened_at, str(i))
    )
    for _ in range(100):
        world.step({newest}, busy=True)
    assert world.holds[newest]
    assert world.ended == set(range(len(world.generations))) - {newest}
