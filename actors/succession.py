"""The hand-over between the configurations of one application: what one generation says to the others, and does.

`pdray.control.generations` decides; this class asks the other generations' Coordinators, looks for room, and tells its
owner what to do. Runs on the Coordinator's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Protocol

import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util import list_named_actors

from pdray.actors.placement import NAMESPACE, cluster_nodes
from pdray.actors.places import demands
from pdray.actors.questions import ask
from pdray.config import Config
from pdray.control.generations import EndGeneration, Generation, Phase, StartWorkers, StopWorkers
from pdray.control.room import Held, Room, explain, find_room
from pdray.errors import PlacementError

logger = logging.getLogger(__name__)

PREFIX = "coordinator:"
STEP_S = 0.5
ANSWER_TIMEOUT_S = 2.0


class Standing(msgspec.Struct, frozen=True):
    """The state of one generation, as it tells the others.

    Attributes:
        held: node id and resources of each worker or bundle.
        num_running: requests on its workers.
    """

    opened_at: float
    phase: str
    held: list[tuple[str, dict[str, float]]]
    num_running: int
    drain_left_s: float


class SuccessionOwner(Protocol):
    """The Coordinator's side. Each may take a while."""

    async def num_running(self) -> int:
        """Requests on its workers."""

    async def held(self) -> list[Held]:
        """Resources that it reserves now."""

    async def stop_workers(self) -> None:
        """End the workers, and free what they reserve."""

    async def end(self, reason: str) -> None:
        """End for good."""

    def waits(self, reason: str) -> None:
        """The workers cannot start yet."""

    def fails(self, error: Exception) -> None:
        """The workers can never start."""

    def phase_changed(self) -> None:
        """Routers must know."""


def coordinator_name(app_name: str, fingerprint: str) -> str:
    return f"{PREFIX}{app_name}:{fingerprint}"


def coordinator_names() -> list[str]:
    """Names of the Coordinators of all applications in this Ray cluster. Asks Ray's GCS."""
    actors = list_named_actors(all_namespaces=True)
    return [a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(PREFIX)]


def application_of(coordinator: str) -> str:
    """The application of a Coordinator's name."""
    return coordinator.removeprefix(PREFIX).rpartition(":")[0]


class Succession:
    """See the module.

    Attributes:
        generation: this Coordinator's.
        may_start: there is room for the workers, or was: they may be started, and started again.
    """

    def __init__(self, config: Config, app_name: str, owner: SuccessionOwner) -> None:
        self.may_start = False
        self._config = config
        self._app_name = app_name
        self._name = coordinator_name(app_name, config.fingerprint())
        self.generation = Generation(self._name, config.graceful_shutdown_timeout_s)
        self._owner = owner
        self._needs_room = False
        self._withdrawn = False
        self._others: dict[str, ActorHandle] = {}

    async def standing(self, name: str, opened_at: float, needs_room: bool) -> Standing:
        """Take another generation's announcement; return this one's state."""
        now = time.monotonic()
        phase = self.generation.announced(now, name, opened_at, needs_room=needs_room)
        held = [(each.node_id, dict(each.resources)) for each in await self._owner.held()]
        running = await self._owner.num_running() if phase is Phase.DRAINING else 0
        return Standing(self.generation.opened_at, str(phase), held, running, self.generation.drain_left_s(now))

    async def run(self) -> None:
        """Never returns."""
        while True:
            await self.step()
            await asyncio.sleep(STEP_S)

    async def step(self) -> None:
        """One look around."""
        generation = self.generation
        standings = await self._announce()
        older = [each for name, each in standings.items() if generation.is_newer_than(name, each.opened_at)]
        if not self.may_start and generation.phase is Phase.SERVING and not self._withdrawn:
            await self._look_for_room(older)
        idle = generation.phase is Phase.DRAINING and await self._owner.num_running() == 0
        phase = generation.phase
        for effect in generation.tick(time.monotonic(), idle=idle):
            match effect:
                case StopWorkers():
                    logger.info("%s: hands its place to a newer configuration", self._name)
                    self.may_start = self._needs_room = False
                    await self._owner.stop_workers()
                    generation.workers_stopped()
                case StartWorkers():
                    logger.info("%s: takes its place back", self._name)
                case EndGeneration(reason):
                    await self._owner.end(reason)
        if generation.phase is not phase:
            self._owner.phase_changed()

    async def withdraw(self) -> None:
        """Give up this generation's claim after a permanent failure, so that others may take their room back."""
        if self._needs_room:
            self._needs_room, self.may_start, self._withdrawn = False, False, True
            await self._owner.stop_workers()

    async def _look_for_room(self, older: list[Standing]) -> None:
        wanted = await ask(partial(demands, self._config), what="which resources there are")
        nodes = await ask(cluster_nodes, what="which nodes there are")
        held = [Held(node_id, resources) for each in older for node_id, resources in each.held]
        room = find_room(wanted, nodes, held) if any(wanted) else Room.HERE
        if room is Room.HERE and _names_gpus(self._config) and any("GPU" in each.resources for each in held):
            room = Room.AFTER  # the ones that are named are most likely those
        match room:
            case Room.HERE:
                self.may_start = True
            case Room.AFTER:
                self._needs_room = True
                running = sum(each.num_running for each in older)
                seconds = max((each.drain_left_s for each in older if each.phase == Phase.DRAINING), default=0.0)
                ends = f"; {running} requests run there, for {seconds:.0f} s at most" if seconds else ""
                self._owner.waits(f"{explain(wanted, nodes)}; the configuration before makes room{ends}")
            case Room.BUSY:
                self._needs_room = False
                self._owner.waits(explain(wanted, nodes))
            case Room.NEVER:
                self._needs_room = False
                self._owner.fails(PlacementError(explain(wanted, nodes)))

    async def _announce(self) -> dict[str, Standing]:
        """Tell the other generations; those that answer, by name."""
        self._others = await ask(partial(self._find, self._others), what="which Coordinators there are")
        opened_at, needs_room = self.generation.opened_at, self._needs_room
        if not opened_at:
            return {}  # started again, and no router has told it yet
        answers = await asyncio.gather(
            *(self._ask(name, actor, opened_at, needs_room) for name, actor in self._others.items())
        )
        return {name: each for name, each in zip(self._others, answers, strict=True) if each is not None}

    def _find(self, known: dict[str, ActorHandle]) -> dict[str, ActorHandle]:
        found: dict[str, ActorHandle] = {}
        for name in coordinator_names():
            if application_of(name) == self._app_name and name != self._name:
                try:
                    found[name] = known.get(name) or ray.get_actor(name, namespace=NAMESPACE)
                except ValueError:
                    continue  # ended between the two calls
        return found

    async def _ask(self, name: str, actor: ActorHandle, opened_at: float, needs_room: bool) -> Standing | None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer: Standing = await actor.standing.remote(self._name, opened_at, needs_room)
        except (RayError, TimeoutError) as error:
            logger.warning("%s: no answer from %s: %r", self._name, name, error)
            return None
        return answer


def _names_gpus(config: Config) -> bool:
    return config.prefill_device_id is not None or config.decode_device_id is not None
