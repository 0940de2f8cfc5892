"""The Coordinator: creates workers, connects them, notices deaths, tells routers who is there.

One per application. Its table is `pdray.cluster.membership.Membership`; this actor carries out what
the table says and reports what happened. It is no part of any request's path.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.placement import worker_options
from pdray.actors.prefill_worker import PrefillWorker
from pdray.cluster.membership import Connect, Effect, Kill, Membership, Start, TellGone
from pdray.cluster.messages import ClusterView, WorkerInfo
from pdray.config import Config

logger = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 10.0  # a watch that saw nothing new answers with the view it has
TICK_S = 0.5
UNWATCHED_LIMIT_S = 30.0  # a detached application whose routers are all gone ends after so long


class Coordinator:
    """Actor. start() returns at once and works on in the background; every method is quick but watch().

    Args:
        app_name: prefix of every actor's name.
        detached: True for a Serve application: actors outlive their creator, and end when the
            application has left Serve or nobody has watched for UNWATCHED_LIMIT_S.
    """

    def __init__(self, config: Config, app_name: str, *, detached: bool) -> None:
        self.config = config
        self.app_name = app_name
        self.detached = detached
        self.secret = secrets.token_bytes(32)
        self._membership = Membership(_roles(config))
        self._actors: dict[str, ActorHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._stopped = asyncio.Event()
        self._last_watch = time.monotonic()
        self._start_error: str | None = None
        self._started = False

    def __repr__(self) -> str:
        return f"Coordinator({self.app_name})"

    async def start(self) -> bytes:
        """Begin to create workers; returns the cluster's secret. Idempotent."""
        if not self._started:
            self._started = True
            self._perform(self._membership.start(time.monotonic()))
            self._spawn(self._tick())
        return self.secret
