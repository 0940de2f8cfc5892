"""The Serve deployment: a router replica that is its own HTTP ingress."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import uuid

from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve

from pdray.actors.client import CoordinatorClient
from pdray.cluster.messages import ClusterView
from pdray.config import Config
from pdray.metrics import LoopMetrics, RouterMetrics
from pdray.models import load_tokenizer
from pdray.router.router import Router
from pdray.serve.api import create_app

API_KEY_VARIABLE = "PDRAY_API_KEY"

logger = logging.getLogger(__name__)


class RouterReplica:
    """Opens the router in the background, so that Serve sees a healthy replica at once and /health tells the truth."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.router: Router | None = None
        self._coordinator: CoordinatorClient | None = None
        self._opening = asyncio.get_running_loop().create_task(self._open())

    def __repr__(self) -> str:
        return f"RouterReplica({self.config.model_name})"

    async def _open(self) -> None:
        app_name = serve.get_replica_context().app_name
        router_id = f"router-{uuid.uuid4().hex[:8]}"
        tokenizer = await asyncio.to_thread(load_tokenizer, self.config)
        self._coordinator = coordinator = await CoordinatorClient.open(self.config, app_name, detached=True)

        async def watch(version: int) -> ClusterView:
            return await coordinator.watch(version, router.stats())

        router = Router(
            self.config,
            tokenizer,
            router_id=router_id,
            secret=coordinator.secret,
            watch=watch,
            metrics=RouterMetrics(router_id),
        )
        router.failures.on_failure = LoopMetrics(router_id).on_failure
        await router.start()
        gc.collect()
        gc.freeze()  # a full collection of what is loaded takes 0.2 s, in which no stream moves
        self.router = router

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: the ASGI application of this replica."""
        return create_app(self.config, lambda: self.router)

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


def build(args: Config) -> serve.Application:
    """The application of one configuration; $PDRAY_API_KEY, where this runs, is its key if it names none."""
    if args.api_key is None and (key := os.environ.get(API_KEY_VARIABLE)):
        args = Config(**args.model_dump(exclude_unset=True), api_key=SecretStr(key))
    num_workers = args.num_decode_workers
    places = num_workers * args.for_device("cuda").max_num_seqs  # workers may run on GPUs: the larger default
    bound = args.max_queue_size + places + 64
    deployment = serve.deployment(
        name="router",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=bound,
        health_check_period_s=2,
        health_check_timeout_s=4,  # Serve replaces a replica after three in a row: one that hangs, in 15 s
        graceful_shutdown_timeout_s=10,
    )(serve.ingress()(RouterReplica))
    return deployment.bind(args)
