"""Supervision against thousands of interleavings of death, hang, late wake, exception and failed effects.

No healthy worker, router or Coordinator is ever ended, no two Coordinators act, and whatever is sick is replaced.

PDRAY_MODEL_WALKS sets how many random walks are made (default: some hundred, some seconds).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pdray.control.membership import Membership
from pdray.control.silent_routers import EndRouter, Look, SilentRouters
from pdray.control.suspicions import Suspicion, Suspicions

for _name in ("supervision_parts", "supervised_routers", "supervised_workers", "supervision_world"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    _module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
supervision_world = sys.modules["supervision_world"]

NUM_WALKS = int(os.environ.get("PDRAY_MODEL_WALKS", "2400")) // 12
WALK_STEPS = 400


@pytest.mark.parametrize("guests", [False, True], ids=["alone", "guests"])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_random_walks_violate_nothing(rate: float, guests: bool) -> None:
    for seed in range(NUM_WALKS // 6):
        assert supervision_world.walk(seed, WALK_STEPS, rate, guests=guests) == [], f"seed {seed}"


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_lender_takes_its_guest_along_and_no_guest_its_lender(victim: str) -> None:
    world = supervision_world.World(0, guests=True)
    while not world.whole:
        world.step()
    workers, world.disturb = dict(world.workers), False
    world.stop(world.workers[victim], None)
    began = world.now
    while world.now < began + 30.0:
        world.step()
    assert world.problems == [] and world.whole
    replaced = {name for name, worker in world.workers.items() if worker is not workers[name]}
    assert replaced == ({"prefill-0"} if victim == "prefill-0" else {"prefill-0", "decode-0"})


@pytest.mark.parametrize("name", ["coordinator", "decode-0", "router-0"])
@pytest.mark.parametrize("seconds", [None, 10.0, 90.0])
def test_one_part_hangs(name: str, seconds: float | None) -> None:
    """Within 20 s all is whole again, and only the part that hung was replaced."""
    world = supervision_world.World(0)
    while not world.whole:
        world.step()
    workers, routers = dict(world.workers), list(world.serve.current)
    victim = next(p for p in (*workers.values(), *world.serve.all, world.coordinator) if p.name == name)
    world.disturb = False
    world.stop(victim, seconds)
    began = world.now
    while world.now < began + 20.0:
        world.step()
    assert world.problems == [] and world.whole
    assert {n for n, worker in world.workers.items() if worker is not workers[n]} == {name} & workers.keys()
    assert {router.name for router in world.serve.current if router not in routers} <= {name}
    assert world.coordinator.incarnation == "1" or name == "coordinator"
    assert world.settle() == []


class TrustsTheClock(Suspicions):
    """Time in which the owner itself was stopped counts as others' silence."""

    def _look(self, now: float) -> None:
        self._looked_at = now
        self._awake_s = now


class SuspectsNobody(Suspicions):
    """A sick part is never replaced."""

    def due(self, now: float) -> list[Suspicion]:
        return []


class EndsAtOnce(SilentRouters):
    """One question that is not answered is enough."""

    def silent(self, look: Look) -> EndRouter | None:
        if look.router_id in self._routers:
            self._routers[look.router_id].was_silent = True
        return super().silent(look)


class TakesForSilent(SilentRouters):
    """What is no silence counts as one."""

    def __init__(self, interval_s: float, session_limit_s: float) -> None:
        super().__init__(interval_s, session_limit_s)
        self._owed: list[EndRouter] = []

    def tick(self, now: float) -> list[Any]:
        owed, self._owed = self._owed, []
        return [*super().tick(now), *owed]

    def _silent(self, look: Look) -> None:
        if (end := self.silent(look)) is not None:
            self._owed.append(end)


class HearsNoAnswer(TakesForSilent):
    """A router that answers is silent to it all the same."""

    def answered(self, now: float, look: Look) -> None:
        self._silent(look)


class TakesIgnoranceForSilence(TakesForSilent):
    """Whoever could be asked about a router does not say, and it is ended."""

    def unknown(self, look: Look) -> None:
        self._silent(look)


class ForgetsSessions(SilentRouters):
    """What workers tell of their sessions is no sign of life."""

    def session_seen(self, now: float, router_id: str) -> None:
        return


class GuestsOutliveTheirLender(Membership):
    """What computes in a dead process's memory goes on, and holds it."""

    def _has_own_memory(self, guest: str) -> bool:
        return True


class StartsLendersBesideGuests(Membership):
    """The successor does not wait until they have ended."""

    def _may_start(self, worker_id: str, names_taken: set[str]) -> bool:
        return worker_id not in self.guests or super()._may_start(worker_id, names_taken)


@pytest.mark.parametrize(
    "mutant",
    [
        {"suspicions": TrustsTheClock},
        {"suspicions": SuspectsNobody},
        {"fenced": False},
        {"vigilant": False},
        {"vigilant": False, "orphans_ask_routers": False},
        {"silent_routers": EndsAtOnce},
        {"silent_routers": HearsNoAnswer},
        {"silent_routers": TakesIgnoranceForSilence},
        {"silent_routers": ForgetsSessions},
        {"asks_ray": False},
        {"guests": True, "members": GuestsOutliveTheirLender},
        {"guests": True, "members": StartsLendersBesideGuests},
    ],
    ids=str,
)
def test_the_check_has_teeth(mutant: dict[str, Any]) -> None:
    """Each seeded bug is found within some hundred walks."""
    assert any(supervision_world.walk(seed, WALK_STEPS, 0.1, **mutant) for seed in range(400))
