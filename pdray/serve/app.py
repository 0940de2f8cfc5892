"""The Serve application: a router replica that is its own HTTP ingress, and one that stands for the workers.

Serve calls a deployment healthy once its replicas are constructed, and only then stops those of a former configuration.
So each replica is constructed when that is true: the workers' one (pdray.serve.readiness) when they can serve; the
router's at once if nobody else answers /health, which then tells what it waits for, and otherwise when it can serve.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve

from pdray.actors.client import CoordinatorClient, failure, routers_alive
from pdray.config import Config
from pdray.errors import PdrayError, WorkerDiedError
from pdray.logs import leave_out_polls, log_to_stderr
from pdray.metrics import LoopMetrics, RouterMetrics
from pdray.models import load_tokenizer
from pdray.models.generation_config import load_sampling_defaults
from pdray.router.router import Router
from pdray.serve import MARK
from pdray.serve.api import create_app
from pdray.serve.own_state import is_stopping, own_process
from pdray.serve.readiness import WorkersReplica
from pdray.wire.cluster_view import ClusterView

API_KEY_VARIABLE = "PDRAY_API_KEY"
DRAIN_VARIABLE = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
DRAIN_S = 1  # HAProxy has left a replica out of its list by then, and asks another where a connection is refused

SERVE_LOG = logging.getLogger("ray.serve")  # the replica's log shows lines of others from warnings up only
SAME_CONFIG_WAIT_S = 30.0  # for a router beside others of its configuration, which may be gone already
REOPEN_S = 5.0
OWN_STATE_INTERVAL_S = 1.0
DRAIN_MARGIN_S = 5.0  # for Serve, after the router has ended its last request
GRACEFUL_LOOP_S = 0.5
STOPPING = "this server is stopping"
STARTING = "the server is starting; try again shortly"

logger = logging.getLogger(__name__)


class RouterReplica:
    """One router. See the module for when it is constructed."""

    async def __init__(self, config: Config, workers: Any = None) -> None:  # type: ignore[misc]
        """Args:
            workers: the handle of the workers' deployment, which makes it a part of the application.

        Raises:
            PdrayError: a former configuration serves, and this one never will.
        """
        log_to_stderr()
        leave_out_polls()
        self.config = config
        self.router: Router | None = None
        self.problem = STARTING
        self._coordinator: CoordinatorClient | None = None
        self._router_id = f"router-{uuid.uuid4().hex[:8]}"
        self._app_name = serve.get_replica_context().app_name
        self._metrics = RouterMetrics(self._router_id, application=self._app_name, model=config.model_name)
        self._tasks: list[asyncio.Task[None]] = []
        others = await routers_alive(self._app_name, config)
        if others.same or others.former:
            await self._open()
            await self._wait_ready(SAME_CONFIG_WAIT_S if not others.former else None)
        else:
            self._tasks.append(asyncio.create_task(self._open_until_open()))
        self._tasks.append(asyncio.create_task(self._drain_when_stopping()))

    def __repr__(self) -> str:
        return f"RouterReplica({self._app_name}: {self.config.model_name})"

    async def _open_until_open(self) -> None:
        """What fails may be mended: a model's folder that is mounted late. /health tells it meanwhile."""
        while True:
            try:
                return await self._open()
            except PdrayError as error:
                logger.error("the router cannot open: %s", error)
                self.problem = str(error)
                await asyncio.sleep(REOPEN_S)

    async def _open(self) -> None:
        tokenizer = await asyncio.to_thread(load_tokenizer, self.config)
        defaults = await asyncio.to_thread(load_sampling_defaults, self.config, SERVE_LOG)
        self._coordinator = coordinator = await CoordinatorClient.open(self.config, self._app_name, detached=True)

        process = own_process()

        async def watch(version: int) -> ClusterView:
            return await coordinator.watch(version, router.stats() | {"process": process})

        router = Router(
            self.config,
            tokenizer,
            router_id=self._router_id,
            secret=coordinator.secret,
            watch=watch,
            metrics=self._metrics,
            report_broken=coordinator.report_broken,
            sampling_defaults=defaults,
        )
        router.failures.on_failure = LoopMetrics(self._router_id, self._app_name).on_failure
        await router.start()
        gc.collect()
        gc.freeze()  # a full collection of what is loaded takes 0.2 s, in which no stream moves
        self.router = router

    async def _wait_ready(self, timeout_s: float | None) -> None:
        """Until a request could be served.

        Raises:
            PdrayError: that will never be.
        """
        assert self.router is not None and self._coordinator is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.router.ready and (deadline is None or time.monotonic() < deadline):
            try:
                state = await self._coordinator.start_state(self._router_id)
            except WorkerDiedError:
                if self._coordinator.gone:
                    raise
                await asyncio.sleep(REOPEN_S)
                continue
            if state.failed:
                raise failure(state)
            if state.ready:
                await self.router.wait_ready()

    async def _drain_when_stopping(self) -> None:
        """Serve tells a replica of its end only when its last request is over, or not at all."""
        grace = self.config.graceful_shutdown_timeout_s
        while not await is_stopping():
            await asyncio.sleep(OWN_STATE_INTERVAL_S)
        logger.info("stopping; requests may go on for %g s", grace)
        if self.router is not None:
            self.router.drain(grace, STOPPING)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: the ASGI application of this replica."""
        return create_app(self.config, lambda: self.router, lambda: self.problem, self._metrics)

    def reconfigure(self, user_config: object) -> None:
        """Serve's hook for a user_config, which here is only a mark for others to see."""

    async def check_health(self) -> None:
        """Serve's health check: a replica whose own work has failed, or that has lost its Coordinator, is replaced.

        That workers are missing is no reason: another router would not have more. The workers' replica tells it.
        """
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if self._coordinator is not None and self._coordinator.gone:
            raise RuntimeError("the Coordinator was ended; a new replica will make another")

    async def __del__(self) -> None:
        """Serve's shutdown of a replica, also of one that is still being constructed."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if (router := getattr(self, "router", None)) is not None:
            await router.stop()
        if (coordinator := getattr(self, "_coordinator", None)) is not None:
            await coordinator.leave(self._router_id)


def drain_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """Options of a replica behind HAProxy, which Serve otherwise holds open for 30 s though nobody asks it any more.

    After DRAIN_S it waits for the requests that it still has, and for nothing else. A time that is set stays.
    """
    if environment.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or DRAIN_VARIABLE in environment:
        return {}
    return {"runtime_env": {"env_vars": {DRAIN_VARIABLE: str(DRAIN_S)}}}


def build(args: Config, deployed_by: str = "", num_routers: int = 1) -> serve.Application:
    """The application of one configuration; $PDRAY_API_KEY, where this runs, is its key if it names none.

    Args:
        deployed_by: id of who deploys it, for `pdray serve` to see whether it is still its own.
        num_routers: replicas of the router; in a YAML, `num_replicas` of the deployment `router`.
    """
    if args.api_key is None and (key := os.environ.get(API_KEY_VARIABLE)):
        args = Config(**args.model_dump(exclude_unset=True), api_key=SecretStr(key))
    num_workers = args.num_decode_workers
    places = num_workers * args.for_device("cuda").max_num_seqs  # workers may run on GPUs: the larger default
    bound = args.max_queue_size + places + 64
    common: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0} | drain_options(os.environ),
        "health_check_period_s": 2,
        "health_check_timeout_s": 4,  # three times in a row; before that the Coordinator ends a router that hangs
        "max_surge_percent": 100,  # start the new one beside the old one; the default would stop the old one first
    }
    workers = serve.deployment(
        name="workers", graceful_shutdown_timeout_s=2, graceful_shutdown_wait_loop_s=0.1, **common
    )
    router = serve.deployment(
        name="router",
        num_replicas=num_routers,
        user_config={MARK: deployed_by},
        max_ongoing_requests=bound,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s + DRAIN_MARGIN_S,
        graceful_shutdown_wait_loop_s=GRACEFUL_LOOP_S,
        **common,
    )
    return router(serve.ingress()(RouterReplica)).bind(args, workers=workers(WorkersReplica).bind(args))
