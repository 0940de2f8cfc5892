"""Carries out what the membership table says: starts, connects and buries workers, and reports back, always."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any, Protocol

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.placement import worker_options
from pdray.actors.places import WorkerPlaces
from pdray.actors.prefill_worker import PrefillWorker
from pdray.actors.process_death import end_actor, make_dead
from pdray.actors.questions import ask, cause_of, first_line
from pdray.actors.signs_of_life import SignsOfLife
from pdray.actors.worker_process import WorkerProcess, create_actor, find_worker
from pdray.background import BackgroundTasks, LoopFailures
from pdray.config import Config
from pdray.control.effects import Connect, Kill, MembershipEffect, Start, TellGone, describe
from pdray.control.membership import Membership, Stray
from pdray.control.pair_health import Reconnect, Replace
from pdray.control.room import Held
from pdray.control.startup import Startup
from pdray.control.suspicions import Suspicions
from pdray.errors import PdrayError
from pdray.wire.cluster_view import Heartbeat, WorkerIdentity, WorkerInfo, WorkerLoading

logger = logging.getLogger(__name__)

TICK_S = 0.25
KILL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 60.0  # an init that hangs ends its process after 30 s
TELL_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 15.0  # for processes whose node does not answer


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
        self._processes: dict[str, WorkerProcess] = {}  # by incarnation
        self._places: WorkerPlaces | None = None
        self._had_room = False  # in a former life
        self._tasks = BackgroundTasks(self._failed, failures)
        self._creations = BackgroundTasks(self._failed, failures)  # never cancelled: an actor would be forgotten
        self._stopping = False
        self._signs = SignsOfLife(app_name, config.worker_timeout_s, self.suspicions, self._tasks, self)

    def tick(self) -> None:
        """What is due now: call it every TICK_S."""
        for suspicion in self.suspicions.due(time.monotonic()):
            logger.warning("%s: %s", self.app_name, suspicion)
            self.suspect(suspicion.who, suspicion.incarnation)
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
                    self._watch(WorkerProcess(info.worker_id, info.incarnation, actor=actor, info=info))
                case WorkerLoading() as one, actor:
                    loading.append(one)
                    self._processes[one.incarnation] = WorkerProcess(one.worker_id, one.incarnation, actor=actor)
                case Stray() as stray, actor:
                    strays.append(stray)
                    self._processes[stray.incarnation] = WorkerProcess(stray.worker_id, stray.incarnation, actor=actor)
        for writer in (writer for identity in identities for writer in identity.writers):
            self._processes.setdefault(
                writer.incarnation, WorkerProcess(writer.worker_id, writer.incarnation, info=writer)
            )
        self.membership.adopt(identities, strays, loading)
        for one in loading:
            self._tasks.spawn(self._carry_out(Start(one.worker_id, one.incarnation)))
        self._had_room = bool(identities or loading)
        self._pump()
        return self._had_room

    async def _find(self, worker_id: str) -> tuple[WorkerIdentity | WorkerLoading | Stray, ActorHandle] | None:
        """The actor that has a worker's name, and whether it can be kept."""
        name = (await self._options(worker_id))["name"]
        return await find_worker(self.config, self.app_name, worker_id, name, self.secret)

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
                    self.suspect(worker_id, info.incarnation)

    async def _end(self, process: WorkerProcess) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._bury(process.incarnation)
        except (TimeoutError, RayError, PdrayError) as error:
            logger.error(
                "%s: %s was not seen dead (%s); Ray ends it once its node answers",
                self.app_name,
                process.incarnation,
                first_line(error),
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
        table, now, reason = self.membership, time.monotonic(), first_line(error)
        logger.error("%s: %s failed: %s", self.app_name, describe(effect), error)
        match effect:
            case Start(worker_id, incarnation):
                self.startup.failed(worker_id, f"{worker_id} did not start: {reason}", cause_of(error))
                table.start_failed(worker_id, incarnation, reason)
            case Kill(_, incarnation):
                table.kill_failed(now, incarnation, reason)
            case Connect(prefill, decode, epoch):
                what = f"{prefill.worker_id} could not be connected to {decode.worker_id}"
                self.startup.failed(_pair_name(prefill, decode), f"{what}: {reason}", cause_of(error))
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
        self._watch(process)

    async def _make_process(self, start: Start) -> WorkerProcess:
        """Where there is room; returns when it answers."""
        cls = PrefillWorker if self.membership.is_prefill(start.worker_id) else DecodeWorker
        places = await self._get_places()
        try:
            options = await places.place(start.worker_id, start.lender)
            self.startup.waits(start.worker_id, "")
            async with asyncio.timeout(self.config.start_timeout_s):
                process = self._processes[start.incarnation] = WorkerProcess(start.worker_id, start.incarnation)
                creation = create_actor(cls, options, self.config, start, self.secret, self.app_name)
                process.creation = self._creations.spawn(creation)
                created = await asyncio.shield(process.creation)
                if isinstance(created, Exception):
                    raise created
                process.actor = created
                await process.actor.identify.remote()
        finally:
            places.started(start.worker_id)
        return process

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
        self.startup.cleared(_pair_name(prefill, decode))
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

    def _watch(self, process: WorkerProcess) -> None:
        self._processes[process.incarnation] = process
        self._signs.watch(process)

    def heard(self, process: WorkerProcess, heartbeat: Heartbeat) -> None:
        """See SignsOwner."""
        worker_id = process.worker_id
        self._owner.on_heartbeat(worker_id, heartbeat)
        if self.membership.is_prefill(worker_id) and self.membership.is_current(worker_id, process.incarnation):
            self.membership.open_channels(worker_id, heartbeat.epochs)
            self._pump()

    def is_there(self, process: WorkerProcess) -> bool:
        """See SignsOwner."""
        return self._processes.get(process.incarnation) is process

    def suspect(self, worker_id: str, incarnation: str) -> None:
        """It is to be killed and replaced; see SignsOwner."""
        self.suspicions.forget(worker_id, incarnation)
        self.membership.suspect(worker_id, incarnation)
        self._pump()

    def _waits(self, worker_id: str, reason: str) -> None:
        if self.startup.waits(worker_id, reason):
            logger.warning("%s: %s: %s", self.app_name, worker_id, reason)
            self.membership.changed()
            self._owner.on_change()

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.app_name, exc_info=error)
        self.membership.note_error(f"internal error: {error}")
        self._owner.on_change()


def _pair_name(prefill: WorkerInfo, decode: WorkerInfo) -> str:
    return f"{prefill.worker_id} to {decode.worker_id}"
