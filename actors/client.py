"""Find, start and end Coordinators: for drivers, router replicas and the command line."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any, NamedTuple, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from pdray import errors
from pdray.actors.answer import answer_of
from pdray.actors.coordinator import Coordinator
from pdray.actors.importable import why_not_importable
from pdray.actors.placement import NAMESPACE, OUTSIDE_PLACEMENT_GROUPS
from pdray.actors.succession import application_of, coordinator_name, coordinator_names
from pdray.actors.vigil import keep_vigil
from pdray.config import Config
from pdray.control.pair_health import BrokenPair
from pdray.control.startup import StartState
from pdray.errors import PdrayError, StartTimeoutError, WorkerDiedError
from pdray.wire.cluster_view import ClusterView

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0
OPEN_TIMEOUT_S = 60.0
ROUTERS_TIMEOUT_S = 5.0
RETRY_S = 0.2


class CoordinatorClient:
    """A router's handle on its Coordinator.

    Attributes:
        secret: the cluster's; with it a process may open sessions to the workers.
        gone: it has ended and will not be started again.
    """

    def __init__(self, actor: ActorHandle, secret: bytes, opened_at: float) -> None:
        self._actor = actor
        self._opened_at = opened_at
        self.secret = secret
        self.gone = False

    @classmethod
    async def open(cls, config: Config, app_name: str, *, detached: bool) -> Self:
        """Find the application's Coordinator or create it. Safe to race: one wins, all get it.

        Args:
            detached: for a Serve application; otherwise it ends with this driver.

        Raises:
            PdrayError: the cluster's processes cannot import pdray, or the Coordinator of that name is ending, and does
                not come to an end.
        """
        if detached:  # a process of the cluster calls, and has imported it
            return await cls._open(config, app_name, detached=True)
        opening = asyncio.ensure_future(cls._open(config, app_name, detached=False))
        asking = asyncio.ensure_future(why_not_importable())
        try:
            await asyncio.wait({opening, asking}, return_when=asyncio.FIRST_COMPLETED)
            has_opened = opening.done() and opening.exception() is None
            if not has_opened and (problem := await asking) is not None:
                raise PdrayError(problem)
            return await opening
        finally:
            opening.cancel()
            asking.cancel()

    @classmethod
    async def _open(cls, config: Config, app_name: str, *, detached: bool) -> Self:
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_concurrency": 1000,
            "max_restarts": -1,
            "scheduling_strategy": OUTSIDE_PLACEMENT_GROUPS,
        }
        if detached:
            name = coordinator_name(app_name, config.fingerprint())
            options |= {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor_class: Any = ray.remote(Coordinator).options(**options)
        opened_at, deadline = time.time(), time.monotonic() + OPEN_TIMEOUT_S
        while True:
            actor = actor_class.remote(config, app_name, secrets.token_bytes(32), detached=detached)
            try:
                secret = await keep_vigil(actor, answer_of(actor.open.remote(opened_at)))
                if secret is not None:
                    return cls(actor, secret, opened_at)
                problem = "is ending"
            except RayActorError as error:
                problem = f"does not answer ({error})"
            if time.monotonic() > deadline:
                raise PdrayError(f"the Coordinator of {app_name} {problem}, for {OPEN_TIMEOUT_S:g} s")
            await asyncio.sleep(RETRY_S)

    async def watch(self, version: int, router: dict[str, Any] | None = None) -> ClusterView:
        """See Coordinator.watch. A Coordinator that hangs meanwhile is ended, and Ray starts it again.

        Raises:
            WorkerDiedError: the Coordinator is gone, for now or (see `gone`) forever.
        """
        if router is not None:
            router = router | {"opened_at": self._opened_at}
        try:
            view: ClusterView | None = None
            while view is None:  # it is alive, and still finds out what is there
                view = await keep_vigil(self._actor, answer_of(self._actor.watch.remote(version, router)))
        except ActorUnavailableError as error:
            raise WorkerDiedError("the Coordinator does not answer; Ray starts it again") from error
        except RayActorError as error:
            self.gone = True
            raise WorkerDiedError(f"the Coordinator is gone: {error}") from error
        return view

    async def start_state(self, router_id: str = "", *, with_router: bool = False) -> StartState:
        """See Coordinator.wait_ready.

        Raises:
            WorkerDiedError: as watch().
        """
        try:
            call: Any = self._actor.wait_ready.remote(router_id, with_router=with_router)
            state: StartState = await keep_vigil(self._actor, answer_of(call))
        except ActorUnavailableError as error:
            raise WorkerDiedError("the Coordinator does not answer; Ray starts it again") from error
        except RayActorError as error:
            self.gone = True
            raise WorkerDiedError(f"the Coordinator is gone: {error}") from error
        return state

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once everything is connected. An error that may pass is waited out.

        Raises:
            PdrayError: of what kept a worker from starting, if that stays. StartTimeoutError: its text holds the last
                error, or what the workers wait for.
        """
        reason = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        state = await self.start_state()
                    except WorkerDiedError:
                        if self.gone:
                            raise
                        await asyncio.sleep(RETRY_S)
                        continue
                    if state.ready:
                        return
                    if state.failed:
                        raise failure(state)
                    reason = state.reason or reason
        except TimeoutError:
            raise StartTimeoutError(
                f"the workers were not ready within {timeout_s:g} s (start_timeout_s): {reason or 'no reason is known'}"
            ) from None

    async def report_broken(self, pair: BrokenPair) -> None:
        """See Coordinator.report_broken. Dropped if the Coordinator does not answer: the next probe reports again."""
        try:
            async with asyncio.timeout(ROUTERS_TIMEOUT_S):
                await self._actor.report_broken.remote(pair)
        except (RayActorError, TimeoutError) as error:
            logger.warning("the Coordinator was not told of %s: %r", pair, error)

    async def tell(self, at_most: int) -> bool:
        """See Coordinator.tell."""
        told: bool = await self._actor.tell.remote(at_most)
        return told

    async def leave(self, router_id: str) -> None:
        """Say that this router has ended: its Coordinator need not wait to see it."""
        try:
            async with asyncio.timeout(RETRY_S * 10):
                await self._actor.leave.remote(router_id)
        except (RayActorError, TimeoutError):
            return  # it will see it

    async def describe(self) -> dict[str, Any]:
        """See Coordinator.describe."""
        state: dict[str, Any] = await self._actor.describe.remote()
        return state

    async def stop(self) -> None:
        """End the workers and the Coordinator itself."""
        try:
            await self._actor.stop.remote()
        except RayActorError:
            return  # it had ended already, and its workers with it
        ray.kill(self._actor, no_restart=True)


def failure(state: StartState) -> PdrayError:
    """The error of a start that has failed for good, of its own class."""
    kind = getattr(errors, state.kind, PdrayError)
    return kind(state.failed) if isinstance(kind, type) and issubclass(kind, PdrayError) else PdrayError(state.failed)


class RoutersAlive(NamedTuple):
    """Routers of an application that have been seen lately, of the same configuration and of former ones."""

    same: int
    former: int


async def routers_alive(app_name: str, config: Config) -> RoutersAlive:
    """Routers that serve an application already, as its Coordinators know them."""
    own, same, former = coordinator_name(app_name, config.fingerprint()), 0, 0
    for name in await asyncio.to_thread(coordinator_names):
        if application_of(name) != app_name:
            continue
        try:
            actor: Any = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
            async with asyncio.timeout(ROUTERS_TIMEOUT_S):
                number = await actor.num_routers.remote()
        except (ValueError, RayActorError, TimeoutError):
            continue  # it has ended, or knows no router
        same, former = same + number * (name == own), former + number * (name != own)
    return RoutersAlive(same, former)


def list_applications() -> list[str]:
    """Names of the applications that have a Coordinator in this Ray cluster."""
    return sorted({application_of(name) for name in coordinator_names()})


def describe(app_name: str) -> dict[str, Any]:
    """An application's state. While it changes its configuration: of the newest that serves, or else of the newest;
    `next` is then that of the one to come.

    Raises:
        PdrayError: there is no such application.
    """
    states: list[dict[str, Any]] = []
    for actor in _coordinators(app_name):
        try:
            states.append(_ask(actor.describe))
        except ActorDiedError:
            continue  # it has ended since
    if not states:
        raise PdrayError(
            f"no pdray application is called {app_name!r}; running: {', '.join(list_applications()) or 'none'}"
        )
    states.sort(key=lambda state: state["opened_at"])
    current = max(states, key=lambda state: (state["state"] == "serving", state["opened_at"]))
    return current if current is states[-1] else current | {"next": states[-1]}


def check_integrity(app_name: str) -> dict[str, list[str]]:
    """Per worker of an application, what is wrong with its block accounting."""
    problems: dict[str, list[str]] = {}
    for actor in _coordinators(app_name):
        for worker_id, found in _ask(actor.check_integrity).items():
            problems[worker_id] = problems.get(worker_id, []) + found
    return problems


def stop_application(app_name: str) -> None:
    """End an application's workers and its Coordinator, whatever Serve thinks of it."""
    for actor in _coordinators(app_name):
        try:
            asyncio.run(_see_alive(actor))
            _ask(actor.stop)
        except RayActorError:
            continue  # it was ending by itself
        ray.kill(actor, no_restart=True)


async def _see_alive(actor: Any) -> None:
    """One that hangs is ended; its successor knows the workers.

    Raises:
        RayActorError: it has ended.
    """
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            await keep_vigil(actor, answer_of(actor.num_routers.remote()))
            return
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY_S)


def _ask(method: Any) -> Any:
    """Call a Coordinator; one that Ray is starting again is asked until it answers.

    Raises:
        RayActorError: it has ended. GetTimeoutError: no answer in CALL_TIMEOUT_S.
    """
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            return ray.get(method.remote(), timeout=deadline - time.monotonic())
        except ActorUnavailableError:
            if time.monotonic() > deadline - RETRY_S:
                raise
            time.sleep(RETRY_S)


def _coordinators(app_name: str) -> list[ActorHandle]:
    handles = []
    for name in coordinator_names():
        if application_of(name) == app_name:
            try:
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
            except ValueError:
                continue  # ended between the two calls
    return handles
