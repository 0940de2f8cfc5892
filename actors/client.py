"""What drivers, router replicas and the command line call: find, start and end Coordinators."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, Self

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util import list_named_actors

from pdray.actors.coordinator import Coordinator
from pdray.actors.placement import NAMESPACE
from pdray.actors.vigil import Vigil
from pdray.cluster.messages import ClusterView
from pdray.config import Config
from pdray.errors import PdrayError, WorkerDiedError

PREFIX = "coordinator:"
CALL_TIMEOUT_S = 30.0
RETRY_S = 0.2


class CoordinatorClient:
    """A Coordinator as a router sees it.

    Attributes:
        secret: the cluster's; whoever knows it may open sessions to the workers.
        gone: it was ended, and does not come back.
    """

    def __init__(self, actor: ActorHandle, secret: bytes) -> None:
        self._actor = actor
        self._vigil = Vigil(actor)
        self.secret = secret
        self.gone = False

    @classmethod
    async def open(cls, config: Config, app_name: str, *, detached: bool) -> Self:
        """Find the application's Coordinator or create it. Safe to race: one wins, all get it.

        Args:
            detached: for a Serve application; otherwise it ends with this driver.
        """
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1}
        if detached:
            name = f"{PREFIX}{app_name}:{config.fingerprint()}"
            options |= {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor: Any = ray.remote(Coordinator).options(**options)
        actor = actor.remote(config, app_name, secrets.token_bytes(32), detached=detached)
        return cls(actor, await _get_secret(actor))

    async def watch(self, version: int, router: dict[str, Any] | None = None) -> ClusterView:
        """See Coordinator.watch. A Coordinator that hangs meanwhile is ended, and Ray starts it again.

        Raises:
            WorkerDiedError: the Coordinator is gone, for now or (see `gone`) for ever.
        """
        try:
            view: ClusterView | None = None
            while view is None:  # it is alive, and still finds out what is there
                view = await self._vigil.wait(self._actor.watch.remote(version, router))
        except ActorUnavailableError as error:
            raise WorkerDiedError("the Coordinator does not answer; Ray starts it again") from error
        except RayActorError as error:
            self.gone = True
            raise WorkerDiedError(f"the Coordinator is gone: {error}") from error
        return view

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once everything is connected.

        Raises:
            PdrayError: a worker did not start; the text says why.
        """
        try:
            async with asyncio.timeout(timeout_s):
                error = await self._actor.wait_ready.remote()
        except TimeoutError:
            raise PdrayError(f"the workers were not ready within {timeout_s:g} s (start_timeout_s)") from None
        if error is not None:
            raise PdrayError(error)

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


async def _get_secret(actor: Any) -> bytes:
    """The first call to a Coordinator. One that hangs, or that Ray is starting again, is waited for."""
    while True:
        try:
            secret: bytes = await Vigil(actor).wait(actor.get_secret.remote())
        except ActorUnavailableError:
            await asyncio.sleep(RETRY_S)
        else:
            return secret


def list_applications() -> list[str]:
    """Names of the applications that have a Coordinator in this Ray cluster."""
    return sorted({name.removeprefix(PREFIX).rpartition(":")[0] for name in _coordinator_names()})


def describe(app_name: str) -> dict[str, Any]:
    """An application's state. After a redeployment with another configuration: the newest that serves.

    Raises:
        PdrayError: there is no such application.
    """
    states: list[dict[str, Any]] = [_ask(actor.describe) for actor in _coordinators(app_name)]
    if not states:
        raise PdrayError(
            f"no pdray application is called {app_name!r}; running: {', '.join(list_applications()) or 'none'}"
        )
    return max(states, key=lambda state: state["state"] == "serving")


def check_integrity(app_name: str) -> dict[str, list[str]]:
    """Per worker of an application, what is wrong with its block accounting."""
    problems: dict[str, list[str]] = {}
    for actor in _coordinators(app_name):
        problems |= _ask(actor.check_integrity)
    return problems


def stop_application(app_name: str) -> None:
    """End an application's workers and its Coordinator, whatever Serve thinks of it."""
    for actor in _coordinators(app_name):
        try:
            asyncio.run(_get_secret(actor))  # one that hangs is ended, and its successor knows the workers
            _ask(actor.stop)
        except RayActorError:
            continue  # it was ending by itself
        ray.kill(actor, no_restart=True)


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


def _coordinator_names() -> list[str]:
    actors = list_named_actors(all_namespaces=True)
    return [a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(PREFIX)]


def _coordinators(app_name: str) -> list[ActorHandle]:
    handles = []
    for name in _coordinator_names():
        if name.removeprefix(PREFIX).rpartition(":")[0] == app_name:
            try:
                handles.append(ray.get_actor(name, namespace=NAMESPACE))
            except ValueError:
                continue  # ended between the two calls
    return handles
