"""Carries out what the membership table says: starts, connects and buries workers, and reports back, always."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.placement import NAMESPACE, origin, worker_options
from pdray.actors.places import WorkerPlaces
from pdray.actors.prefill_worker import PrefillWorker
from pdray.actors.process_death import end_actor, make_dead
from pdray.actors.questions import ask, within
from pdray.background import BackgroundTasks, LoopFailures
from pdray.config import Config
from pdray.control.effects import Connect, Kill, MembershipEffect, Start, TellGone
from pdray.control.membership import Membership, Stray
from pdray.control.pair_health import Reconnect, Replace
from pdray.control.room import Held
from pdray.control.startup import Startup
from pdray.control.suspicions import Suspicions
from pdray.errors import PdrayError
from pdray.wire.cluster_view import Heartbeat, WorkerIdentity, WorkerInfo, WorkerLoading

logger = logging.getLogger(__name__)

TICK_S = 0.25
RETRY_S = 0.1
CREATE_TIMEOUT_S = 60.0  # Ray itself waits as long for its GCS
KILL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 60.0  # an init that hangs ends its process after 30 s
TELL_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 15.0  # for processes whose node does not answer


@dataclass(slots=True)
class _Process:
    """One incarnation of a worker.

    Attributes:
        creation: of its actor, where that was here; what it raised, if it came to nothing.
        actor: None until it is created, and of a process that only others know.
        info: None until it has started.
    """

    worker_id: str
    incarnation: str
    creation: asyncio.Task[ActorHandle | Exception] | None = None
    actor: ActorHandle | None = None
    info: WorkerInfo | None = None


class FleetOwner(Protocol):
    """Called on the event loop's thread."""

    def on_change(self) -> None:
        """After every change of the membership."""

    def on_heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> None: ...

    async def check_current(self) -> None:
        """Raises if this process must not act any more, or cannot know."""


class WorkerFleet:
    """The worker actors of one application. Runs on the Coordinator's event loop, which it never blocks.

    Args:
        startup: told what workers wait for, and what fails.

    Attributes:
        may_start: there is room for the workers.
    """

    def __init__(
        self,
        config: Config,
        app_name: str,
        membership: Membership,
        startup: Startup,
        secret: bytes,
        owner: FleetOwner,
        failures: LoopFailures,
        *,
        detached: bool,
    ) -> None:
        self.config = config
        self.app_name = app_name
        self.membership = membership
        self.startup = startup
        self.secret = secret
        self.detached = detached
        self.may_start = False
        self.suspicions = Suspicions(TICK_S)
        self._owner = owner
        self._processes: dict[str, _Process] = {}  # by incarnation
        self._places: WorkerPlaces | None = None
        self._had_room = False  # in a former life
        self._tasks = BackgroundTasks(self._failed, failures)
        self._creations = BackgroundTasks(self._failed, failures)  # never cancelled: an actor would be forgotten
        self._stopping = False

    def tick(self) -> None:
        """What is due now: call it every TICK_S."""
        for suspicion in self.suspicions.due(time.monotonic()):
            logger.warning("%s: %s", self.app_name, suspicion)
            self._suspect(suspicion.who, suspicion.incarnation)
        self._pump()

    async def adopt(self) -> bool:
        """Go on with the workers that a former life of this Coordinator has left, also those that load still; those
        that cannot be kept are ended by and by, and do not hold the others up. Returns whether there are some to keep.

        Raises:
            NoAnswerError: Ray does not say who is there.
        """
        found = await asyncio.gather(*(self._find(worker_id) for worker_id in self.membership.worker_ids))
        identities, strays, loading = [], [], []
        for each in found:
            match each:
                case WorkerIdentity(info=info), actor:
                    identities.append(each[0])
                    self._supervise(_Process(info.worker_id, info.incarnation, actor=actor, info=info))
                case WorkerLoading() as one, actor:
                    loading.append(one)
                    self._processes[one.incarnation] = _Process(one.worker_id, one.incarnation, actor=actor)
                case Stray() as stray, actor:
                    strays.append(stray)
                    self._processes[stray.incarnation] = _Process(stray.worker_id, stray.incarnation, actor=actor)
        for writer in (writer for identity in identities for writer in identity.writers):
            self._processes.setdefault(writer.incarnation, _Process(writer.worker_id, writer.incarnation, info=writer))
        self.membership.adopt(identities, strays, loading)
        for one in loading:
            self._tasks.spawn(self._carry_out(Start(one.worker_id, one.incarnation)))
        self._had_room = bool(identities or loading)
        self._pump()
        return self._had_room

    async def _find(self, worker_id: str) -> tuple[WorkerIdentity | WorkerLoading | Stray, ActorHandle] | None:
        """The actor that has a worker's name, and whether it can be kept."""
        options = await self._options(worker_id)
        actor: Any
        try:
            actor = await ask(partial(ray.get_actor, options["name"], namespace=NAMESPACE), what="who has a name")
        except ValueError:
            return None
        identity: WorkerIdentity | WorkerLoading | None = None
        try:
            identity = await within(actor.identify.remote(), self.config.worker_timeout_s)
        except (RayError, TimeoutError) as error:
            logger.warning("%s: %s does not answer: %r", self.app_name, worker_id, error)
        if identity is not None and identity.origin == origin(self.config, self.secret):
            return identity, actor
        logger.warning("%s: ending %s, which a former Coordinator left behind", self.app_name, options["name"])
        return Stray(worker_id, f"{worker_id} of a former Coordinator"), actor

    async def _options(self, worker_id: str) -> dict[str, Any]:
        options = partial(worker_options, self.config, self.app_name, worker_id, detached=self.detached)
        return await ask(options, what="which resources there are")

    def actor(self, info: WorkerInfo) -> ActorHandle:
        """The handle of a worker of the current view."""
        actor = self._processes[info.incarnation].actor
        assert actor is not None, info
        return actor

    async def stop(self) -> None:
        """Kill every worker and return once their processes are gone, and their GPUs free. Idempotent.

        Ray has been told to end each of them. One that cannot be seen dead within STOP_TIMEOUT_S, because its node does
        not answer, is left to Ray: nothing of this application is there any more that it could harm.
        """
        self._stopping = True
        self._tasks.cancel()
        await asyncio.gather(*(self._end(process) for process in list(self._processes.values())))
        await (await self._get_places()).release()

    async def _get_places(self) -> WorkerPlaces:
        """Made when it is first needed: it asks Ray which resources there are."""
        if self._places is None:
            make = partial(WorkerPlaces, self.config, self.app_name, detached=self.detached, on_wait=self._waits)
            made = await ask(partial(make, had_room=self._had_room), what="which resources there are")
            self._places = self._places or made
        return self._places

    async def held(self) -> list[Held]:
        """What the workers reserve now. Raises NoAnswerError."""
        running = [process.info for process in self._processes.values() if process.info is not None]
        num_starting = len(self._processes) - len(running)
        places = await self._get_places()
        return await ask(partial(places.held, running, num_starting), what="what is reserved")

    def mend(self, step: Reconnect | Replace, reason: str) -> None:
        """What follows from workers that do not serve. See PairHealth."""
        match step:
            case Reconnect(prefill_id, decode_id):
                self.membership.channel_broken(prefill_id, decode_id)
                self._pump()
            case Replace(worker_id):
                info = next((i for i in self.membership.view.workers if i.worker_id == worker_id), None)
                if info is not None:
                    logger.error("%s: %s is replaced: %s", self.app_name, worker_id, reason)
                    self._suspect(worker_id, info.incarnation)

    async def _end(self, process: _Process) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._bury(process.incarnation)
        except (TimeoutError, RayError, PdrayError) as error:
            logger.error(
                "%s: %s was not seen dead (%s); Ray ends it once its node answers",
                self.app_name,
                process.incarnation,
                _first_line(error),
            )

    # effects

    def _pump(self) -> None:
        """Carry out what is due, and tell of what has changed."""
        if not self._stopping:
            for effect in self.membership.tick(time.monotonic(), may_start=self.may_start):
                self._tasks.spawn(self._carry_out(effect))
        self._owner.on_change()

    async def _carry_out(self, effect: MembershipEffect) -> None:
        """Whatever becomes of an effect, the table hears of it."""
        try:
            await self._owner.check_current()
            match effect:
                case Start():
                    await self._start(effect)
                case Kill():
                    await self._kill(effect)
                case Connect():
                    await self._connect(effect)
                case TellGone():
                    await self._tell_gone(effect)
        except Exception as error:
            if not isinstance(error, RayError | TimeoutError | ValueError | PdrayError):
                logger.exception("%s: internal error in %s", self.app_name, type(effect).__name__)
            self._report_failure(effect, error)
        self._pump()

    def _report_failure(self, effect: MembershipEffect, error: Exception) -> None:
        table, now, reason = self.membership, time.monotonic(), _first_line(error)
        logger.error("%s: %s failed: %s", self.app_name, _describe(effect), error)
        match effect:
            case Start(worker_id, incarnation):
                self.startup.failed(worker_id, f"{worker_id} did not start: {reason}", _cause(error))
                table.start_failed(worker_id, incarnation, reason)
            case Kill(_, incarnation):
                table.kill_failed(now, incarnation, reason)
            case Connect(prefill, decode, epoch):
                what = f"{prefill.worker_id} could not be connected to {decode.worker_id}"
                self.startup.failed(_pair(prefill, decode), f"{what}: {reason}", _cause(error))
                table.connect_failed(now, prefill.worker_id, decode.worker_id, epoch, reason)
            case TellGone(worker_id, incarnation, gone):
                table.tell_failed(now, worker_id, incarnation, gone, reason)

    async def _start(self, start: Start) -> None:
        """One that a former Coordinator has created is there already, and loads."""
        process = self._processes.get(start.incarnation) or await self._make_process(start)
        assert process.actor is not None
        async with asyncio.timeout(self.config.start_timeout_s):
            process.info = await process.actor.start.remote()
        assert process.info is not None
        self.startup.cleared(start.worker_id)
        self.membership.ready(process.info)
        self._supervise(process)

    async def _make_process(self, start: Start) -> _Process:
        """Where there is room; returns when it answers."""
        cls = PrefillWorker if start.worker_id.startswith("prefill") else DecodeWorker
        places = await self._get_places()
        try:
            options = await places.place(start.worker_id)
            self.startup.waits(start.worker_id, "")
            async with asyncio.timeout(self.config.start_timeout_s):
                process = self._processes[start.incarnation] = _Process(start.worker_id, start.incarnation)
                process.creation = self._creations.spawn(self._create(cls, options, start))
                created = await asyncio.shield(process.creation)
                if isinstance(created, Exception):
                    raise created
                process.actor = created
                await process.actor.identify.remote()
        finally:
            places.started(start.worker_id)
        return process

    async def _create(self, cls: type, options: dict[str, Any], start: Start) -> ActorHandle | Exception:
        def create() -> ActorHandle:
            actor_class: Any = ray.remote(cls)
            arguments = (self.config, start.worker_id, start.incarnation, self.secret)
            handle: ActorHandle = actor_class.options(**options).remote(*arguments, app_name=self.app_name)
            return handle

        try:
            return await ask(create, what=f"to start {start.worker_id}", timeout_s=CREATE_TIMEOUT_S)
        except ValueError as error:  # the name is taken, by an actor that the table does not know
            logger.warning("%s: ending whoever is called %s: %s", self.app_name, options["name"], error)
            try:
                await end_actor(await ask(partial(ray.get_actor, options["name"], namespace=NAMESPACE), what="a name"))
            except (ValueError, RayError, PdrayError) as another:
                return another
            return error
        except (RayError, PdrayError) as error:
            return error

    async def _kill(self, kill: Kill) -> None:
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await self._bury(kill.incarnation)
        self.membership.died(time.monotonic(), kill.worker_id, kill.incarnation)

    async def _bury(self, incarnation: str) -> None:
        """Kill a process and see it dead."""
        process = self._processes.get(incarnation)
        if process is None:
            return
        self.suspicions.forget(process.worker_id, incarnation)
        if process.creation is not None:
            created = await asyncio.shield(process.creation)
            process.actor = None if isinstance(created, Exception) else created
        if process.actor is not None:
            await end_actor(process.actor)
        elif process.info is not None:
            await make_dead(process.info.pid, process.info.node_id)
        self._processes.pop(incarnation, None)

    async def _connect(self, connect: Connect) -> None:
        prefill, decode, epoch = connect
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            decode_actor = self.actor(decode)
            offer = await decode_actor.accept.remote(prefill, epoch)
            await self.actor(prefill).connect.remote(decode, epoch, offer, decode_actor)
        self.startup.cleared(_pair(prefill, decode))
        self.membership.connected(prefill.worker_id, decode.worker_id, epoch)

    async def _tell_gone(self, tell: TellGone) -> None:
        process = self._processes.get(tell.incarnation)
        if process is not None and process.actor is not None:
            try:
                async with asyncio.timeout(TELL_TIMEOUT_S):
                    await process.actor.worker_gone.remote(tell.gone.worker_id, tell.gone.incarnation)
            except ActorDiedError:
                logger.info("%s died before it heard of %s's death", tell.worker_id, tell.gone.worker_id)
        self.membership.told(tell.worker_id, tell.incarnation, tell.gone)

    # signs of life

    def _supervise(self, process: _Process) -> None:
        self._processes[process.incarnation] = process
        limit_s = self.config.worker_timeout_s
        self.suspicions.expect(
            time.monotonic(),
            process.worker_id,
            process.incarnation,
            limit_s,
            sign="no heartbeat",
            next="it is killed and replaced",
        )
        self._tasks.keep_running("await a worker's end", partial(self._watch, process), of=process.incarnation)
        self._tasks.keep_running("heartbeats of a worker", partial(self._heartbeat, process), of=process.incarnation)

    def _suspect(self, worker_id: str, incarnation: str) -> None:
        self.suspicions.forget(worker_id, incarnation)
        self.membership.suspect(worker_id, incarnation)
        self._pump()

    async def _watch(self, process: _Process) -> None:
        """The pending join() ends when the process does: Ray's death notice, in 10-25 ms."""
        assert process.actor is not None
        while self._processes.get(process.incarnation) is process:
            try:
                await process.actor.join.remote()
            except ActorUnavailableError:  # a lost connection is no death; if it was one, the next call says so
                await asyncio.sleep(RETRY_S)
                continue
            except RayError as error:
                logger.warning("%s: %s ended: %s", self.app_name, process.worker_id, _first_line(error))
            self._suspect(process.worker_id, process.incarnation)
            return

    async def _heartbeat(self, process: _Process) -> None:
        """A process that is stopped or hung never breaks join(); the table of suspicions misses its heartbeats."""
        assert process.actor is not None
        while self._processes.get(process.incarnation) is process:
            try:
                heartbeat: Heartbeat = await process.actor.heartbeat.remote()
            except RayActorError:  # join() says what that means
                await asyncio.sleep(RETRY_S)
                continue
            self.suspicions.heard(time.monotonic(), process.worker_id, process.incarnation)
            self._owner.on_heartbeat(process.worker_id, heartbeat)
            if process.worker_id.startswith("prefill") and self.membership.is_current(
                process.worker_id, process.incarnation
            ):
                self.membership.open_channels(process.worker_id, heartbeat.epochs)
                self._pump()
            await asyncio.sleep(self.config.worker_timeout_s / 4)

    def _waits(self, worker_id: str, reason: str) -> None:
        if self.startup.waits(worker_id, reason):
            logger.warning("%s: %s: %s", self.app_name, worker_id, reason)
            self.membership.changed()
            self._owner.on_change()

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.app_name, exc_info=error)
        self.membership.note_error(f"internal error: {error}")
        self._owner.on_change()


def _pair(prefill: WorkerInfo, decode: WorkerInfo) -> str:
    return f"{prefill.worker_id} to {decode.worker_id}"


def _describe(effect: MembershipEffect) -> str:
    match effect:
        case Start(worker_id, _):
            return f"the start of {worker_id}"
        case Kill(_, incarnation):
            return f"the end of {incarnation}"
        case Connect(prefill, decode, epoch):
            return f"connecting {prefill.worker_id} to {decode.worker_id} in epoch {epoch}"
        case TellGone(worker_id, _, gone):
            return f"telling {worker_id} of the end of {gone.incarnation}"


def _cause(error: BaseException) -> BaseException:
    """Ray wraps an actor's exception in its traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: BaseException) -> str:
    """The cause's own words."""
    cause = _cause(error)
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
