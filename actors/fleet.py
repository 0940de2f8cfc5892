"""Carries out what the membership table says: starts, connects and buries workers, and reports back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.placement import NAMESPACE, make_dead, origin, worker_options
from pdray.actors.places import WorkerPlaces
from pdray.actors.prefill_worker import PrefillWorker
from pdray.background import BackgroundTasks
from pdray.cluster.membership import Connect, Effect, Kill, Membership, Start, TellGone
from pdray.cluster.messages import WorkerIdentity, WorkerInfo
from pdray.cluster.pair_health import Reconnect, Replace
from pdray.cluster.room import Held
from pdray.cluster.startup import Startup
from pdray.config import Config
from pdray.errors import PdrayError

logger = logging.getLogger(__name__)

RETRY_S = 0.5
MIN_LAG_S = 0.1  # what an event loop is late anyhow

T = TypeVar("T")


@dataclass(slots=True)
class _Process:
    """One incarnation of a worker. info is None until it has started."""

    worker_id: str
    actor: ActorHandle
    info: WorkerInfo | None = None


class WorkerFleet:
    """The worker actors of one application. Runs on the Coordinator's event loop.

    Args:
        startup: told what workers wait for, and what fails.
        on_change: called after every change of the membership.
    """

    def __init__(
        self,
        config: Config,
        app_name: str,
        membership: Membership,
        startup: Startup,
        secret: bytes,
        *,
        detached: bool,
        on_change: Callable[[], None],
    ) -> None:
        self.config = config
        self.app_name = app_name
        self.membership = membership
        self.startup = startup
        self.secret = secret
        self.detached = detached
        self._on_change = on_change
        self._processes: dict[str, _Process] = {}  # by incarnation
        self._places = WorkerPlaces(config, app_name, detached=detached, on_wait=self._waits)
        self._tasks = BackgroundTasks(self._failed)
        self._stopping = False

    def tick(self) -> None:
        """What is due now: call it regularly."""
        if not self._stopping:
            self._perform(self.membership.tick(time.monotonic()))

    async def adopt(self) -> None:
        """Go on with the workers that a former life of this Coordinator has left; end those that cannot be kept."""
        found = await asyncio.gather(*(self._find(worker_id) for worker_id in self.membership.worker_ids))
        identities = []
        for each in found:
            if each is not None:
                identity, actor = each
                identities.append(identity)
                self._adopt(_Process(identity.info.worker_id, actor, identity.info))
        alive = {identity.info.incarnation for identity in identities}
        writers = {writer.incarnation: writer for identity in identities for writer in identity.writers}
        await asyncio.gather(*(make_dead(w.pid, w.node_id) for name, w in writers.items() if name not in alive))
        self._perform(self.membership.adopt(identities))

    def _adopt(self, process: _Process) -> None:
        assert process.info is not None
        self._processes[process.info.incarnation] = process
        self._tasks.spawn(self._watch(process))
        self._tasks.spawn(self._heartbeat(process))

    async def _find(self, worker_id: str) -> tuple[WorkerIdentity, ActorHandle] | None:
        name = worker_options(self.config, self.app_name, worker_id, detached=self.detached)["name"]
        try:
            actor: Any = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None
        try:
            async with asyncio.timeout(self.config.worker_timeout_s):
                identity: WorkerIdentity | None = await actor.identify.remote()
        except (RayError, TimeoutError) as error:
            logger.warning("%s: %s does not answer: %r", self.app_name, worker_id, error)
            identity = None
        if identity is not None and identity.origin == origin(self.config, self.secret):
            return identity, actor
        logger.warning("%s: ending %s, which a former Coordinator left behind", self.app_name, name)
        ray.kill(actor, no_restart=True)
        return None

    def actor(self, info: WorkerInfo) -> ActorHandle:
        """The handle of a worker of the current view."""
        return self._processes[info.incarnation].actor

    async def stop(self) -> None:
        """Kill every worker and return once their processes are gone, and their GPUs free. Idempotent."""
        self._stopping = True
        self._tasks.cancel()
        await asyncio.gather(*(self._bury(incarnation) for incarnation in list(self._processes)))
        await self._places.release()

    async def held(self) -> list[Held]:
        """What the workers reserve now."""
        running = [process.info for process in self._processes.values() if process.info is not None]
        num_starting = len(self._processes) - len(running)
        return await asyncio.to_thread(self._places.held, running, num_starting)

    def mend(self, step: Reconnect | Replace, reason: str) -> None:
        """What follows from workers that do not serve. See PairHealth."""
        match step:
            case Reconnect(prefill_id, decode_id):
                self._perform(self.membership.channel_broken(prefill_id, decode_id))
            case Replace(worker_id):
                info = next((i for i in self.membership.view.workers if i.worker_id == worker_id), None)
                if info is not None:
                    logger.error("%s: %s is replaced: %s", self.app_name, worker_id, reason)
                    self._perform(self.membership.suspect(worker_id, info.incarnation))

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    self._tasks.spawn(self._start(effect))
                case Kill():
                    self._tasks.spawn(self._kill(effect))
                case Connect():
                    self._tasks.spawn(self._connect(effect))
                case TellGone():
                    self._tasks.spawn(self._tell_gone(effect))
        self._on_change()

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.app_name, exc_info=error)
        self._note_error(f"internal error: {error}")

    async def _start(self, start: Start) -> None:
        cls = PrefillWorker if start.worker_id.startswith("prefill") else DecodeWorker
        try:
            options = await self._places.place(start.worker_id)
            self.startup.waits(start.worker_id, "")
            async with asyncio.timeout(self.config.start_timeout_s):
                actor_class: Any = ray.remote(cls)
                arguments = (self.config, start.worker_id, start.incarnation, self.secret)
                actor = actor_class.options(**options).remote(*arguments, app_name=self.app_name)
                self._processes[start.incarnation] = process = _Process(start.worker_id, actor)
                await actor.identify.remote()
                self._places.started(start.worker_id)
                process.info = await actor.start.remote()
        except (RayError, TimeoutError, ValueError, PdrayError) as error:
            self._places.started(start.worker_id)
            self._report(start.worker_id, f"{start.worker_id} did not start", error)
            self._perform(self.membership.suspect(start.worker_id, start.incarnation))
            return
        self.startup.cleared(start.worker_id)
        self._perform(self.membership.ready(process.info))
        self._perform(self.membership.tick(time.monotonic()))
        self._adopt(process)

    async def _watch(self, process: _Process) -> None:
        """The pending join() ends when the process does: Ray's death notice, in 10-25 ms."""
        assert process.info is not None
        try:
            await process.actor.join.remote()
        except RayError as error:
            logger.warning("%s: %s ended: %s", self.app_name, process.worker_id, _first_line(error))
        self._perform(self.membership.suspect(process.worker_id, process.info.incarnation))

    async def _heartbeat(self, process: _Process) -> None:
        """A process that is stopped or hung never breaks join(); one silent for worker_timeout_s is killed."""
        info = process.info
        assert info is not None
        interval = self.config.worker_timeout_s / 4
        while self._processes.get(info.incarnation) is process:
            try:
                epochs: dict[str, int] = await within(
                    process.actor.heartbeat.remote(), self.config.worker_timeout_s - interval
                )
            except (RayError, TimeoutError) as error:
                logger.warning("%s: no heartbeat from %s: %r", self.app_name, process.worker_id, error)
                self._perform(self.membership.suspect(process.worker_id, info.incarnation))
                return
            if info.role == "prefill":
                self._perform(self.membership.open_channels(process.worker_id, epochs))
            await asyncio.sleep(interval)

    async def _kill(self, kill: Kill) -> None:
        await self._bury(kill.incarnation)
        self._perform(self.membership.died(time.monotonic(), kill.worker_id, kill.incarnation))
        self._perform(self.membership.tick(time.monotonic()))

    async def _bury(self, incarnation: str) -> None:
        """Kill a process and see it dead. One that never started holds nothing: Ray's word is enough."""
        process = self._processes.get(incarnation)
        if process is None:
            return
        ray.kill(process.actor, no_restart=True)
        if process.info is not None:
            await make_dead(process.info.pid, process.info.node_id)
        self._processes.pop(incarnation, None)

    async def _connect(self, connect: Connect) -> None:
        prefill, decode, epoch = connect
        try:
            decode_actor = self.actor(decode)
            offer = await decode_actor.accept.remote(prefill, epoch)
            await self.actor(prefill).connect.remote(decode, epoch, offer, decode_actor)
        except (RayError, KeyError) as error:
            what = f"{prefill.worker_id} could not be connected to {decode.worker_id}"
            self._report(f"{prefill.worker_id} to {decode.worker_id}", what, error)
            self._perform(self.membership.connect_failed(time.monotonic(), prefill.worker_id, decode.worker_id, epoch))
            return
        self.startup.cleared(f"{prefill.worker_id} to {decode.worker_id}")
        self._perform(self.membership.connected(prefill.worker_id, decode.worker_id, epoch))

    async def _tell_gone(self, tell: TellGone) -> None:
        peer = next((i for i in self.membership.view.workers if i.worker_id == tell.worker_id), None)
        if peer is None:
            return  # it died too, and took what it knew with it
        try:
            await self.actor(peer).worker_gone.remote(tell.gone.worker_id, tell.gone.incarnation)
        except ActorUnavailableError:
            await asyncio.sleep(RETRY_S)
            self._tasks.spawn(self._tell_gone(tell))
        except RayActorError:
            logger.info("%s died before it heard of %s's death", tell.worker_id, tell.gone.worker_id)

    def _note_error(self, text: str) -> None:
        self.membership.note_error(text)
        self._on_change()

    def _waits(self, worker_id: str, reason: str) -> None:
        if self.startup.waits(worker_id, reason):
            logger.warning("%s: %s: %s", self.app_name, worker_id, reason)
            self.membership.changed()
            self._on_change()

    def _report(self, subject: str, what: str, error: BaseException) -> None:
        logger.error("%s: %s: %s", self.app_name, what, error)
        text = f"{what}: {_first_line(error)}"
        self.startup.failed(subject, text, _cause(error))
        self._note_error(text)


def _cause(error: BaseException) -> BaseException:
    """Ray wraps an actor's exception in its traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: BaseException) -> str:
    """The cause's own words."""
    cause = _cause(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


async def within(awaitable: Awaitable[T], timeout_s: float) -> T:
    """Its result. Time in which this event loop stood still, or the whole process, does not count.

    Raises:
        TimeoutError: there is none after so long. What the awaitable raises.
    """
    loop = asyncio.get_running_loop()
    result = asyncio.ensure_future(awaitable)
    try:
        while True:
            began = loop.time()
            done, _ = await asyncio.wait({result}, timeout=timeout_s)
            if done:
                return result.result()
            lag = loop.time() - began - timeout_s
            if lag < MIN_LAG_S:
                raise TimeoutError
            timeout_s = min(timeout_s, lag)
    finally:
        result.cancel()
