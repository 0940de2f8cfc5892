"""The Serve deployment: a router replica that is its own HTTP ingress."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve

from pdray.actors.client import CoordinatorClient
from pdray.cluster.messages import ClusterView
from pdray.config import Config
from pdray.logs import leave_out_polls, log_to_stderr
from pdray.metrics import RouterMetrics
from pdray.models import load_tokenizer
from pdray.models.generation_config import load_sampling_defaults
from pdray.router.router import Router
from pdray.serve import MARK
from pdray.serve.api import create_app

API_KEY_VARIABLE = "PDRAY_API_KEY"
DRAIN_VARIABLE = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
DRAIN_S = 1  # HAProxy has left a replica out of its list by then, and asks another where a connection is refused

SERVE_LOG = logging.getLogger("ray.serve")  # the replica's log shows lines of others from warnings up only

logger = logging.getLogger(__name__)


class RouterReplica:
    """Opens the router in the background, so that Serve sees a healthy replica at once and /health tells the truth."""

    def __init__(self, config: Config) -> None:
        log_to_stderr()
        leave_out_polls()
        self.config = config
        self.router: Router | None = None
        self._coordinator: CoordinatorClient | None = None
        self._opening = asyncio.get_running_loop().create_task(self._open())

    def __repr__(self) -> str:
        return f"RouterReplica({serve.get_replica_context().app_name}: {self.config.model_name})"

    async def _open(self) -> None:
        app_name = serve.get_replica_context().app_name
        router_id = f"router-{uuid.uuid4().hex[:8]}"
        tokenizer = await asyncio.to_thread(load_tokenizer, self.config)
        defaults = await asyncio.to_thread(load_sampling_defaults, self.config, SERVE_LOG)
        self._coordinator = coordinator = await CoordinatorClient.open(self.config, app_name, detached=True)

        async def watch(version: int) -> ClusterView:
            return await coordinator.watch(version, router.stats())

        router = Router(
            self.config,
            tokenizer,
            router_id=router_id,
            secret=coordinator.secret,
            watch=watch,
            metrics=RouterMetrics(router_id, application=app_name, model=self.config.model_name),
            sampling_defaults=defaults,
        )
        await router.start()
        gc.collect()
        gc.freeze()  # a full collection of what is loaded takes 0.2 s, in which no stream moves
        self.router = router

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: the ASGI application of this replica."""
        return create_app(self.config, lambda: self.router)

    def reconfigure(self, user_config: object) -> None:
        """Serve's hook for a user_config, which here is only a mark for others to see."""

    async def check_health(self) -> None:
        """Serve's health check: a replica that could not open its router, or lost its Coordinator, is replaced."""
        if self._opening.done() and (error := self._opening.exception()) is not None:
            raise error
        if self._coordinator is not None and self._coordinator.gone:
            raise RuntimeError("the Coordinator was ended; a new replica will make another")

    async def __del__(self) -> None:
        """Serve's shutdown of a replica."""
        self._opening.cancel()
        if self.router is not None:
            await self.router.stop()


def drain_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """Options of a replica behind HAProxy, which Serve otherwise holds open for 30 s though nobody asks it any more.

    After DRAIN_S it waits for the requests that it still has, and for nothing else. A time that is set stays.
    """
    if environment.get("RAY_SERVE_ENABLE_HA_PROXY") != "1" or DRAIN_VARIABLE in environment:
        return {}
    return {"runtime_env": {"env_vars": {DRAIN_VARIABLE: str(DRAIN_S)}}}


def build(args: Config, deployed_by: str = "") -> serve.Application:
    """The application of one configuration; $PDRAY_API_KEY, where this runs, is its key if it names none.

    Args:
        deployed_by: id of who deploys it, for `pdray serve` to see whether it is still its own.
    """
    if args.api_key is None and (key := os.environ.get(API_KEY_VARIABLE)):
        args = Config(**args.model_dump(exclude_unset=True), api_key=SecretStr(key))
    num_workers = args.num_decode_workers
    places = num_workers * args.for_device("cuda").max_num_seqs  # workers may run on GPUs: the larger default
    bound = args.max_queue_size + places + 64
    deployment = serve.deployment(
        name="router",
        user_config={MARK: deployed_by},
        ray_actor_options={"num_cpus": 0} | drain_options(os.environ),
        max_ongoing_requests=bound,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=10,
    )(serve.ingress()(RouterReplica))
    return deployment.bind(args)
